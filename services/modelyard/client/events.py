"""The event stream: Server-Sent Events, taken up again where a lost connection left off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import orjson
from pydantic import Field

from ..core.errors import Unavailable
from ..core.events import Envelope
from .http import Http, Params, path

RECONNECT_S = (0.1, 0.3, 1.0, 2.0, 5.0)


class Event(Envelope):
    """One CloudEvent as it came, with the cursor to go on from behind it.

    ``topic`` is ``model.registered``; ``subject`` the id of the document (``iris:4``); ``data`` that document.
    """

    cursor: str = Field(default="", exclude=True)


async def _frames(lines: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, bytes]]:
    """(id, data) of each frame. One that is only a comment says that the stream lives: ``("", b"")``."""
    cursor, data = "", b""
    async for line in lines:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            yield cursor, data
            cursor, data = "", b""
        elif field == b"id":
            cursor = value.decode()
        elif field == b"data":
            data += (b"\n" if data else b"") + value


async def _once(
    http: Http, params: Params, cursor: str | None, idle_s: float | None,
) -> AsyncIterator[Event | None]:
    """One connection's events; None when ``idle_s`` went by without one."""
    head = {"Last-Event-ID": cursor} if cursor else {}
    async with http.lines(path("events"), params=params, headers=head, endless=True) as lines:
        frames = _frames(lines)
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    frame = await anext(frames, None)
                    while frame is not None and not frame[1]:
                        frame = await anext(frames, None)
            except TimeoutError:
                yield None
                return
            if frame is None:
                return
            yield Event.model_validate({**orjson.loads(frame[1]), "cursor": frame[0]})


async def stream(
    http: Http, types: Sequence[str] | None, subject: str | None, after: str, idle_s: float | None,
) -> AsyncIterator[Event]:
    """Events from ``after`` on, for ever, or until ``idle_s`` seconds went by without one."""
    cursor: str | None = None
    tries = 0
    params: Params = {"types": ",".join(types) if types else None, "subject": subject, "after": after}
    while True:
        try:
            async for event in _once(http, params, cursor, idle_s):
                if event is None:
                    return
                cursor, tries = event.cursor or cursor, 0
                yield event
        except Unavailable:
            if (cursor is None and tries == 0) or tries >= len(RECONNECT_S):
                raise
        await asyncio.sleep(RECONNECT_S[min(tries, len(RECONNECT_S) - 1)])
        tries += 1
