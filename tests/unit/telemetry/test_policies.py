"""Completeness is proved, or the gaps are listed, whatever of the calls the capture policy lets through."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.core.inference import JSON
from modelyard.core.layout import segments_prefix
from modelyard.scoring import capture
from modelyard.scoring.capture import CaptureLog, Finished
from modelyard.scoring.shipper import Shipper
from modelyard.telemetry import rows
from modelyard.telemetry.model import Segment
from modelyard.telemetry.spans import Span
from tests.unit.telemetry.bench import Bench, bench
from tests.unit.test_capture_log import ABOUT, REPLICA, call

SECRET = "Ada-Lovelace-1815"
POLICIES = (
    {"sampling": 0.3, "sampling_key": "input:customer"}, {"sampling": 0.3, "sampling_key": "request_id"},
    {"redact": ["name"]}, {"sampling": 0.5, "sampling_key": "input:name", "redact": ["name"], "sync": "always"},
    {"spool_bytes": 24 * 1024}, {})


def one(n: int) -> Finished:
    """A call of one of forty customers; every tenth fails."""
    body = json.dumps({"customer": n % 40, "name": SECRET, "n": n}).encode()
    made = call(n, "INTERNAL" if n % 10 == 0 else "OK", body)
    made.protocol, made.request_type, made.response, made.response_type = "score", JSON, b"[1]", JSON
    return made


def write(spool: Path, policy: dict[str, Any]) -> dict[str, int]:
    """400 calls, told to the log as the data plane does; gives back its totals."""
    log = CaptureLog.open(spool, REPLICA, ABOUT, {"enabled": True, **policy})
    for n in range(1, 401):
        finished = one(n)
        finished.request_id = f"r{n % 40}"
        log.expect(finished.prediction_id, asked(finished))
        log.append([finished])
        log.collect("seen", finished.prediction_id, ["name", "n"], [[SECRET, n]])
    log.close()
    return log.totals


def asked(finished: Finished) -> Any:
    from modelyard.scoring.calls import Call
    from modelyard.scoring.codecs import ScoreCodec

    return Call("score", "score", finished.request, JSON, ScoreCodec(), request_id=finished.request_id)


async def ingested(here: Bench, spool: Path) -> dict[str, Any]:
    """What ``verify`` says once the spool's segments have arrived."""
    from modelyard.adapters.blobs_dir import open_grant

    assert await Shipper(spool, await here.ctx.grants.lend("default", "iris", 60), open_grant).once()
    while await here.keys(segments_prefix("default", "iris")):
        await here.step()
    status, found = await here.get("/v1/capture/iris/verify")
    assert status == 200
    return dict(found)


async def everything(here: Bench) -> list[dict[str, Any]]:
    """All captured rows, as a client of the SDK reads them."""
    stream = await here.step()
    return [row async for table in rows.tables(here.ctx, stream, Span(None, None)) for row in table.to_pylist()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(policy) or "all")
async def test_every_call_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: dict[str, Any]) -> None:
    monkeypatch.setattr(capture, "SEGMENT_BYTES", 8192)
    async with bench(tmp_path / "data") as here:
        await here.deployed()
        totals = await asyncio.to_thread(write, tmp_path / "spool", policy)
        found = await ingested(here, tmp_path / "spool")
        told = found["totals"]
        assert found["complete"] and found["processes"][0]["state"] == "complete"
        assert told["recorded"] + sum(told["not_recorded"].values()) == 400
        assert told["recorded"] == totals["recorded"] and told["missing"] == 0
        assert told["collected"] + told["rows_lost"] == totals["collected"] + totals.get("rows-lost", 0)
        segments = await here.ctx.store.find(Segment, {"replica": REPLICA})
        assert sum(segment.rows for segment in segments) == told["recorded"] > 30
        assert len({segment.number for segment in segments}) == len(segments) > 1, "a manifest row for each"
        table = await everything(here)
        assert (SECRET in repr(table)) is ("redact" not in policy)
        assert {json.loads(row["request"])["customer"] for row in table if row["request"]} <= set(range(40))


@pytest.mark.parametrize("policy", POLICIES[:4], ids=lambda policy: "-".join(policy))
async def test_a_lost_segment_is_a_gap_with_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: dict[str, Any],
) -> None:
    monkeypatch.setattr(capture, "SEGMENT_BYTES", 8192)
    async with bench(tmp_path / "data") as here:
        await here.deployed()
        totals = await asyncio.to_thread(write, tmp_path / "spool", policy)
        await asyncio.to_thread((tmp_path / "spool" / f"{REPLICA}-00000002.seg").unlink)
        found = await ingested(here, tmp_path / "spool")
        process = found["processes"][0]
        assert not found["complete"] and process["state"] == "gaps" and process["lost_segments"] == [[2, 2]]
        missing = [n for a, b in process["gaps"] for n in range(a, b + 1)]
        assert missing and process["missing"] == len(missing) == totals["recorded"] - process["recorded"]
        arrived = {int(row["sequence"]) for row in await everything(here)}
        assert arrived.isdisjoint(missing) and arrived | set(missing) == set(range(1, totals["recorded"] + 1))
