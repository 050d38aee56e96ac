"""One connection of a pipeline: a stream at a time, written and read at once, opened anew when it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

if TYPE_CHECKING:
    from .pipeline import Pipeline, Slot

AGE_S = 3.0
"""A stream is written to for so long; then its answers are read and another one is opened. So a replica that drains
is left in time, and the connections of an upgrade are followed."""


def back_off(failures: int) -> float:
    """Seconds before another try: 0.05, 0.1, 0.2 … 1."""
    return float(min(1.0, 0.025 * 2 ** min(failures, 10)))


class Lane:
    """``share``: so many items are under way at most."""

    def __init__(self, pipeline: Pipeline, channel: grpc.aio.Channel, method: Any, address: str, share: int) -> None:
        self.address = address
        self.up = False
        """Connected, as far as is known."""
        self._pipeline, self._channel, self._method, self._share = pipeline, channel, method, share
        self._loop = asyncio.get_running_loop()
        self._sent: deque[Slot] = deque()
        self._awake = asyncio.Event()
        self._finishing = False
        self._failures = 0

    def wake(self) -> None:
        """There is something to look at."""
        self._awake.set()

    def finish(self) -> None:
        """Nothing comes any more: the stream ends when all is answered, and so does ``run``."""
        self._finishing = True
        self.wake()

    async def run(self) -> None:
        """Until ``finish``. When it is cancelled, so is the stream."""
        while not self._finishing:
            if self._pipeline.idle:
                await self._sleep()
            elif await self._connected():
                await self._stream()
                if self._failures:
                    await asyncio.sleep(back_off(self._failures))

    async def _sleep(self) -> None:
        self._awake.clear()
        await self._awake.wait()

    async def _connected(self) -> bool:
        try:
            async with asyncio.timeout(self._pipeline.plan.outage_s):
                await self._channel.channel_ready()
        except TimeoutError:
            self.up = False
            self._pipeline.nobody(self.address)
            return False
        self.up = True
        return True

    async def _stream(self) -> None:
        """One stream, from its first message to its status."""
        plan = self._pipeline.plan
        call = self._method(metadata=plan.metadata, timeout=AGE_S + plan.timeout_s)
        reader = asyncio.create_task(self._read(call))
        ageing = self._loop.call_later(AGE_S, self.wake)
        try:
            await self._write(call, reader, self._loop.time() + AGE_S)
            await reader
        except BaseException:
            call.cancel()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            raise
        finally:
            ageing.cancel()
        if not call.done():
            call.cancel()
        left, self._sent = list(self._sent), deque()
        code, details = await call.code(), await call.details()
        if code is grpc.StatusCode.OK and not left:
            return
        self._failures += 1
        self.up = self._failures == 1
        self._pipeline.ended(left, code, details or "", self.address)

    async def _write(self, call: Any, reader: asyncio.Task[None], until: float) -> None:
        sent, pipeline = self._sent, self._pipeline
        while not reader.done():
            if self._finishing or self._loop.time() >= until:
                break
            slot = None
            if len(sent) < self._share and not (sent and sent[0].alone):
                slot = pipeline.next(bool(sent))
            if slot is None:
                await self._sleep()
                continue
            sent.append(slot)
            try:
                await call.write(slot.body)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the stream ended; the reader knows why
        if not reader.done():
            await call.done_writing()

    async def _read(self, call: Any) -> None:
        sent = self._sent
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                if not sent:
                    return  # more answers than questions: whose they are, nobody knows
                self._failures = 0
                self._pipeline.answered(sent.popleft(), answer, self.address)
                if not self._pipeline.idle:
                    self._awake.set()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # its status says why
        finally:
            self._awake.set()
