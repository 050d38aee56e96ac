"""The two faces of ``infer_many``: an async one, and one for a thread that waits. Items in, results out, in order."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..core.errors import Invalid, ModelyardError
from .faces import Portal
from .inputs import Encoder, Inputs, Outputs, read_streamed
from .pipeline import Pipeline, Plan, Slot

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

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "return"):
            raise Invalid(f"on_error is '{self.on_error}'; write raise or return", field="on_error")
        if self.plan.in_flight < 1:
            raise Invalid("in_flight must be 1 or more", field="in_flight")

    def slot(self, index: int, item: Inputs, declared: Declared) -> Slot:
        """An item that cannot be sent is done already."""
        try:
            return Slot(index, self.encoder.encode(
                item, declared, f"{self.request_id}/{index}" if self.request_id else ""))
        except ModelyardError as exc:
            return Slot(index, b"", exc)

    def result(self, slot: Slot) -> Result:
        """Raises the item's error, or gives it back, as the caller wants it."""
        error = slot.error
        if error is None:
            try:
                return read_streamed(slot.answer, self.address)
            except ModelyardError as exc:
                error = exc
        error = type(error)(error.message, code=error.code, **{**error.detail, "item": slot.index})
        if self.on_error == "raise" or slot.fatal:
            raise error from slot.error
        return error

    async def over(self, items: Iterable[Inputs] | AsyncIterable[Inputs], open_: Opened,
                   declared: Callable[[Inputs], Awaitable[Declared]]) -> AsyncIterator[Result]:
        """The async face. An async iterable is read by a task of its own: no result waits for the next item."""
        told, room = asyncio.Event(), asyncio.Event()
        window: deque[Slot] = deque()
        pipeline = open_(self.plan, told.set)

        async def feed() -> None:
            numbers = itertools.count()
            async for item in each(items):
                slot = self.slot(next(numbers), item, await declared(item))
                window.append(slot)
                if slot.done:
                    told.set()
                else:
                    pipeline.submit(slot)
                while len(window) >= self.plan.in_flight:
                    room.clear()
                    await room.wait()

        feeder = asyncio.create_task(feed())
        feeder.add_done_callback(lambda _: told.set())
        try:
            while True:
                while window and window[0].done:
                    yield self.result(window.popleft())
                room.set()
                if not window and feeder.done():
                    break
                told.clear()
                if not (window and window[0].done):
                    await told.wait()
            feeder.result()
            await pipeline.close(drained=True)
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            await pipeline.close()

    def waited(self, items: Iterable[Inputs], portal: Portal, open_: Opened,
               declared: Callable[[Inputs], Declared]) -> Iterator[Result]:
        """The blocking face. Items are taken, and made into requests, by the thread that waits for the results."""
        told = threading.Event()
        window: deque[Slot] = deque()
        failure: Exception | None = None
        index = 0

        async def opened() -> Pipeline:
            return open_(self.plan, told.set)

        pipeline = portal.run(opened())
        source: Iterator[Inputs] | None = None
        drained = False
        try:
            source = iter(items)
            while True:
                if window and window[0].done:
                    yield self.result(window.popleft())
                elif source is not None and len(window) < self.plan.in_flight:
                    try:
                        item = next(source)
                        slot = self.slot(index, item, declared(item))
                    except StopIteration:
                        source = None
                        continue
                    except Exception as exc:  # noqa: BLE001 - raised again, behind the results of what came before
                        source, failure = None, exc
                        continue
                    index += 1
                    window.append(slot)
                    if not slot.done:
                        pipeline.submit_from_thread(slot)
                elif window:
                    told.clear()
                    if not window[0].done:
                        told.wait()
                else:
                    break
            drained = True
            if failure is not None:
                raise failure
        finally:
            if portal.open:
                portal.run(pipeline.close(drained))


async def each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
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
