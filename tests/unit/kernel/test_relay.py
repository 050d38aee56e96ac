"""Relay: what was committed reaches the bus, in order, through every failure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from modelyard.adapters import store_sqlite
from modelyard.core.documents import Document
from modelyard.core.errors import Invalid, Unavailable
from modelyard.core.events import Fact
from modelyard.kernel.relay import relay
from tests.conftest import House, OpenHouse
from tests.faults import Faults


class Plant(Document):
    kind: ClassVar[str] = "plant"
    height: int = 0


@asynccontextmanager
async def running(*work: Awaitable[Any]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results), results


async def until(condition: Callable[[], Awaitable[Any]], within: float = 10.0) -> Any:
    async with asyncio.timeout(within):
        while not (value := await condition()):
            await asyncio.sleep(0.005)
    return value


async def grow(h: House, name: str, times: int) -> None:
    doc = await h.ctx.commit(Plant(id=name), Fact("model.registered"))
    for height in range(1, times):
        doc = await h.ctx.commit(doc.evolve(height=height), Fact("model.updated"))


async def published(h: House) -> list[tuple[str, int]]:
    records, _ = await h.bus.read([], "beginning", limit=10_000)
    return [(e.subject, int(e.sequence)) for _, e in records]


async def test_committed_events_are_published_in_order_and_leave_the_outbox(house: OpenHouse) -> None:
    async with house() as h, running(relay(h.ctx, h.bus)):
        await asyncio.gather(*(grow(h, f"p{n}", 10) for n in range(8)))
        await until(lambda: _empty(h))
        found = await published(h)
    for n in range(8):
        assert [s for name, s in found if name == f"p{n}"] == list(range(1, 11))


async def _empty(h: House) -> bool:
    return not await h.store.pending(1)


async def test_a_commit_is_published_at_once(house: OpenHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_sqlite, "POLL_S", 30.0)
    async with house() as h, running(relay(h.ctx, h.bus)):
        await asyncio.sleep(0.1)
        await grow(h, "p", 1)
        await until(lambda: published(h), within=2)


async def test_what_another_process_committed_and_left_is_published(house: OpenHouse) -> None:
    async with house() as h, house() as other, running(relay(h.ctx, h.bus)):
        await asyncio.sleep(0.1)
        await grow(other, "p", 1)
        await until(lambda: published(h), within=2)


@pytest.mark.slow
async def test_an_outage_is_waited_out_and_said_once(house: OpenHouse, caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()

    async def told() -> bool:
        return len(caplog.records) >= 2  # the end is told once the outbox is empty

    async with house() as h:
        faults.plan("publish", Unavailable("the bus is away"), times=4)
        with caplog.at_level(logging.INFO, "modelyard.kernel.relay"):
            async with running(relay(h.ctx, faults.around(h.bus))):
                await grow(h, "p", 5)
                await until(lambda: _empty(h))
                await until(told)
        assert await published(h) == [("p", n) for n in range(1, 6)]
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert "the bus is away" in caplog.records[0].getMessage()


async def test_published_but_not_told_is_published_again(house: OpenHouse) -> None:
    faults = Faults()
    async with house() as h:
        faults.plan("publish", Unavailable("who knows"), at=2, after=True)
        async with running(relay(h.ctx, faults.around(h.bus))):
            await grow(h, "p", 3)
            await until(lambda: _empty(h))
        records, _ = await h.bus.read([], "beginning")
    assert [int(e.sequence) for _, e in records] == [1, 2, 2, 3]
    assert len({e.id for _, e in records}) == 3


async def test_a_store_that_fails_after_publishing_costs_repeats_only(house: OpenHouse) -> None:
    faults = Faults()
    async with house() as h:
        faults.plan("sent", Unavailable("the store is away"), times=2)
        async with running(relay(replace(h.ctx, store=faults.around(h.store)), h.bus)):
            await grow(h, "p", 1)
            await until(lambda: _empty(h))
        assert await published(h) == [("p", 1)] * 3


async def test_two_relays_lose_nothing(house: OpenHouse) -> None:
    async with house() as h, house() as other:
        async with running(relay(h.ctx, h.bus), relay(other.ctx, other.bus)):
            await asyncio.gather(*(grow(h, f"p{n}", 10) for n in range(8)))
            await until(lambda: _empty(h))
        found = await published(h)
    for n in range(8):
        seen = [s for name, s in found if name == f"p{n}"]
        assert list(dict.fromkeys(seen)) == list(range(1, 11))


async def test_an_event_that_the_bus_refuses_holds_up_no_other(house: OpenHouse, monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    async with house() as h:
        await grow(h, "bad", 1)
        faults.plan("publish", Invalid("too large for this bus"))
        async with running(relay(h.ctx, faults.around(h.bus))):
            await asyncio.sleep(0.05)
            await grow(h, "good", 2)
            await until(lambda: _empty(h))
        assert sorted(await published(h)) == [("bad", 1), ("good", 1), ("good", 2)]
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == [
        "the bus refuses an event: too large for this bus"]
