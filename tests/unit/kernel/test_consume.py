"""Consumer: every event handled once in effect, in order for its key; what cannot be handled is kept."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, ClassVar

import pytest

from modelyard.core.documents import Document
from modelyard.core.errors import Conflict, Invalid, NotFound, Unavailable
from modelyard.core.events import Envelope
from modelyard.kernel import consume as consuming
from modelyard.kernel.consume import DeadLetter, ParkedKey, dead_letter, dead_letters, drop, replay
from modelyard.kernel.dead import Raw, Seen, seen_id
from modelyard.kernel.observe import CONSUMER_IN_FLIGHT, current_trace_id
from modelyard.kernel.run import run_service
from modelyard.kernel.service import Context, Service
from modelyard.ports.bus import Delivery
from tests.conftest import House, OpenHouse
from tests.contract.bus_worker import event
from tests.faults import Faults
from tests.unit.kernel.test_relay import running, until


class Tally(Document):
    kind: ClassVar[str] = "tally"
    count: int = 0
    last: int = -1


class Plan:
    """A handler that counts each event in its subject's Tally, after failing as it is told."""

    def __init__(self) -> None:
        self.fail: dict[int, list[Exception]] = defaultdict(list)
        self.calls: list[int] = []
        self.gate: dict[str, asyncio.Event] = {}
        self.trace: str | None = None

    async def handle(self, ctx: Context, envelope: Envelope) -> None:
        number = envelope.data["n"]
        self.calls.append(number)
        self.trace = current_trace_id()
        if (gate := self.gate.get(envelope.subject)) is not None:
            await gate.wait()
        if self.fail[number]:
            raise self.fail[number].pop(0)
        doc = await ctx.store.get(Tally, envelope.subject) or Tally(id=envelope.subject)
        await ctx.commit(doc.evolve(count=doc.count + 1, last=number), cause=envelope.id)

    def service(self) -> Service:
        return Service("registry", (Tally,), (), lambda ctx: (), {
            "model.registered": self.handle, "model.updated": self.handle})


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(consuming, "AGAIN_S", (0.01, 0.02, 0.04))
    return Plan()


def serving(h: House, plan: Plan, **changed: Any) -> AbstractAsyncContextManager[None]:
    return running(run_service(replace(h.ctx, **changed), plan.service(), h.bus, h.wakes))


async def count(h: House, subject: str) -> int:
    doc = await h.store.get(Tally, subject)
    return doc.count if doc else 0


async def reaches(h: House, subject: str, number: int) -> None:
    async def there() -> bool:
        return await count(h, subject) >= number
    await until(there)


async def letters(h: House, number: int) -> list[DeadLetter]:
    async def there() -> list[DeadLetter]:
        found = await dead_letters(h.store)
        return found if len(found) >= number else []
    found: list[DeadLetter] = await until(there)
    return found


async def idle() -> bool:
    """Nothing is taken that is not acknowledged."""
    return not [s for m in CONSUMER_IN_FLIGHT.collect() for s in m.samples if s.value]


async def acked(h: House) -> bool:
    """Nothing is left for the group."""
    async with h.bus.subscribe("registry", ["model.registered", "model.updated"]) as deliveries:
        try:
            async with asyncio.timeout(0.2):
                await anext(deliveries)
        except TimeoutError:
            return True
    return False


async def test_each_event_has_its_effect_once_and_in_order(house: OpenHouse, plan: Plan) -> None:
    async with house() as h:
        for number in range(60):
            await h.bus.publish(event(number, key=f"k{number % 6}"))
        async with serving(h, plan):
            for key in range(6):
                await reaches(h, f"k{key}", 10)
            await until(idle)
        assert [await count(h, f"k{key}") for key in range(6)] == [10] * 6
        for key in range(6):
            lane = [n for n in plan.calls if n % 6 == key]
            assert lane == sorted(lane)
        assert await acked(h)


async def test_a_repeat_of_an_event_changes_nothing(house: OpenHouse, plan: Plan) -> None:
    first = event(1, key="k")
    async with house() as h, serving(h, plan):
        await h.bus.publish(first)
        await h.bus.publish(event(2, key="k"))
        await h.bus.publish(first)
        await h.bus.publish(event(3, key="k"))
        await reaches(h, "k", 3)
        doc = await h.store.get(Tally, "k")
        assert doc is not None and (doc.count, doc.last) == (3, 3)
        assert plan.calls == [1, 2, 1, 3]
        assert await dead_letters(h.store) == []


async def test_the_trace_of_an_event_goes_on_in_its_handler(house: OpenHouse, plan: Plan) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with house() as h, serving(h, plan):
        await h.bus.publish(event(1, key="k").model_copy(update={"traceparent": parent}))
        await reaches(h, "k", 1)
    assert plan.trace == "0af7651916cd43dd8448eb211c80319c"


async def test_a_slow_key_holds_up_no_other(house: OpenHouse, plan: Plan) -> None:
    plan.gate["slow"] = asyncio.Event()
    async with house() as h, serving(h, plan):
        await h.bus.publish(event(1, key="slow"))
        for number in range(2, 30):
            await h.bus.publish(event(number, key="quick"))
        await reaches(h, "quick", 28)
        assert await count(h, "slow") == 0
        plan.gate["slow"].set()
        await reaches(h, "slow", 1)


@pytest.mark.parametrize("error", [Unavailable("away"), Conflict("stale"), RuntimeError("odd")])
async def test_a_failure_that_passes_is_not_seen(house: OpenHouse, plan: Plan, error: Exception) -> None:
    plan.fail[1] = [error] * 3
    async with house() as h, serving(h, plan):
        await h.bus.publish(event(1, key="k"))
        await h.bus.publish(event(2, key="k"))
        await reaches(h, "k", 2)
        assert plan.calls == [1, 1, 1, 1, 2]
        assert await dead_letters(h.store) == [] == await h.store.find(ParkedKey)


@pytest.mark.slow
async def test_a_lasting_outage_parks_the_key_and_only_it(house: OpenHouse, plan: Plan) -> None:
    plan.fail[1] = [Unavailable("the peer is away")] * 6
    async with house() as h, serving(h, plan):
        for number in (1, 2, 3):
            await h.bus.publish(event(number, key="k"))
        await h.bus.publish(event(4, key="other"))
        await reaches(h, "other", 1)
        (parked,) = await until(lambda: h.store.find(ParkedKey))
        assert (parked.topic, parked.key) == ("model.registered", "default/k")
        assert "the peer is away" in parked.error
        await h.bus.publish(event(5, key="k"))
        await reaches(h, "k", 4)
        await until(lambda: _no_parked(h))
    order = list(dict.fromkeys(n for n in plan.calls if n != 4))
    assert order == [1, 2, 3, 5]


async def _no_parked(h: House) -> bool:
    return not await h.store.find(ParkedKey)


async def test_parked_events_survive_a_restart(house: OpenHouse, plan: Plan) -> None:
    plan.fail[1] = [Unavailable("away")] * 1000
    async with house() as h:
        async with serving(h, plan):
            for number in (1, 2, 3):
                await h.bus.publish(event(number, key="k"))
            await until(lambda: h.store.find(ParkedKey))
            await until(idle)
        assert await acked(h)
        plan.fail.clear()
        async with serving(h, plan):
            await reaches(h, "k", 3)
    assert list(dict.fromkeys(plan.calls)) == [1, 2, 3]


async def test_a_parked_event_that_turns_out_wrong_frees_the_key(house: OpenHouse, plan: Plan) -> None:
    plan.fail[1] = [Unavailable("away")] * 4 + [Invalid("no such field")]
    async with house() as h, serving(h, plan):
        await h.bus.publish(event(1, key="k"))
        await h.bus.publish(event(2, key="k"))
        await reaches(h, "k", 1)
        (letter,) = await letters(h, 1)
        assert letter.subject == "k" and "no such field" in letter.message
        await until(lambda: _no_parked(h))


@pytest.mark.parametrize(("error", "calls"), [
    (Invalid("no such field"), 1), (NotFound("gone"), 1), (RuntimeError("a fault"), 4)])
async def test_what_cannot_be_handled_is_kept_whole(house: OpenHouse, plan: Plan, error: Exception, calls: int,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    plan.fail[1] = [error] * 9
    envelope = event(1, key="k")
    async with house() as h, serving(h, plan):
        await h.bus.publish(envelope)
        await h.bus.publish(event(2, key="k"))
        await reaches(h, "k", 1)
        (letter,) = await letters(h, 1)
        assert plan.calls.count(1) == calls == letter.attempts_made
        assert letter.event.data() == envelope.encode()
        assert (letter.topic, letter.key, letter.group) == ("model.registered", "default/k", "registry")
        assert (letter.event_id, letter.subject) == (envelope.id, "k")
        assert letter.event.origin.startswith("model.registered[")
        assert str(error) in letter.message and letter.first_failed <= letter.last_failed
    assert [r for r in caplog.records if r.levelno == logging.ERROR]


class Poison(Envelope):
    """Lies on the bus as these bytes."""

    raw: bytes = b""

    def encode(self) -> bytes:
        return self.raw


@pytest.mark.parametrize("raw", [
    b"", b"not json", b"[]", b"\xff\xfe\x00", b'{"specversion": "1.0"}',
    event(1).encode().replace(b"model.registered.v1", b"model.registered.v9"),
    event(1).encode().replace(b"model.registered.v1", b"model.unheard.v1"),
])
async def test_a_poisoned_record_is_kept_and_passed(house: OpenHouse, plan: Plan, raw: bytes) -> None:
    poison = Poison.model_validate({**event(1, key="k").model_dump(), "raw": raw})
    async with house() as h:
        async with serving(h, plan):
            await h.bus.publish(poison)
            await h.bus.publish(event(2, key="k"))
            await reaches(h, "k", 1)
            (letter,) = await letters(h, 1)
            assert letter.event.data() == raw
            assert (letter.attempts_made, letter.error) == (0, "invalid")
            with pytest.raises(Invalid):
                await replay(h.ctx, plan.service(), letter.id)
            await drop(h.ctx, letter.id)
            assert await dead_letters(h.store) == []
            await until(idle)
        assert await acked(h)


async def test_a_dead_letter_is_made_once_however_often_its_event_comes(house: OpenHouse, plan: Plan) -> None:
    plan.fail[1] = [Invalid("wrong")] * 9
    envelope = event(1, key="k")
    async with house() as h, serving(h, plan):
        for _ in range(3):
            await h.bus.publish(envelope)
        await h.bus.publish(event(2, key="k"))
        await reaches(h, "k", 1)
        (letter,) = await letters(h, 1)
        year_31 = datetime(2031, 1, 1, tzinfo=UTC)
        await drop(replace(h.ctx, now=lambda: year_31), letter.id)
        gone = await h.store.get(DeadLetter, letter.id, tombstone=True)
        assert gone is not None and gone.updated == year_31, "the clock is the context's"
        await h.bus.publish(envelope)
        await h.bus.publish(event(3, key="k"))
        await reaches(h, "k", 2)
        assert await dead_letters(h.store) == []
        with pytest.raises(NotFound):
            await drop(h.ctx, letter.id)


async def test_replay_applies_once(house: OpenHouse, plan: Plan) -> None:
    plan.fail[1] = [Invalid("wrong"), Invalid("still wrong"), RuntimeError("odd")]
    async with house() as h, serving(h, plan):
        await h.bus.publish(event(1, key="k"))
        (letter,) = await letters(h, 1)
        with pytest.raises(Invalid, match="still wrong"):
            await replay(h.ctx, plan.service(), letter.id)
        with pytest.raises(Invalid, match="odd"):
            await replay(h.ctx, plan.service(), letter.id)
        assert (await dead_letter(h.store, letter.id)).attempts_made == 3
        assert await replay(h.ctx, plan.service(), letter.id) == "applied"
        assert await count(h, "k") == 1
        with pytest.raises(NotFound):
            await replay(h.ctx, plan.service(), letter.id)


async def test_replaying_what_newer_events_have_overtaken_is_superseded(house: OpenHouse, plan: Plan) -> None:
    plan.fail[1] = [Invalid("wrong")]
    async with house() as h, serving(h, plan):
        await h.bus.publish(event(1, key="k"))
        (letter,) = await letters(h, 1)
        await h.bus.publish(event(2, key="k", topic="model.updated"))
        await reaches(h, "k", 1)
        await until(lambda: _seen(h, 2))
        assert await replay(h.ctx, plan.service(), letter.id) == "superseded"
        assert await count(h, "k") == 1
        assert await dead_letters(h.store) == []


async def _seen(h: House, number: int) -> bool:
    seen = await h.store.get(Seen, seen_id(event(number, key="k")))
    return seen is not None and seen.newest >= number


@pytest.mark.slow
@pytest.mark.parametrize("method", ["get", "commit"])
@pytest.mark.parametrize("after", [False, True])
async def test_an_outage_of_the_store_loses_nothing(house: OpenHouse, plan: Plan, method: str, after: bool) -> None:
    faults = Faults()
    plan.fail[3] = [Invalid("wrong")] * 99
    async with house() as h:
        faults.plan(method, Unavailable("the store is away"), at=3, times=5, after=after)
        for number in range(1, 9):
            await h.bus.publish(event(number, key="k"))
        async with serving(h, plan, store=faults.around(h.store)):
            await reaches(h, "k", 7)
            await letters(h, 1)
        doc = await h.store.get(Tally, "k")
        assert doc is not None and (doc.count, doc.last) == (7, 8)


async def test_an_outage_of_the_bus_is_waited_out(house: OpenHouse, plan: Plan,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    async with house() as h:
        faults.plan("subscribe", Unavailable("the bus is away"), times=3)
        await h.bus.publish(event(1, key="k"))
        async with running(run_service(h.ctx, plan.service(), faults.around(h.bus), h.wakes)):
            await reaches(h, "k", 1)
    assert sum("the bus is away" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.slow
async def test_a_handler_that_never_ends_is_given_up(house: OpenHouse, plan: Plan,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming, "HANDLER_S", 0.05)
    plan.gate["k"] = asyncio.Event()
    async with house() as h, serving(h, plan):
        await h.bus.publish(event(1, key="k"))
        await until(lambda: h.store.find(ParkedKey))
        plan.gate["k"].set()
        await reaches(h, "k", 1)


async def test_a_full_parked_key_keeps_what_comes_as_dead_letters(house: OpenHouse, plan: Plan,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelyard.kernel.dead.MAX_PARKED", 3)
    plan.fail[1] = [Unavailable("away")] * 1000
    async with house() as h, serving(h, plan):
        for number in range(1, 7):
            await h.bus.publish(event(number, key="k"))
        kept = await letters(h, 3)
        assert sorted(Envelope.decode(x.event.data()).data["n"] for x in kept) == [4, 5, 6]
        (parked,) = await h.store.find(ParkedKey)
        assert [raw.envelope().data["n"] for raw in parked.events] == [1, 2, 3]


async def test_stopping_leaves_no_task(house: OpenHouse, plan: Plan) -> None:
    plan.gate["k"] = asyncio.Event()
    async with house() as h:
        before = asyncio.all_tasks()
        async with serving(h, plan):
            await h.bus.publish(event(1, key="k"))
            await until(lambda: _called(plan))
        assert asyncio.all_tasks() == before
        plan.gate.clear()
        async with serving(h, plan):  # and the event comes again
            await reaches(h, "k", 1)


async def _called(plan: Plan) -> bool:
    return bool(plan.calls)


def test_raw_keeps_bytes_that_are_no_text() -> None:
    async def ack() -> None: ...

    for data in (b"text \xc3\xbc", b"\xff\x00"):
        raw = Raw.of(Delivery("model.registered", "default/k", data, "here", ack))
        assert Raw.model_validate_json(raw.model_dump_json()).data() == data
