"""Consumer: events reach the handlers of a service, in order for each (topic, key), at least once.

    delivery → key parked? then behind it
             → handler → done, or done before (AlreadyApplied)            → ack
                       → Unavailable, Conflict: again, soon; then park    → ack
                       → any other refusal, or a fault that stays a fault → dead letter → ack

Keys run side by side; one that waits for its next attempt holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from ..core.errors import AlreadyApplied, Conflict, Invalid, ModelyardError, Unavailable
from ..core.events import Envelope
from ..ports.bus import Delivery, EventBus
from .dead import (
    DeadLetter,
    ParkedKey,
    Raw,
    bury,
    dead_letter,
    dead_letters,
    drop,
    is_parked,
    note_seen,
    park,
    replay,
)
from .observe import (
    CONSUMER_IN_FLIGHT,
    CONSUMER_OLDEST,
    HANDLER_SECONDS,
    PARKED_KEYS,
    RETRIES,
    Once,
    fields,
    in_service,
    trace_from,
)
from .service import Change, Context, Handler, Loop, Service

__all__ = ["DeadLetter", "ParkedKey", "consume", "dead_letter", "dead_letters", "drop", "parked_loop", "replay"]

log = logging.getLogger(__name__)
T = TypeVar("T")
PARALLEL = 16
AGAIN_S = (0.05, 0.2, 0.8)
"""Waits before the second, third and last attempt. An event that still meets a passing failure parks its key."""
HANDLER_S = 30.0
PARKED_FOR = timedelta(hours=24)
"""So long is a parked event tried again; then it becomes a dead letter."""


async def consume(ctx: Context, service: Service, bus: EventBus) -> None:
    """Runs until cancelled: the service's handlers get the events of their topics. Outages are waited out."""
    in_service(ctx.service)
    if not service.handlers:
        return
    said, wait = Once(), 0.1
    while True:
        try:
            async with bus.subscribe(service.name, tuple(service.handlers)) as deliveries:
                if said.clear("outage"):
                    log.info("receiving events again")
                wait = 0.1
                async with asyncio.TaskGroup() as tasks:
                    lanes = _Lanes(tasks, _Consumer(ctx, service).take)
                    async for delivery in deliveries:
                        lanes.add(delivery)
        except (Unavailable, Invalid) as exc:  # a topic that is there and wrong is put right by hand, like an outage
            if said.new("outage", exc):
                log.warning("no events arrive until this is over: %s", exc)
        except ExceptionGroup as group:
            outages, faults = group.split((Unavailable, Invalid))
            if faults is not None or outages is None:
                raise (faults or group) from None
            if said.new("outage", outages.exceptions[0]):  # of many that met the same, one says why
                log.warning("events cannot be handled until this is over: %s", outages.exceptions[0])
        await asyncio.sleep(wait)
        wait = min(wait * 2, 5.0)


class _Lanes:
    """One queue for each (topic, key) that has work; a task drains it in order and ends with it."""

    def __init__(self, tasks: asyncio.TaskGroup, take: Callable[[Delivery], Awaitable[None]]) -> None:
        self._tasks, self._take = tasks, take
        self._lanes: dict[tuple[str, str], deque[Delivery]] = {}

    def add(self, delivery: Delivery) -> None:
        key = (delivery.topic, delivery.key)
        lane = self._lanes.get(key)
        if lane is None:
            self._lanes[key] = lane = deque()
            self._tasks.create_task(self._drain(key, lane))
        lane.append(delivery)

    async def _drain(self, key: tuple[str, str], lane: deque[Delivery]) -> None:
        while lane:
            await self._take(lane[0])
            lane.popleft()
        del self._lanes[key]


class _Consumer:
    """What happens to one delivery."""

    def __init__(self, ctx: Context, service: Service) -> None:
        self.ctx, self.service = ctx, service
        self.slots = asyncio.Semaphore(PARALLEL)
        self.said = Once()

    async def take(self, delivery: Delivery) -> None:
        gauge = CONSUMER_IN_FLIGHT.labels(self.ctx.service)
        gauge.inc()
        try:
            await self._take(delivery)
            with contextlib.suppress(Unavailable):  # not taken: the event comes again and is a repeat
                await delivery.ack()
        finally:
            gauge.dec()

    async def _take(self, delivery: Delivery) -> None:
        raw = Raw.of(delivery)
        try:
            envelope = raw.envelope()
        except Invalid as exc:
            await self._insist(partial(bury, self.ctx, raw, None, exc, 0))
            self._report(raw, exc)
            return
        CONSUMER_OLDEST.labels(self.ctx.service).set(max(0.0, (datetime.now(UTC) - envelope.time).total_seconds()))
        with trace_from(envelope.traceparent):
            if not await self._insist(lambda: self._behind(delivery, raw, envelope)):
                await self._attempts(delivery, raw, envelope)

    async def _behind(self, delivery: Delivery, raw: Raw, envelope: Envelope) -> bool:
        """True when the key is parked and the event now waits behind it (or, behind a full one, is a dead letter)."""
        if not await is_parked(self.ctx, delivery):
            return False
        reason = Unavailable("earlier events of this key wait for a failure to pass")
        if await park(self.ctx, delivery, reason, behind=True):
            return True
        if not await is_parked(self.ctx, delivery):
            return False
        await bury(self.ctx, raw, envelope, Unavailable("too many events wait behind this key"), 0)
        return True

    async def _attempts(self, delivery: Delivery, raw: Raw, envelope: Envelope) -> None:
        handler, first = self.service.handlers[delivery.topic], self.ctx.now()
        for attempt in range(1, len(AGAIN_S) + 2):
            async with self.slots:
                error = await _call(self.ctx, handler, envelope)
            if error is None:
                await self._insist(lambda: note_seen(self.ctx, envelope))
                return
            last = attempt > len(AGAIN_S) or _permanent(error)
            if not last:
                RETRIES.labels(self.ctx.service, envelope.type).inc()
                await asyncio.sleep(AGAIN_S[attempt - 1])
                continue
            if _passing(error) and await self._insist(partial(park, self.ctx, delivery, error, behind=False)):
                log.warning("%s waits for a failure to pass: %s", delivery.key, error, extra=fields(topic=raw.topic))
                return
            await self._insist(partial(bury, self.ctx, raw, envelope, error, attempt, first))
            self._report(raw, error)
            return

    async def _insist(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Until the store takes it: nothing is acknowledged that is not safe somewhere."""
        wait = 0.1
        while True:
            try:
                result = await fn()
            except (Unavailable, Conflict) as exc:
                if self.said.new("store", exc):
                    log.warning("events wait for the store: %s", exc)
                await asyncio.sleep(wait)
                wait = min(wait * 2, 5.0)
            else:
                self.said.clear("store")
                return result

    def _report(self, raw: Raw, error: BaseException) -> None:
        log.error("dead letter: %s", error, extra=fields(topic=raw.topic, key=raw.key, origin=raw.origin),
                  exc_info=None if isinstance(error, ModelyardError) else error)


async def _call(ctx: Context, handler: Handler, envelope: Envelope) -> Exception | None:
    """One attempt. None: done, now or before."""
    began, outcome = time.monotonic(), "ok"
    try:
        async with asyncio.timeout(HANDLER_S):
            await handler(ctx, envelope)
        return None
    except AlreadyApplied:
        outcome = "repeat"
        return None
    except TimeoutError:
        outcome = "timeout"
        return Unavailable(f"the handler of {envelope.topic} did not end within {HANDLER_S:.0f} s")
    except Exception as exc:  # noqa: BLE001 - whatever a handler raises is classified, retried, kept: never lost
        outcome = getattr(exc, "code", "fault")
        return exc
    finally:
        HANDLER_SECONDS.labels(ctx.service, envelope.type, outcome).observe(time.monotonic() - began)


def _passing(error: Exception) -> bool:
    return isinstance(error, ModelyardError) and error.retryable


def _permanent(error: Exception) -> bool:
    return isinstance(error, ModelyardError) and not error.retryable


def parked_loop(service: Service) -> Loop:
    """The loop that tries parked keys again: 0.5 s after a failure, then twice as long each time, up to 60 s."""
    return Loop(name="parked", of=ParkedKey, step=partial(_retry_parked, service), lease_s=HANDLER_S)


async def _retry_parked(service: Service, ctx: Context, doc: ParkedKey) -> Change[ParkedKey]:
    """Handles the key's events in order until one fails; what is done leaves the key, an empty key goes."""
    done: set[str] = set()
    for raw in doc.events:
        error = await _one_parked(service, ctx, raw, doc)
        if error is not None and not done:
            raise error
        if error is not None:
            break
        done.add(raw.origin)

    def settle(newest: ParkedKey) -> tuple[ParkedKey, tuple[Any, ...]]:
        rest = [e for e in newest.events if e.origin not in done]
        return newest.evolve(events=rest, deleted=not rest, due=ctx.now(), updated=ctx.now()), ()

    return settle


async def _one_parked(service: Service, ctx: Context, raw: Raw, parked: ParkedKey) -> Exception | None:
    """None when the event is done with: handled, or a dead letter."""
    envelope, handler = raw.envelope(), service.handlers.get(raw.topic)
    if handler is None:
        error: Exception | None = Invalid(f"{service.name} no longer handles {raw.topic}", code="no-handler")
    else:
        with trace_from(envelope.traceparent):
            error = await _call(ctx, handler, envelope)
    if error is None:
        await note_seen(ctx, envelope)
        return None
    if _passing(error) and ctx.now() - parked.created < PARKED_FOR:
        RETRIES.labels(ctx.service, envelope.type).inc()
        return error
    await bury(ctx, raw, envelope, error, parked.attempts + 1, parked.created)
    log.error("dead letter: %s", error, extra=fields(topic=raw.topic, key=raw.key, origin=raw.origin))
    return None


async def count_parked(ctx: Context) -> None:
    """Keeps the gauge of parked keys (at most 1,000 are counted), every few seconds, until cancelled."""
    in_service(ctx.service)
    while True:
        try:
            keys = await ctx.store.find(ParkedKey, workspace=None, limit=1000)
            PARKED_KEYS.labels(ctx.service).set(len(keys))
        except Unavailable:
            pass  # the loops say so
        await asyncio.sleep(10.0)
