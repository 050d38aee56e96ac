"""The SQLite bus's own matters: retention, leases, who takes over from whom, and what it costs to wait."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelyard.adapters import bus_sqlite_group as group
from modelyard.adapters import sqlite_identity
from modelyard.adapters.bus_sqlite import SqliteBus, partition_of
from modelyard.adapters.bus_sqlite_group import Lane
from modelyard.adapters.sqlite_watch import Watch
from modelyard.core.errors import Unavailable
from tests.contract.bus_worker import event
from tests.contract.test_bus import TOPICS, kill, lines, numbers, start, take


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[SqliteBus]:
    opened = await SqliteBus.open(tmp_path / "yard.db")
    yield opened
    await opened.close()


async def test_old_records_are_removed_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = await SqliteBus.open(tmp_path / "yard.db", retention_days=1)
    for number in range(30):
        await bus.publish(event(number))
    await bus._file.write(
        lambda db: db.execute("UPDATE bus_log SET at = at - 2 * 86400000 WHERE offset <= 20").rowcount)
    monkeypatch.setattr("modelyard.adapters.bus_sqlite.PRUNE_ROWS", 8)
    rounds = 1
    while await bus.prune():
        rounds += 1
    assert rounds == 3
    async with bus.subscribe("late", TOPICS) as deliveries:
        assert sorted(numbers(await take(deliveries, 10))) == list(range(20, 30))
    records, place = await bus.read([], "beginning")
    assert [e.data["n"] for _, e in records] == list(range(20, 30))
    await bus._file.write(lambda db: db.execute("UPDATE bus_log SET at = 0").rowcount)
    while await bus.prune():
        pass
    await bus.publish(event(30))  # offsets are never used again
    assert [e.data["n"] for _, e in (await bus.read([], place))[0]] == [30]
    await bus.close()


def test_a_key_keeps_its_partition() -> None:
    """What lies in a file was put there by another process, perhaps of an older version."""
    assert [partition_of(f"default/m{n}") for n in range(4)] == [4, 2, 0, 6]


async def test_a_record_that_is_no_event_is_delivered_and_not_read(bus: SqliteBus) -> None:
    await bus._file.write(lambda db: db.execute(
        "INSERT INTO bus_log(topic, partition, key, at, raw) VALUES ('model.registered', 3, 'k', ?, ?)",
        (int(time.time() * 1000), b"\xff not an event")).rowcount)
    await bus.publish(event(1))
    async with bus.subscribe("g", TOPICS) as deliveries:
        got = await take(deliveries, 2)
    assert b"\xff not an event" in [delivery.raw for delivery in got]
    records, _ = await bus.read([], "beginning")
    assert [e.data["n"] for _, e in records] == [1]


@pytest.mark.slow
async def test_a_frozen_member_is_succeeded_when_its_lease_ends(tmp_path: Path) -> None:
    """SIGSTOP: the process lives and holds everything; thawed, it finds that others have taken over."""
    bus = await SqliteBus.open(tmp_path / "yard.db", lease_s=1.0)
    worker = await start("consume", f"sqlite://{tmp_path}/yard.db", "g", "0")
    assert await lines(worker, 1) == ["joined"]
    await bus._file.write(lambda db: db.execute("UPDATE bus_members SET expires = expires - 9000").rowcount)
    os.kill(worker.pid, signal.SIGSTOP)
    for number in range(20):
        await bus.publish(event(number))
    async with bus.subscribe("g", TOPICS) as deliveries:
        got = await take(deliveries, 20)
        assert sorted(numbers(got)) == list(range(20))
        os.kill(worker.pid, signal.SIGCONT)
        await kill(worker)
    await bus.close()


async def test_a_dead_process_is_known_and_a_foreign_one_is_not() -> None:
    me = await asyncio.to_thread(sqlite_identity.identity)
    space, pid, started, tail = me.split("/")
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await child.wait()
    cases = {me: False, f"{space}/{child.pid}/1/{tail}": True, f"{space}/{pid}/1/{tail}": True,
             f"pid:[1]/{child.pid}/1/{tail}": False, f"unknown/{child.pid}/1/{tail}": False,
             f"{space}/{pid}/{started}/x": False}
    for member, dead in cases.items():
        assert await asyncio.to_thread(sqlite_identity.dead, member) is dead, member


def test_a_lane_is_done_up_to_its_lowest_unfinished_record() -> None:
    lane = Lane("t", 0, done=3, fetched=None)
    for offset in (5, 8, 9, 12):
        lane.open.append(offset)
        lane.handed.add(offset)
    for offset, done in ((8, 3), (12, 3), (5, 8), (9, 12)):
        lane.finish(offset)
        assert lane.done == done
    assert not lane.open and not lane.finished and not lane.handed


@pytest.mark.slow
async def test_who_does_not_acknowledge_gives_up_its_lanes_in_the_end(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "LET_GO_S", 0.3)
    one, two = await SqliteBus.open(tmp_path / "yard.db"), await SqliteBus.open(tmp_path / "yard.db")
    for number in range(32):
        await one.publish(event(number, key=f"k{number}"))
    async with one.subscribe("g", ["model.registered"]) as first:
        stuck = await take(first, 32, ack=False)
        async with two.subscribe("g", ["model.registered"]) as second:
            got = numbers(await take(second, 1))
            for delivery in stuck:  # too late for those: no harm, no effect
                await delivery.ack()
            async with asyncio.timeout(10):
                while True:
                    try:
                        async with asyncio.timeout(0.5):
                            got += numbers([await anext(second)])
                    except TimeoutError:
                        break
    assert 0 < len(got) < 32 and len(set(got)) == len(got)
    await one.close()
    await two.close()


async def test_a_bus_that_breaks_tells_its_members(tmp_path: Path) -> None:
    path = tmp_path / "yard.db"
    bus = await SqliteBus.open(path, lease_s=0.4)
    async with bus.subscribe("g", TOPICS) as deliveries:
        await asyncio.to_thread(path.rename, tmp_path / "elsewhere.db")
        with pytest.raises(Unavailable):
            await take(deliveries, 1, within=10)
    await bus.close()


@pytest.mark.parametrize("watched", [True, False])
async def test_others_are_heard_with_and_without_the_kernels_help(tmp_path: Path, watched: bool,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    if not watched:
        monkeypatch.setattr(Watch, "start", lambda self, database: False)
    bus = await SqliteBus.open(tmp_path / "yard.db")
    other = await SqliteBus.open(tmp_path / "yard.db")
    async with bus.subscribe("g", TOPICS) as deliveries:
        await asyncio.sleep(0.1)
        for number in range(5):
            await other.publish(event(number))
            assert numbers(await take(deliveries, 1, within=1.0)) == [number]
    await bus.close()
    await other.close()


async def test_a_single_write_is_noticed_again_when_it_is_sure_to_be_visible(tmp_path: Path) -> None:
    """The first notice comes while the writer is still at it; a look that came too early is made good."""
    log = tmp_path / "yard.db-wal"
    log.touch()
    noticed: list[float] = []
    watch = Watch(lambda: noticed.append(time.monotonic()))
    assert watch.start(tmp_path / "yard.db")
    handle = os.open(log, os.O_WRONLY)
    await asyncio.to_thread(os.write, handle, b"one write")
    await asyncio.sleep(0.2)
    os.close(handle)
    watch.stop()
    assert len(noticed) == 2
    assert noticed[1] - noticed[0] >= 0.003


@pytest.mark.slow
async def test_waiting_costs_next_to_nothing(bus: SqliteBus) -> None:
    async with bus.subscribe("g", TOPICS):
        await asyncio.sleep(0.5)
        before = time.process_time()
        await asyncio.sleep(3)
        assert time.process_time() - before < 0.09  # 3 % of one core


async def test_the_log_is_read_by_its_indexes(bus: SqliteBus) -> None:
    said: list[str] = []
    for number in range(20):
        await bus.publish(event(number))
    async with bus.subscribe("g", TOPICS) as deliveries:
        await take(deliveries, 3)
    await bus._file.read(lambda db: db.set_trace_callback(said.append))
    async with bus.subscribe("g", TOPICS) as deliveries:
        await take(deliveries, 17)
        await bus.publish(event(20))
        await take(deliveries, 1)
    await bus.read(["model.registered", "image.built"], "beginning")
    await bus.read([], "beginning")
    await bus._file.read(lambda db: db.set_trace_callback(None))
    queries = {q for q in said if q.startswith("SELECT offset")}
    assert len(queries) > 3

    def explain(db: sqlite3.Connection) -> list[str]:
        return [row[3] for q in queries for row in db.execute(f"EXPLAIN QUERY PLAN {q}")]

    for step in await bus._file.read(explain):
        assert step in ("SEARCH bus_log USING INTEGER PRIMARY KEY (rowid>?)",
                        "SEARCH bus_log USING INDEX bus_log_lanes (topic=? AND partition=? AND offset>? AND offset<?)")
