"""ModelStreamInfer, by whichever transport: read and submit on one side, answer in order on the other.

What is ready together leaves in one write. A caller that does not read its answers is not read from either, once
``WINDOW`` messages are under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from .calls import Answer, Call, Plane

WINDOW = 256


class _Slot:
    """One message's place in the order."""

    __slots__ = ("_stream", "answer", "submitted")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.answer: Answer | None = None
        self.submitted: Any = None

    def done(self, answer: Answer) -> None:
        self.answer = answer
        self._stream.wake()


class Stream:
    """``run`` ends when every message of ``bunches`` is answered, and gives back the last answer. ``send`` takes the
    bodies that are ready together and returns when there is room for more."""

    def __init__(self, plane: Plane, send: Callable[[list[bytes]], Awaitable[None]]) -> None:
        self._plane, self._send = plane, send
        self._slots: deque[_Slot] = deque()
        self._last: Answer | None = None
        self._all_read = False
        self._awake = asyncio.Event()
        self._room = asyncio.Event()

    def wake(self) -> None:
        """An answer is there, or no message will come any more."""
        self._awake.set()

    async def run(self, bunches: AsyncIterator[list[Call]]) -> Answer | None:
        """Raises what ``bunches`` raises, after the answers to what came before it; OSError when the caller left."""
        writer = asyncio.create_task(self._write())
        try:
            await self._read(bunches, writer)
        except asyncio.CancelledError:
            writer.cancel()
            raise
        finally:
            self._all_read = True
            self.wake()
            try:
                await writer
            finally:
                self._drop()
        return self._last

    async def _read(self, bunches: AsyncIterator[list[Call]], writer: asyncio.Task[None]) -> None:
        async for bunch in bunches:
            for call in bunch:
                while len(self._slots) >= WINDOW and not writer.done():
                    self._room.clear()
                    await self._room.wait()
                slot = _Slot(self)
                self._slots.append(slot)
                slot.submitted = self._plane.submit(call, slot.done)
            if writer.done():
                return

    async def _write(self) -> None:
        slots = self._slots
        try:
            while True:
                ready = []
                while slots and (answer := slots[0].answer) is not None:
                    slots.popleft()
                    ready.append(answer.body)
                    self._last = answer
                if ready:
                    self._room.set()
                    await self._send(ready)
                elif self._all_read and not slots:
                    return
                else:
                    self._awake.clear()
                    await self._awake.wait()
        finally:
            self._room.set()

    def _drop(self) -> None:
        """The caller left: what was not begun never runs."""
        while self._slots:
            slot = self._slots.popleft()
            if slot.answer is None:
                self._plane.cancel(slot.submitted)
