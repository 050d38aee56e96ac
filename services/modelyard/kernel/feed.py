"""``GET /v1/events``: the bus as Server-Sent Events, for those who have no client of the bus.

Each message has the event (CloudEvents JSON) as ``data`` and its cursor as ``id``; a reconnecting client sends that
back as ``Last-Event-ID``. Comments keep idle connections alive and carry the cursor on past what the filters left out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from aiohttp import web

from ..core.errors import Invalid
from ..core.events import TOPICS, Envelope
from ..ports.bus import EventBus
from .call import Call
from .service import Context
from .web import Route

HEARTBEAT_S = 15.0
BATCH = 200
PARAMETERS = {
    "types": "Topics, with `*`, separated by commas: `deployment.*,model.registered`. None: all.",
    "subject": "Only events of this document: `iris:4`; `*` is allowed.",
    "after": "`beginning`, `end` (default) or a cursor (the SSE `id`). The header Last-Event-ID goes before it.",
    "follow": "`false` answers what there is up to now and ends.",
    "limit": "End after this many events.",
}


@dataclass(frozen=True)
class _Wanted:
    topics: tuple[str, ...]
    subject: str
    after: str
    follow: bool
    limit: int | None
    workspace: str

    def lets(self, event: Envelope) -> bool:
        return event.workspace == self.workspace and (not self.subject or fnmatchcase(event.subject, self.subject))


def _topics(given: Sequence[str]) -> tuple[str, ...]:
    globs = [part.strip() for text in given for part in text.split(",") if part.strip()]
    globs = [g.removesuffix(".v1") for g in globs]
    lost = [g for g in globs if not any(fnmatchcase(topic, g) for topic in TOPICS)]
    if lost:
        raise Invalid(f"no event has the type {', '.join(lost)}; there are: {', '.join(TOPICS)}", errors=[
            {"field": "types", "message": f"'{g}' matches no event type"} for g in lost])
    return tuple(t for t in TOPICS if not globs or any(fnmatchcase(t, g) for g in globs))


def _wanted(call: Call) -> _Wanted:
    follow, limit = call.query.get("follow", "true"), call.query.get("limit")
    if follow not in ("true", "false", "1", "0"):
        raise Invalid(f"'follow' is true or false, not '{follow}'", field="follow")
    if limit is not None and not (limit.isascii() and limit.isdigit() and 0 < int(limit[:10]) == int(limit)):
        raise Invalid(f"'limit' is a number from 1 on, not '{limit}'", field="limit")
    after = call.request.headers.get("Last-Event-ID") or call.query.get("after") or "end"
    return _Wanted(_topics(call.all("types")), call.query.get("subject", ""), after, follow in ("true", "1"),
                   int(limit) if limit else None, call.workspace)


def _message(cursor: str, event: Envelope) -> bytes:
    return b"id: %s\ndata: %s\n\n" % (cursor.encode(), event.encode())


async def _messages(bus: EventBus, wanted: _Wanted) -> AsyncIterator[bytes]:
    """Endless with ``follow``. The first read comes before the first byte: a bad cursor is still a problem, and what
    is published once the head has arrived is in the stream."""
    left = wanted.limit
    found, cursor = await bus.read(wanted.topics, wanted.after, BATCH)
    yield b": modelyard events\nid: %s\n\n" % cursor.encode()
    while True:
        for at, event in found:
            if wanted.lets(event):
                yield _message(at, event)
                left = None if left is None else left - 1
                if left == 0:
                    return
        if not wanted.follow and not found:
            return
        before = cursor
        found, cursor = await bus.read(wanted.topics, cursor, BATCH, HEARTBEAT_S if wanted.follow else 0.0)
        if wanted.follow and (not found or not any(wanted.lets(e) for _, e in found)):
            yield b": \n\n" if cursor == before else b": \nid: %s\n\n" % cursor.encode()


def routes(bus: EventBus) -> list[Route]:
    """The event stream over this bus."""

    async def events(ctx: Context, call: Call) -> web.StreamResponse:
        wanted = _wanted(call)
        headers = {"X-Accel-Buffering": "no"}
        return await call.stream(_messages(bus, wanted), "text/event-stream", headers, follow=wanted.follow)

    return [Route("GET", "/v1/events", events, "Every fact, as it happens (Server-Sent Events)", query=PARAMETERS)]
