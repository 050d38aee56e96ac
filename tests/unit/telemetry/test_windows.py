"""Windows: exact, settled once, told again when late data change them."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from modelyard.core.errors import Invalid
from modelyard.telemetry.model import Window
from modelyard.telemetry.windows import Cell, Windows, parse_window
from tests.unit.telemetry.bench import NOON, Bench, Life, bench


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path) as opened:
        await opened.deployed()
        yield opened


@pytest.mark.parametrize(("text", "seconds"), [("60", 60), ("10s", 10), ("1m", 60), ("5min", 300), ("2h", 7200),
                                               ("1d", 86400)])
def test_a_window_is_a_whole_number_of_slots(text: str, seconds: int) -> None:
    assert parse_window(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "15s", "-1m", "1w", "1.5m", "32d", "m", "１m"])
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="window"):
        parse_window(text)


def test_any_grouping_gives_the_same() -> None:
    cells = [Cell(slot, f"m:{slot % 3}", status, {100: 2, -1: 1})
             for slot in range(0, 600, 10) for status in ("OK", "INTERNAL")]
    one, other = Windows(120), Windows(120)
    one.add("i:1", cells)
    for cell in reversed(cells):
        other.add("i:1", [cell])
    assert list(one.answers("d")) == list(other.answers("d"))
    assert sum(w["requests"] for w in one.answers("d")) == len(cells) * 3


async def test_windows_from_records_and_counts(here: Bench) -> None:
    life = Life()
    for n in range(100):
        life.record(NOON + timedelta(seconds=n % 60), latency_ms=n + 1)
    life.record(NOON, "INTERNAL", latency_ms=1).record(NOON + timedelta(seconds=60), model="iris:5")
    life.count(NOON, "sampled", 50).count(NOON, "refused", 7, "RESOURCE_EXHAUSTED", bucket=-1)
    await here.ship(life)
    here.clock.tick(minutes=1, seconds=30)
    await here.step()
    status, answer = await here.get("/v1/telemetry/iris")
    assert status == 200
    first, second = answer["windows"]
    assert set(first) == {"start", "end", "deployment", "image", "model", "requests", "errors", "latency_ms"}
    assert (first["start"], first["end"]) == ("2026-11-23T12:00:00.000000Z", "2026-11-23T12:01:00.000000Z")
    assert (first["model"], first["image"], first["deployment"]) == ("iris:4", "iris-scorer:7", "iris")
    assert first["requests"] == 158 and first["errors"] == {"INTERNAL": 1, "RESOURCE_EXHAUSTED": 7}
    assert first["latency_ms"]["p99"] == pytest.approx(99, rel=0.07)
    assert (second["model"], second["requests"], second["errors"]) == ("iris:5", 1, {})


async def test_other_widths_and_stretches(here: Bench) -> None:
    life = Life()
    for n in range(120):
        life.record(NOON + timedelta(seconds=n))
    await here.ship(life)
    here.clock.tick(minutes=3)
    await here.step()

    async def requests(query: str) -> list[int]:
        status, answer = await here.get(f"/v1/telemetry/iris?{query}")
        assert status == 200, answer
        return [w["requests"] for w in answer["windows"]]

    assert await requests("window=10s") == [10] * 12
    assert await requests("window=1h") == [120]
    assert await requests("start=2026-11-23T12:01:00Z") == [60]
    assert await requests("end=2026-11-23T12:01:00Z") == [60]
    assert await requests("start=2026-11-23T13:01:00%2B01:00&end=2026-11-23T13:02:00%2B01:00") == [60]
    assert await requests("start=2027-01-01") == []


@pytest.mark.parametrize("query", ["window=15s", "start=yesterday", "windows=1m",
                                   "start=2026-11-23T12:00:00Z&end=2026-11-22T12:00:00Z"])
async def test_bad_questions(here: Bench, query: str) -> None:
    status, problem = await here.get(f"/v1/telemetry/iris?{query}")
    assert status == 422 and problem["code"] == "invalid"


async def test_a_window_is_told_once_it_is_settled_and_again_when_late_data_arrive(here: Bench) -> None:
    life = Life()
    await here.ship(life.record(NOON))
    await here.step()
    assert await here.ctx.store.find(Window) == []
    here.clock.tick(seconds=74)
    await here.step()
    assert await here.ctx.store.find(Window) == []
    here.clock.tick(seconds=1)
    await here.step()
    (window,) = await here.ctx.store.find(Window)
    assert (window.requests, window.start, window.sequence) == (1, NOON, 1)
    await here.step()
    await here.ship(life.record(NOON + timedelta(seconds=5), "INTERNAL"))
    await here.step()
    (window,) = await here.ctx.store.find(Window)
    assert (window.requests, window.errors, window.sequence) == (2, {"INTERNAL": 1}, 2)
    told = [e for e in await here.events() if e.topic == "telemetry.window"]
    assert [e.data["requests"] for e in told] == [1, 2]
    assert {e.partitionkey for e in told} == {"default/iris"}


async def test_a_call_longer_than_a_window_is_found(here: Bench) -> None:
    life = Life().record(NOON - timedelta(minutes=30)).record(NOON)
    await here.ship(life)
    await here.step()
    status, answer = await here.get("/v1/telemetry/iris?start=2026-11-23T12:00:00Z&end=2026-11-23T12:01:00Z")
    assert status == 200 and [w["requests"] for w in answer["windows"]] == [1]


async def test_nobody_is_404(here: Bench) -> None:
    for path in ("/v1/telemetry/nobody", "/v1/capture/nobody", "/v1/capture/nobody/verify"):
        assert (await here.get(path))[0] == 404
