"""One gRPC call as an HTTP/2 stream of h2corn's: its messages in, its messages and its status out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from . import grpc_wire as wire
from .grpc_wire import Frames, Packed, Refused

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

APART_BYTES = 65_536
"""Compressed messages over this are inflated in a thread."""
EARLY_S, EARLY = 0.02, 0.1
"""A call's time is over a moment (at most so many seconds, such a part of it) before its caller's clock says so. A
caller that times out first resets its stream, and h2corn ends a connection with 200 resets as a rapid-reset attack."""
CONTENT = [(b"content-type", b"application/grpc"), (b"grpc-accept-encoding", wire.ENCODINGS)]
BODY, DONE = "http.response.body", "http.response.trailers"
START = {"type": "http.response.start", "status": 200, "headers": CONTENT, "trailers": True}
CUT = "the call ends in the middle of a message"


class Gone(Exception):
    """The caller went away while its request was being read."""


class H2Call:
    """Messages come out of ``message`` or ``bunches``; ``send`` may be called before ``finish``, which comes last."""

    __slots__ = ("_ended", "_frames", "_idle_s", "_limit", "_receive", "_send", "_started", "_window", "deadline",
                 "headers")

    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send, limit: int, idle_s: float) -> None:
        """``idle_s``: a unary call of which nothing more comes for so long is refused."""
        headers = self.headers = dict(scope["headers"])
        self._receive, self._send, self._limit, self._idle_s = receive, send, limit, idle_s
        self._started = self._ended = False
        self._window = 0
        self.deadline = deadline(headers)
        encoding = headers.get(b"grpc-encoding")
        if encoding is not None and encoding != b"identity":
            self._window = wire.WINDOWS.get(encoding, 0)
            if not self._window:
                raise Refused(wire.UNIMPLEMENTED, f"grpc-encoding '{encoding.decode(errors='replace')}' is not "
                                                  f"supported here; use one of {wire.ENCODINGS.decode()}")
        self._frames = Frames(limit, self._window > 0)

    def text(self, key: bytes) -> str | None:
        """A header's value."""
        value = self.headers.get(key)
        return None if value is None else value.decode("latin-1")

    async def message(self) -> bytes:
        """The one message of a unary call. Raises Refused, TooLarge, Gone."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._idle_s) as patience:
                return await self._message(lambda: patience.reschedule(loop.time() + self._idle_s))
        except TimeoutError:
            raise Refused(wire.DEADLINE_EXCEEDED, f"nothing of the call came for {self._idle_s:g} s") from None

    async def _message(self, came: Callable[[], None]) -> bytes:
        receive, frames = self._receive, self._frames
        found: bytes | None = None
        more = True
        while more:
            event = await receive()
            came()
            if event["type"] != "http.request":
                raise Gone
            body, more = event.get("body"), event.get("more_body", False)
            if not body:
                continue
            if found is None and not body[0] and int.from_bytes(body[1:5], "big") == len(body) - 5 <= self._limit \
                    and not frames.partial:
                found = body[5:]
                continue
            for message in frames.feed(body):
                if found is not None:
                    raise Refused(wire.UNIMPLEMENTED, "a unary call has one message, not more")
                found = await self._plain(message)
        if frames.partial or found is None:
            raise Refused(wire.INTERNAL, CUT if frames.partial else "a unary call has one message, and none came")
        return found

    async def bunches(self) -> AsyncIterator[list[bytes]]:
        """What arrived together, in order, until the caller has sent all. Raises Refused, TooLarge, Gone."""
        receive, frames = self._receive, self._frames
        while not self._ended:
            event = await receive()
            if event["type"] != "http.request":
                raise Gone
            body = event.get("body")
            self._ended = not event.get("more_body")
            if body and (found := frames.feed(body)):
                if self._window:
                    found = [await self._plain(message) for message in found]
                yield found
        if frames.partial:
            raise Refused(wire.INTERNAL, CUT)

    async def _plain(self, message: bytes) -> bytes:
        if type(message) is not Packed:
            return message
        if len(message) < APART_BYTES:
            return wire.inflate(message, self._window, self._limit)
        return await asyncio.to_thread(wire.inflate, message, self._window, self._limit)

    async def send(self, messages: Iterable[bytes]) -> None:
        """Messages, as one write. Waits while the caller does not read. Raises OSError when the caller went away."""
        if not self._started:
            self._started = True
            await self._send(START)
        await self._send({"type": BODY, "body": b"".join(map(wire.frame, messages)), "more_body": True})

    async def finish(self, last: Sequence[wire.Header] = (wire.STATUS_OK,)) -> None:
        """The status and our metadata; alone when nothing was sent. What the caller still sends is not read."""
        if self._started:
            await self._send({"type": BODY, "body": b""})
            await self._send({"type": DONE, "headers": list(last)})
        else:
            await alone(self._send, last)

    async def answer(self, message: bytes, metadata: Sequence[wire.Header] = ()) -> None:
        """The message of a unary call and status OK."""
        send = self._send
        await send(START)
        await send({"type": BODY, "body": wire.frame(message)})
        await send({"type": DONE, "headers": [wire.STATUS_OK, *metadata]})


def deadline(headers: Mapping[bytes, bytes]) -> float:
    """The caller's, as ``time.monotonic()``; inf: none. Raises Refused."""
    timeout = headers.get(b"grpc-timeout")
    if timeout is None:
        return math.inf
    seconds = wire.timeout_s(timeout)
    return time.monotonic() + seconds - min(EARLY_S, seconds * EARLY)


async def alone(send: Send, headers: Sequence[wire.Header], status: int = 200) -> None:
    """A response of headers only."""
    for event in headers_only(headers, status):
        await send(event)


def headers_only(headers: Sequence[wire.Header], status: int = 200) -> tuple[dict[str, Any], dict[str, Any]]:
    """The events of such a response."""
    return ({"type": "http.response.start", "status": status,
             "headers": [*CONTENT, *headers] if status == 200 else list(headers)}, {"type": BODY, "body": b""})
