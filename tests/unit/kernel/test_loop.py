"""Loops: due work is leased, done once at a time, settled on the newest document, and tried again when it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, ClassVar

import pytest

from modelyard.core.documents import Document, rfc3339
from modelyard.core.errors import Conflict, Unavailable
from modelyard.core.events import Fact
from modelyard.kernel import loop as looping
from modelyard.kernel.loop import lease_end, run_loop
from modelyard.kernel.service import Change, Context, Loop
from tests.conftest import House, OpenHouse
from tests.faults import Faults
from tests.unit.kernel.test_relay import running, until


class Work(Document):
    kind: ClassVar[str] = "work"
    indexed: ClassVar[frozenset[str]] = frozenset({"phase"})
    phase: str = "queued"
    wish: int = 0
    done: int = 0
    note: str = ""


Step = Callable[[Context, Any], Awaitable[Change[Any]]]


def due(id: str = "w", **changes: Any) -> Work:
    return Work(id=id, due=datetime.now(UTC), **changes)


def ready(newest: Work) -> tuple[Work, Sequence[Fact]]:
    return newest.evolve(phase="ready", done=newest.done + 1), [Fact("image.built")]


def working(h: House, step: Step, **how: Any) -> AbstractAsyncContextManager[None]:
    ctx = how.pop("ctx", h.ctx)
    return running(run_loop(ctx, Loop("build", Work, step, **{"every_s": 0.05, **how}), h.wakes))


async def get(h: House, id: str = "w") -> Work:
    doc = await h.store.get(Work, id, tombstone=True)
    assert doc is not None
    return doc


async def is_done(h: House, times: int = 1, id: str = "w") -> bool:
    return (await get(h, id)).done >= times


async def test_due_work_is_done_once_and_settled_with_its_event(house: OpenHouse) -> None:
    seen: list[Work] = []

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        seen.append(doc)
        return ready

    async with house() as h:
        await h.ctx.commit(due("w"))
        await h.ctx.commit(due("v", workspace="w2"))
        await h.ctx.commit(Work(id="later", due=datetime.now(UTC) + timedelta(hours=1)))
        await h.ctx.commit(Work(id="never"))
        async with working(h, step):
            await until(lambda: is_done(h))
            await asyncio.sleep(0.3)
        doc = await get(h)
        assert (doc.phase, doc.lease, doc.due, doc.attempts, doc.generation) == ("ready", None, None, 0, 1)
        assert sorted(d.id for d in seen) == ["v", "w"]
        assert lease_end(seen[0]) == rfc3339(seen[0].due or datetime.now(UTC)) > rfc3339(datetime.now(UTC))
        assert [p.events[0].topic for p in await h.store.pending(9)] == ["image.built"] * 2


async def test_only_what_the_loop_asks_for(house: OpenHouse) -> None:
    seen = []

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        seen.append(doc.id)
        return ready

    async with house() as h:
        await h.ctx.commit(due("mine"))
        await h.ctx.commit(due("other", phase="ready"))
        async with working(h, step, where={"phase": "queued"}):
            await until(lambda: is_done(h, id="mine"))
            await asyncio.sleep(0.2)
    assert seen == ["mine"]


async def test_a_change_may_move_due_or_leave_everything(house: OpenHouse) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        if doc.id == "again":
            return lambda newest: (newest.evolve(due=later), ())
        if doc.id == "gone":
            return lambda newest: (newest.evolve(deleted=True), ())
        return lambda newest: None

    async with house() as h:
        for name in ("again", "gone", "same"):
            await h.ctx.commit(due(name))
        async with working(h, step):
            await until(lambda: _free(h, "again", "gone", "same"))
        assert (await get(h, "again")).due == later
        assert (await get(h, "same")).due is None
        assert (await get(h, "gone")).deleted


async def _free(h: House, *ids: str) -> bool:
    docs = [await get(h, id) for id in ids]
    return all(doc.lease is None and doc.revision > 1 for doc in docs)


async def test_a_wake_comes_before_the_look(house: OpenHouse) -> None:
    async def step(ctx: Context, doc: Work) -> Change[Work]:
        return ready

    async with house() as h, working(h, step, every_s=60.0):
        await asyncio.sleep(0.1)
        await h.ctx.commit(due())
        h.ctx.wake("build")
        await until(lambda: is_done(h), within=2)


async def test_no_more_than_parallel_at_once_and_all_in_the_end(house: OpenHouse) -> None:
    now, most = 0, 0

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return ready

    async with house() as h:
        for number in range(20):
            await h.ctx.commit(due(f"w{number}"))
        async with working(h, step, parallel=3, every_s=60.0):
            for number in range(20):
                await until(lambda id=f"w{number}": is_done(h, id=id))
    assert most == 3


@pytest.mark.slow
async def test_a_lease_keeps_others_away_and_is_renewed(house: OpenHouse) -> None:
    runs = 0

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        nonlocal runs
        runs += 1
        await asyncio.sleep(1.2)
        return ready

    async with house() as h, house() as other:
        await h.ctx.commit(due())
        async with working(h, step, lease_s=0.3), working(other, step, lease_s=0.3):
            await until(lambda: is_done(h))
            await asyncio.sleep(0.4)
        assert runs == 1 and (await get(h)).done == 1


async def test_two_processes_share_without_doubling(house: OpenHouse) -> None:
    seen: list[str] = []

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        seen.append(doc.id)
        await asyncio.sleep(0.001)
        return ready

    async with house() as h, house() as other:
        for number in range(40):
            await h.ctx.commit(due(f"w{number}"))
        async with working(h, step), working(other, step):
            for number in range(40):
                await until(lambda id=f"w{number}": is_done(h, id=id))
    assert sorted(seen) == sorted(f"w{n}" for n in range(40))


async def test_a_dead_holder_is_succeeded_when_its_lease_ends(house: OpenHouse) -> None:
    async def step(ctx: Context, doc: Work) -> Change[Work]:
        return ready

    async with house() as h:
        end = datetime.now(UTC) + timedelta(seconds=0.5)
        await h.ctx.commit(due().evolve(lease=f"dead {rfc3339(end)}", due=end))
        async with working(h, step):
            await until(lambda: is_done(h))
        assert datetime.now(UTC) >= end


async def test_a_stolen_lease_cancels_the_step(house: OpenHouse) -> None:
    cancelled = asyncio.Event()

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return ready

    async with house() as h:
        await h.ctx.commit(due())
        async with working(h, step, lease_s=0.3):
            await until(lambda: _leased(h))
            end = datetime.now(UTC) + timedelta(hours=1)
            await h.ctx.change(Work, "w", lambda d: (d.evolve(lease=f"thief {rfc3339(end)}", due=end), ()))
            async with asyncio.timeout(5):
                await cancelled.wait()
            await asyncio.sleep(0.1)
        doc = await get(h)
        assert doc.lease and doc.lease.startswith("thief ") and doc.done == 0


async def _leased(h: House) -> bool:
    return (await get(h)).lease is not None


async def test_a_step_that_lost_its_lease_settles_nothing(house: OpenHouse) -> None:
    async def step(ctx: Context, doc: Work) -> Change[Work]:
        end = datetime.now(UTC) + timedelta(hours=1)
        await ctx.change(Work, "w", lambda d: (d.evolve(lease=f"thief {rfc3339(end)}", due=end), ()))
        return ready

    async with house() as h:
        await h.ctx.commit(due())
        async with working(h, step):
            await asyncio.sleep(0.4)
        assert (await get(h)).done == 0


async def test_the_outcome_is_applied_to_the_newest_document(house: OpenHouse) -> None:
    async def step(ctx: Context, doc: Work) -> Change[Work]:
        for number in range(5):
            await ctx.change(Work, "w", lambda d, n=number: (d.evolve(note=f"user {n}"), ()))
        return ready

    async with house() as h:
        await h.ctx.commit(due())
        async with working(h, step, lease_s=0.3):
            await until(lambda: is_done(h))
        assert (await get(h)).note == "user 4"


@pytest.mark.slow
async def test_a_wish_during_a_step_is_not_lost(house: OpenHouse) -> None:
    """A caller moves ``due`` while a step runs: the step is not disturbed, and the loop looks again."""
    seen: list[int] = []
    started, go = asyncio.Event(), asyncio.Event()

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        seen.append(doc.wish)
        started.set()
        await go.wait()
        return ready

    async with house() as h, house() as other:
        await h.ctx.commit(due())
        async with working(h, step, lease_s=0.4):
            await started.wait()
            await h.ctx.change(Work, "w", lambda d: (d.evolve(wish=1, due=datetime.now(UTC)), ()))
            async with working(other, step, lease_s=0.4):
                await asyncio.sleep(1.0)  # nobody else takes it, renewals go over the wish
            assert seen == [0]
            go.set()
            await until(lambda: is_done(h, 2))
            await asyncio.sleep(0.2)
        assert seen == [0, 1] and (await get(h)).due is None


async def test_failures_wait_longer_each_time_and_are_said_once(house: OpenHouse, caplog: pytest.LogCaptureFixture,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looping, "FIRST_BACKOFF_S", 0.05)
    times: list[float] = []

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        times.append(asyncio.get_running_loop().time())
        assert doc.attempts == len(times) - 1
        if len(times) <= 3:
            raise RuntimeError("no luck")
        if len(times) == 4:
            raise Unavailable("the peer is away")
        return ready

    async with house() as h:
        await h.ctx.commit(due())
        async with working(h, step, every_s=0.01):
            await until(lambda: is_done(h))
        assert (await get(h)).attempts == 0
    waits = [b - a for a, b in pairwise(times)]
    assert all(wait >= 0.8 * 0.05 * 2 ** n for n, wait in enumerate(waits))
    said = [r.getMessage() for r in caplog.records]
    assert said == ["loop build will try 'w' again: no luck", "loop build will try 'w' again: the peer is away"]


async def test_the_wait_is_bounded(house: OpenHouse) -> None:
    async def step(ctx: Context, doc: Work) -> Change[Work]:
        raise RuntimeError("no luck")

    async with house() as h:
        await h.ctx.commit(due(attempts=40))
        async with working(h, step, max_backoff_s=7.0):
            await until(lambda: _attempts(h, 41))
        doc = await get(h)
        assert doc.due and doc.lease is None
        assert 5.0 < (doc.due - datetime.now(UTC)).total_seconds() < 9.0


async def _attempts(h: House, number: int) -> bool:
    return (await get(h)).attempts >= number


async def test_a_change_that_fails_is_a_failed_step(house: OpenHouse) -> None:
    async def step(ctx: Context, doc: Work) -> Change[Work]:
        def broken(newest: Work) -> Any:
            raise KeyError("phase")
        return ready if doc.attempts else broken

    async with house() as h:
        await h.ctx.commit(due())
        async with working(h, step):
            await until(lambda: is_done(h))


async def test_a_step_that_cancels_itself_is_a_failed_step(house: OpenHouse) -> None:
    async def step(ctx: Context, doc: Work) -> Change[Work]:
        if not doc.attempts:
            raise asyncio.CancelledError
        return ready

    async with house() as h:
        await h.ctx.commit(due())
        async with working(h, step):
            await until(lambda: is_done(h))


async def test_a_clean_stop_gives_the_lease_back_and_leaves_no_task(house: OpenHouse) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        began.set()
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()
        return ready

    async with house() as h:
        await h.ctx.commit(due())
        before = asyncio.all_tasks()
        async with working(h, step):
            await until(lambda: _leased(h))
            await asyncio.wait_for(began.wait(), 5)
        assert ended.is_set() and asyncio.all_tasks() == before
        doc = await get(h)
        assert doc.lease is None and doc.due and doc.due <= datetime.now(UTC)


@pytest.mark.parametrize(("method", "error"), [
    ("find", Unavailable("away")), ("get", Unavailable("away")), ("commit", Unavailable("away")),
    ("commit", Conflict("stale")),
])
@pytest.mark.parametrize("after", [False, True])
async def test_a_store_that_fails_costs_time_only(house: OpenHouse, method: str, error: Exception, after: bool,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looping, "FIRST_BACKOFF_S", 0.05)
    faults = Faults()
    runs = 0

    async def step(ctx: Context, doc: Work) -> Change[Work]:
        nonlocal runs
        runs += 1
        return ready

    async with house() as h:
        for number in range(3):
            await h.ctx.commit(due(f"w{number}"))
        faults.plan(method, error, at=2, times=4, after=after)
        ctx = replace(h.ctx, store=faults.around(h.store))
        async with working(h, step, ctx=ctx, lease_s=0.5, parallel=2):
            for number in range(3):
                await until(lambda id=f"w{number}": is_done(h, id=id))
            await asyncio.sleep(0.1)
        for number in range(3):
            doc = await get(h, f"w{number}")
            assert (doc.done, doc.lease) == (1, None)


async def test_an_outage_is_said_once(house: OpenHouse, caplog: pytest.LogCaptureFixture) -> None:
    async def step(ctx: Context, doc: Work) -> Change[Work]:
        return ready

    faults = Faults()
    async with house() as h:
        faults.plan("find", Unavailable("the store is away"), times=5)
        await h.ctx.commit(due())
        async with working(h, step, ctx=replace(h.ctx, store=faults.around(h.store)), every_s=0.01):
            await until(lambda: is_done(h))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


async def test_what_is_another_processs_is_left_alone(house: OpenHouse) -> None:
    """No lease is taken for it, and it does not fill the places of what is ours."""
    async def step(ctx: Context, doc: Any) -> Change[Any]:
        return ready

    async with house() as h:
        for n in range(6):
            await h.store.commit(due(f"theirs-{n}", note="theirs"))
        await h.store.commit(due("ours"))
        async with working(h, step, parallel=2, mine=lambda ctx, doc: doc.note != "theirs"):
            await until(lambda: is_done(h, id="ours"))
        assert {(await get(h, f"theirs-{n}")).revision for n in range(6)} == {1}
