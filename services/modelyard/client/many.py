"""The two faces of ``infer_many``: an async one, and one for a thread that waits. Items in, results out, in order."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..core.errors import Invalid, ModelyardError, Unavailable
from .faces import LOOK_S, Portal
from .inputs import Encoder, Inputs, Outputs, read_streamed
from .joining import Joined, Joiner, split
from .pipeline import CLOSED, Pipeline, Plan, Slot

OnError = Literal["raise", "return"]
Result = Outputs | ModelyardError
Opened = Callable[[Plan, Callable[[], None]], Pipeline]
Declared = dict[str, str]


@dataclass(frozen=True)
class Many:
    """One ``infer_many``: how items become slots, and slots results."""

    plan: Plan
    encoder: Encoder
    on_error: OnError
    request_id: str
    address: str
    join_rows: int = 1

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "return"):
            raise Invalid(f"on_error is '{self.on_error}'; write raise or return", field="on_error")
        if self.plan.in_flight < 1:
            raise Invalid("in_flight must be 1 or more", field="in_flight")
        if self.join_rows < 1:
            raise Invalid("join_rows must be 1 or more", field="join_rows")

    def results(self, slot: Slot) -> Iterator[Result]:
        """Of one message: the results of its items. Raises an item's error, or gives it back, as the caller wants."""
        parts = slot.parts if isinstance(slot, Joined) else [([], 1)]
        error = slot.error
        if error is None:
            try:
                outputs = read_streamed(slot.answer, self.address)
                yield from [outputs] if len(parts) == 1 else split(outputs, parts)
                return
            except ModelyardError as exc:
                error = exc
        for n in range(len(parts)):
            own = type(error)(error.message, code=error.code, **{**error.detail, "item": slot.index + n})
            if self.on_error == "raise" or slot.fatal:
                raise own from slot.error
            yield own

    async def over(self, items: Iterable[Inputs] | AsyncIterable[Inputs], open_: Opened,
                   declared: Callable[[Inputs], Awaitable[Declared]]) -> AsyncIterator[Result]:
        """The async face. The items are taken by a task of their own: no result waits for the next item."""
        joiner = Joiner(self.encoder, self.join_rows, self.request_id)
        feed = _Feed(self.plan, joiner, open_)
        feeder = asyncio.create_task(feed.all(items, declared))
        feeder.add_done_callback(lambda _: feed.told.set())
        try:
            while True:
                while (slot := feed.take()) is not None:
                    for result in self.results(slot):
                        yield result
                if not feed.window and feeder.done():
                    break
                await feed.wait()
            feeder.result()
            await feed.pipeline.close(drained=True)
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            await feed.pipeline.close()

    def waited(self, items: Iterable[Inputs], portal: Portal, open_: Opened,
               declared: Callable[[Inputs], Declared]) -> Iterator[Result]:
        """The blocking face. Items are taken, and made into requests, by the thread that waits for the results."""
        told = threading.Event()
        window: deque[Slot] = deque()
        joiner = Joiner(self.encoder, self.join_rows, self.request_id)
        source = _Source(iter(items), joiner, declared)

        async def opened() -> Pipeline:
            return open_(self.plan, told.set)

        pipeline = portal.run(opened())
        drained = False
        try:
            while True:
                if window and window[0].done:
                    slot = window.popleft()
                    again = joiner.apart(slot)
                    window.extendleft(reversed(again))
                    for one in again:
                        pipeline.submit_from_thread(one)
                    if not again:
                        yield from self.results(slot)
                elif len(window) < self.plan.in_flight and (made := source.next()) is not None:
                    window.append(made)
                    if not made.done:
                        pipeline.submit_from_thread(made)
                elif window:
                    told.clear()
                    while not window[0].done and not told.wait(LOOK_S):
                        if not portal.open:  # by another thread, with this message on its way there
                            raise Unavailable(CLOSED)
                else:
                    break
            drained = True
            if source.failure is not None:
                raise source.failure
        finally:
            if portal.open:
                portal.run(pipeline.close(drained))


class _Feed:
    """Messages under way, the oldest first, and the task that makes them."""

    def __init__(self, plan: Plan, joiner: Joiner, open_: Opened) -> None:
        self.told, self._room = asyncio.Event(), asyncio.Event()
        self.window: deque[Slot] = deque()
        self.pipeline = open_(plan, self.told.set)
        self._most, self._joiner = plan.in_flight, joiner

    async def all(self, items: Iterable[Inputs] | AsyncIterable[Inputs],
                  declared: Callable[[Inputs], Awaitable[Declared]]) -> None:
        """Raises what ``items`` raises, behind what came before it."""
        failure: Exception | None = None
        try:
            async with contextlib.aclosing(each(items)) as source:
                async for item in source:
                    for slot in self._joiner.add(item, await declared(item)):
                        await self._put(slot)
        except Exception as exc:  # noqa: BLE001 - raised again below
            failure = exc
        for slot in self._joiner.rest():
            await self._put(slot)
        if failure is not None:
            raise failure

    async def _put(self, slot: Slot) -> None:
        self.window.append(slot)
        if slot.done:
            self.told.set()
        else:
            self.pipeline.submit(slot)
        while len(self.window) >= self._most:
            self._room.clear()
            await self._room.wait()

    def take(self) -> Slot | None:
        """The oldest message if it is done; a joined one that failed is sent again item by item instead."""
        while self.window and self.window[0].done:
            slot = self.window.popleft()
            again = self._joiner.apart(slot)
            if not again:
                if len(self.window) <= self._most // 2:
                    self._room.set()
                return slot
            self.window.extendleft(reversed(again))
            for one in again:
                self.pipeline.submit(one)
        return None

    async def wait(self) -> None:
        """Until there may be something to take."""
        self._room.set()
        self.told.clear()
        if not (self.window and self.window[0].done):
            await self.told.wait()


class _Source:
    """Messages of an iterable. What it raises is kept until the results of what came before it are given back."""

    def __init__(self, items: Iterator[Inputs], joiner: Joiner, declared: Callable[[Inputs], Declared]) -> None:
        self.failure: Exception | None = None
        self._slots = self._all(items, joiner, declared)

    def next(self) -> Slot | None:
        """None: there are no more."""
        return next(self._slots, None)

    def _all(self, items: Iterator[Inputs], joiner: Joiner, declared: Callable[[Inputs], Declared]) -> Iterator[Slot]:
        try:
            for item in items:
                yield from joiner.add(item, declared(item))
        except Exception as exc:  # noqa: BLE001 - raised again, by whoever gives back the results
            self.failure = exc
        yield from joiner.rest()


async def each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    """The items of either kind."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def seconds(name: str, value: float) -> float:
    """Raises Invalid for what is no time to wait."""
    if not 0 < value < math.inf:
        raise Invalid(f"{name} must be seconds, more than 0", field=name)
    return float(value)
