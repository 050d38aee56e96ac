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
    """(id, data) of each frame; one without data only carries the cursor on."""
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


async def stream(
    http: Http, types: Sequence[str] | None, subject: str | None, after: str, follow: bool,
) -> AsyncIterator[Event]:
    """Events behind ``after``: those there are, and with ``follow`` for ever those that come. A connection that is
    lost is taken up again behind the last event; one that was never there raises Unavailable."""
    cursor = ""
    tries = 0
    params: Params = {
        "types": ",".join(types) if types else None, "subject": subject, "after": after,
        "follow": None if follow else False,
    }
    while True:
        head = {"Last-Event-ID": cursor} if cursor else {}
        try:
            async with http.lines(path("events"), params=params, headers=head, endless=follow) as lines:
                async for id, data in _frames(lines):
                    cursor, tries = id or cursor, 0
                    if data:
                        yield Event.model_validate({**orjson.loads(data), "cursor": cursor})
            if not follow:
                return
        except Unavailable:
            if not cursor or tries >= len(RECONNECT_S):
                raise
        await asyncio.sleep(RECONNECT_S[min(tries, len(RECONNECT_S) - 1)])
        tries += 1
