"""Raw segments become Parquet, manifests, windows and proof; and repeating any part of it changes nothing."""

import io
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from modelyard.core.layout import copy_name, segment_key
from modelyard.telemetry.model import CaptureStream, Process, Segment, Window, join, missing
from tests.unit.telemetry.bench import NOON, REPLICA, Bench, Crashed, Life, bench, crashing

PUBLISHED = ["prediction_id", "request_id", "sequence", "replica", "time", "deployment", "image", "model", "protocol",
             "method", "status", "latency_ms", "queue_ms", "request", "request_type", "response", "response_type",
             "trace_id"]
KINDS = (CaptureStream, Segment, Process, Window)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path) as opened:
        await opened.deployed()
        yield opened


async def table(here: Bench, key: str) -> Any:
    return pq.read_table(io.BytesIO(b"".join([c async for c in here.ctx.blobs.get(key)])))


async def test_a_segment_becomes_parquet_and_a_manifest(here: Bench) -> None:
    life = Life()
    await here.ship(life)
    life.record(NOON, request=b"\x00ask").record(NOON + timedelta(seconds=1), "INTERNAL", response=b"")
    await here.ship(life.count(NOON, "sampled", 5))
    await here.step()
    key = f"capture/iris/iris-scorer/7/date=2026-11-23/hour=12/{REPLICA}-1-2.parquet"
    assert await here.keys() == [key]
    rows = await table(here, key)
    assert rows.column_names == PUBLISHED
    first, second = rows.to_pylist()
    assert (first["request"], first["status"], first["sequence"], first["latency_ms"]) == (b"\x00ask", "OK", 1, 1.0)
    assert (first["time"], first["image"], first["replica"]) == (NOON, "iris-scorer:7", REPLICA)
    assert (second["status"], second["response"]) == ("INTERNAL", b"")
    (manifest,) = await here.ctx.store.find(Segment)
    assert (manifest.first, manifest.last, manifest.rows, manifest.not_recorded) == (1, 2, 2, {"sampled": 5})
    events = [e for e in await here.events() if e.topic == "capture.closed"]
    assert [(e.subject, e.partitionkey) for e in events] == [(f"iris:{REPLICA}:1", "default/iris")]
    assert events[0].data["files"][0]["key"] == key and "runs" not in events[0].data


async def test_hours_are_kept_apart(here: Bench) -> None:
    life = Life().record(NOON - timedelta(seconds=1)).record(NOON).record(NOON - timedelta(seconds=2))
    await here.ship(life)
    await here.step()
    assert await here.keys("capture/iris/iris-scorer") == [
        f"capture/iris/iris-scorer/7/date=2026-11-23/hour=11/{REPLICA}-1-3.parquet",
        f"capture/iris/iris-scorer/7/date=2026-11-23/hour=12/{REPLICA}-2-2.parquet"]


async def test_another_workspace_has_its_own_folder_and_documents(here: Bench) -> None:
    await here.deployed(workspace="lab")
    await here.ship(Life().record(NOON), workspace="lab")
    await here.step(workspace="lab")
    assert await here.keys() == [
        f"workspaces/lab/capture/iris/iris-scorer/7/date=2026-11-23/hour=12/{REPLICA}-1-1.parquet"]
    assert await here.ctx.store.find(Segment) == []
    assert len(await here.ctx.store.find(Segment, workspace="lab")) == 1


async def test_collected_rows_lie_beside_the_calls(here: Bench) -> None:
    life = Life().record(NOON).collect(NOON, "features", ["area", "kind"], [[1.5, "a"], [2.5, "b"]])
    await here.ship(life.record(NOON).collect(NOON, "features", ["area"], [[None]]).collect(NOON, "x", None, [[7]]))
    await here.step()
    folder = "capture/iris/iris-scorer/7/collect="
    assert await here.keys(folder) == [f"{folder}features/date=2026-11-23/hour=12/{REPLICA}-1-2.parquet",
                                       f"{folder}x/date=2026-11-23/hour=12/{REPLICA}-3-3.parquet"]
    rows = (await table(here, (await here.keys(folder))[0])).to_pylist()
    assert [(r["prediction_id"], r["row"], r["area"], r["kind"]) for r in rows] == [
        (f"{REPLICA}.1", 0, 1.5, "a"), (f"{REPLICA}.1", 1, 2.5, "b"), (f"{REPLICA}.2", 0, None, None)]
    status, page = await here.get("/v1/capture/iris?collect=features&order=time")
    assert status == 200 and [r["area"] for r in page["items"]] == [1.5, 2.5, None]


async def snapshot(here: Bench) -> dict[str, Any]:
    """Everything that a reader can see, but for when documents were made."""
    outside = {"created", "updated"}
    docs = {type_.kind: [d.model_dump(exclude=outside | {"revision", "sequence", "due", "busy", "sweep"})
                         for d in await here.ctx.store.find(type_)] for type_ in KINDS}
    parquet = {key: (await table(here, key)).to_pylist() for key in await here.keys()}
    return {"docs": docs, "parquet": parquet}


async def play(here: Bench, crash: tuple[int, bool] | None = None) -> int:
    """Two processes' segments and two settled windows, with a crash at the n-th change. Gives back the number of
    crashes."""
    lives = [Life(f"{n}-aaaaaaa{n}") for n in range(2)]
    for life in lives:
        await here.ship(life)
        life.record(NOON).record(NOON + timedelta(seconds=30), "INTERNAL").count(NOON, "write-failed", 2)
        await here.ship(life)
        life.collect(NOON, "features", ["a"], [[1]])
        await here.ship(life.record(NOON + timedelta(seconds=61)).end(NOON + timedelta(seconds=62)))
    here.clock.tick(minutes=5)
    crashes = 0
    if crash:
        try:
            await here.step(ctx=crashing(here.ctx, *crash))
        except Crashed:
            crashes = 1
    await here.step()
    await here.step()
    return crashes


@pytest.mark.slow
async def test_a_crash_at_any_step_changes_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path / "whole") as whole:
        await whole.deployed()
        await play(whole)
        want = await snapshot(whole)
        told = [(e.topic, e.subject) for e in await whole.events()]
    assert len(want["docs"]["telemetry-window"]) == 2 and len(want["docs"]["segment"]) == 4
    assert len(set(told)) == len(told), "nothing is told twice"
    at, met = 0, True
    while met:
        at += 1
        for after in (False, True):
            async with bench(tmp_path / f"{at}-{after}") as torn:
                await torn.deployed()
                met = bool(await play(torn, (at, after)))
                assert await snapshot(torn) == want, (at, after)
                assert [(e.topic, e.subject) for e in await torn.events()] == told, (at, after)
    assert at > 20, "the crashes reached every step"


async def test_the_same_segment_shipped_again_changes_nothing(here: Bench) -> None:
    life = Life().record(NOON).record(NOON)
    number, raw = life.segment()
    key = segment_key("default", "iris", REPLICA, number)
    for _ in range(3):
        await here.put(key, raw)
        await here.step()
    assert len(await here.ctx.store.find(Segment)) == 1
    (process,) = await here.ctx.store.find(Process)
    assert process.runs == [(1, 2)]
    assert len([e for e in await here.events() if e.topic == "capture.closed"]) == 1


async def test_copies_of_a_segment_count_once_whenever_they_come(here: Bench) -> None:
    """A shipper whose answer was lost may have sent it twice, under two names."""
    number, raw = Life().record(NOON).record(NOON).segment()
    key = segment_key("default", "iris", REPLICA, number)
    await here.put(copy_name(key, "0a1b2c3d"), raw)
    await here.put(key, raw)
    await here.step()
    await here.put(copy_name(key, "4e5f6a7b"), raw)
    await here.step()
    (file,) = await here.keys()
    assert (await table(here, file)).column("sequence").to_pylist() == [1, 2]
    (process,) = await here.ctx.store.find(Process)
    assert process.runs == [(1, 2)]
    assert len([e for e in await here.events() if e.topic == "capture.closed"]) == 1


async def test_verify_tells_complete_gaps_and_open_ends(here: Bench) -> None:
    complete, open_ended, gaps = Life("0-aaaaaaaa"), Life("1-bbbbbbbb"), Life("2-cccccccc")
    for life in (complete, open_ended, gaps):
        await here.ship(life)
        await here.ship(life.record(NOON).record(NOON))
    gaps.record(NOON).record(NOON).segment()
    await here.ship(gaps.record(NOON).end(NOON))
    await here.ship(complete.count(NOON, "off", 3).end(NOON))
    await here.step()
    status, proof = await here.get("/v1/capture/iris/verify")
    assert status == 200 and not proof["complete"]
    states = {p["replica"]: (p["state"], p["gaps"], p["lost_segments"]) for p in proof["processes"]}
    assert states == {"0-aaaaaaaa": ("complete", [], []), "1-bbbbbbbb": ("open-ended", [], []),
                      "2-cccccccc": ("gaps", [[3, 4]], [[2, 2]])}
    assert proof["totals"] == {"recorded": 7, "collected": 0, "missing": 2, "damaged": 0, "rows_lost": 0,
                               "not_recorded": {"off": 3}}
    lost = [e for e in await here.events() if e.topic == "capture.lost"]
    assert [(e.subject, e.data["gaps"]) for e in lost] == [("iris:2-cccccccc", [[3, 4]])]


async def test_a_late_segment_fills_its_gap(here: Bench) -> None:
    life = Life()
    await here.ship(life)
    number, late = life.record(NOON).segment()
    await here.ship(life.record(NOON).end(NOON))
    await here.step()
    await here.put(segment_key("default", "iris", REPLICA, number), late)
    await here.step()
    assert (await here.get("/v1/capture/iris/verify"))[1]["processes"][0]["state"] == "complete"


async def test_a_damaged_frame_is_counted_and_the_rest_is_read(here: Bench) -> None:
    life = Life()
    await here.ship(life)
    number, raw = life.record(NOON, request=b"HERE").record(NOON).end(NOON).segment()
    await here.put(segment_key("default", "iris", REPLICA, number), raw.replace(b"HERE", b"THER"))
    await here.step()
    proof = (await here.get("/v1/capture/iris/verify"))[1]
    assert proof["totals"]["damaged"] == 1 and proof["processes"][0]["gaps"] == [[1, 1]]
    lost = [e.data.get("lost") for e in await here.events() if e.topic == "capture.lost"]
    assert {"damaged": 1} in lost


async def test_a_segment_without_its_start_frame_is_told_by_its_process(here: Bench) -> None:
    life = Life(image="iris-scorer:9")
    await here.ship(life)
    number, raw = life.record(NOON).segment()
    await here.put(segment_key("default", "iris", REPLICA, number), raw[:20] + b"!" + raw[21:])
    await here.step()
    (manifest,) = await here.ctx.store.find(Segment)
    assert (manifest.image, manifest.rows, manifest.damaged) == ("iris-scorer:9", 1, 1)


async def test_nonsense_stays_where_it_is_and_stops_nobody(here: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bad = Life("0-bbbbbbbb", image="not an image").record(NOON)
    await here.ship(bad)
    await here.ship(Life().record(NOON))
    for _ in range(3):
        stream = await here.step()
    assert stream.aside == ["capture/iris/.segments/0-bbbbbbbb-00000000.seg"]
    assert stream.aside[0] in await here.keys() and len(await here.ctx.store.find(Segment)) == 1
    assert len([r for r in caplog.records if "cannot be read" in r.message]) == 1


@pytest.mark.slow
async def test_more_than_a_batch_is_taken_in_turns(here: Bench) -> None:
    life = Life()
    for _ in range(150):
        await here.ship(life.record(NOON))
    stream = await here.step()
    assert stream.due == here.clock(), "there is more: look again at once"
    await here.step()
    await here.step()
    (process,) = await here.ctx.store.find(Process)
    assert process.runs == [(1, 150)] and process.segments == [(0, 149)]


async def test_events_heeded_by_their_sequence(here: Bench) -> None:
    await here.deployed("deployment.updated", 5, capture={"retention_days": 7})
    await here.deployed("deployment.updated", 3, capture={"retention_days": 90})
    await here.deployed("deployment.deleted", 6, capture={"retention_days": 7})
    await here.deployed("deployment.deleted", 6)
    stream = await here.ctx.store.get(CaptureStream, "iris")
    assert stream is not None and (stream.retention_days, stream.gone) == (7, True)


async def test_looks_often_when_busy_and_seldom_when_not(here: Bench) -> None:
    stream = await here.step()
    assert stream.due == here.clock() + timedelta(seconds=5)
    await here.ship(Life().record(NOON))
    stream = await here.step()
    assert stream.due == here.clock() + timedelta(seconds=1)
    here.clock.tick(hours=1)
    await here.deployed("deployment.deleted", 2)
    stream = await here.step()
    assert stream.due == here.clock() + timedelta(seconds=60)


async def test_retention_takes_what_is_old_and_nothing_else(here: Bench) -> None:
    old, new = Life("0-aaaaaaaa"), Life("1-bbbbbbbb")
    await here.ship(old.record(NOON).collect(NOON, "x", None, [[1]]).end(NOON))
    here.clock.tick(minutes=5)
    await here.step()
    here.clock.tick(days=29)
    await here.ship(new.record(here.clock()))
    await here.step()
    assert len(await here.keys()) == 3
    here.clock.tick(days=2)
    await here.step()
    assert [key for key in await here.keys() if "0-aaaaaaaa" in key] == [] and len(await here.keys()) == 1
    assert [s.replica for s in await here.ctx.store.find(Segment)] == ["1-bbbbbbbb"]
    assert [p.replica for p in await here.ctx.store.find(Process)] == ["1-bbbbbbbb"]
    assert all(w.start > NOON + timedelta(days=1) for w in await here.ctx.store.find(Window))
    await here.put(segment_key("default", "iris", "0-aaaaaaaa", 0), b"shipped once more")
    await here.step()
    assert len(await here.keys()) == 1, "what retention took does not come back"


def test_runs() -> None:
    assert join([(4, 6), (1, 3), (9, 9), (5, 7)]) == [(1, 7), (9, 9)]
    assert missing([(2, 3), (6, 6)], 1, 8) == [(1, 1), (4, 5), (7, 8)]
    assert missing([], 1, None) == [] and missing([], 1, 2) == [(1, 2)]
