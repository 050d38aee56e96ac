"""ModelInfer without a coroutine: a call whose message is there is its own task.

h2corn asks the loop for a task for each stream and wants little of it: to be told its end, and to cancel it. A real
one costs a coroutine, a start and a wake-up by the loop, a future and three awaits for each call. An ``Infer`` is begun
in h2corn's own callback and ended in the lane's. Whatever is not whole or not plain takes the coroutine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from . import grpc_wire as wire
from .calls import Answer
from .h2_call import BODY, DONE, START, Receive, Send, headers_only
from .h2_cork import BUNCH

if TYPE_CHECKING:
    from .h2_app import H2App

FRAMED_BYTES = 16_384
"""A longer message is not copied behind its prefix: the prefix is sent by itself."""


class Infer:
    """A call that was submitted, and what stands for its task."""

    __slots__ = ("_app", "_callback", "_cancelled", "_ended", "_rest", "_send", "submitted")

    def __init__(self, app: H2App, send: Send) -> None:
        self._app, self._send = app, send
        self._callback: Callable[[Any], object] | None = None
        self._ended = self._cancelled = False
        self._rest: asyncio.Task[None] | None = None
        self.submitted: Any = None

    def answer(self, answer: Answer) -> None:
        """Sends it; once the call was cancelled nothing."""
        if self._ended:
            return
        send, app = self._send, self._app
        if app.cork.idle and len(app.under_way) >= BUNCH:
            app.cork.hold()
        try:
            if answer.error is not None:
                for event in headers_only(wire.failed(answer.error, app.metadata(answer))):
                    send(event)
            else:
                ready = send(START)  # as every send that need not wait gives back
                events = iter((*_framed(answer.body), {"type": DONE, "headers": [wire.STATUS_OK,
                                                                                 *app.metadata(answer)]}))
                for event in events:
                    waits = send(event)
                    if waits is not ready:
                        self._rest = app.loop.create_task(self._patiently(waits, events))
                        return
        except OSError:
            pass  # the caller went away
        self._end()

    async def _patiently(self, waits: Any, events: Iterator[dict[str, Any]]) -> None:
        """The caller reads slowly."""
        try:
            await waits
            for event in events:
                await self._send(event)
        except OSError:
            pass
        finally:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._app.under_way.discard(self)
        if (callback := self._callback) is not None:
            self._callback = None
            callback(self)

    # What is asked of a task ----------------------------------------------------------------------------------------

    def set_name(self, name: str) -> None:
        """Not needed."""

    def done(self) -> bool:
        return self._ended

    def result(self) -> None:
        if self._cancelled:
            raise asyncio.CancelledError

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Any = None) -> None:
        """Called when it ends, by whatever ends it. There is one: who asked for the task."""
        if self._ended:
            self._app.loop.call_soon(callback, self)
        elif self._callback is not None:
            raise RuntimeError("an Infer has one callback")
        else:
            self._callback = callback

    def cancel(self, msg: Any = None) -> bool:
        """The caller went away: what was not begun never runs."""
        if self._ended:
            return False
        self._cancelled = True
        if self._rest is not None:
            return self._rest.cancel()
        self._ended = True  # first: the plane answers what it gives up
        self._app.plane.cancel(self.submitted)
        self._end()
        return True


def _framed(body: bytes) -> tuple[dict[str, Any], ...]:
    prefix = b"\0" + len(body).to_bytes(4, "big")
    if len(body) < FRAMED_BYTES:
        return ({"type": BODY, "body": prefix + body},)
    return {"type": BODY, "body": prefix, "more_body": True}, {"type": BODY, "body": body}


def take(receive: Receive, limit: int, taken: list[Any]) -> bytes | None:
    """The one message of a call if all of it is there and is plain; else None, and what was taken of ``receive`` is in
    ``taken``: events, and at most one awaitable behind them."""
    parts: list[bytes] = []
    size, more = -5, True
    while more and size <= limit:
        waits: Any = receive()
        if hasattr(waits, "add_done_callback"):
            taken.append(waits)
            return None
        try:
            waits.send(None)
            return None  # never: what need not wait has ended
        except StopIteration as end:
            event = end.value
        taken.append(event)
        if event["type"] != "http.request":
            return None
        more = event.get("more_body", False)
        if part := event.get("body"):
            parts.append(part)
            size += len(part)
    if more or not parts or size > limit:
        return None
    first = parts[0]
    if len(first) < 5 or first[0] or int.from_bytes(first[1:5], "big") != size:
        return None
    return first[5:] if len(parts) == 1 else b"".join((memoryview(first)[5:], *parts[1:]))


def again(taken: list[Any], receive: Receive) -> Receive:
    """``receive`` for whoever goes on, with what was taken of it."""
    left = iter(taken)

    async def once_more() -> dict[str, Any]:
        for item in left:
            return item if type(item) is dict else await item
        return await receive()

    return once_more


def adopt(loop: asyncio.AbstractEventLoop) -> None:
    """From now on the loop takes an ``Infer`` for the task that it is."""
    before = loop.get_task_factory()
    if getattr(before, "adopts", False):
        return

    def make(loop: asyncio.AbstractEventLoop, coro: Any, **how: Any) -> Any:
        if type(coro) is Infer:
            return coro
        return asyncio.Task(coro, loop=loop, **how) if before is None else before(loop, coro, **how)

    make.adopts = True  # type: ignore[attr-defined]
    loop.set_task_factory(make)
