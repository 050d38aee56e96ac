"""Routes of the telemetry service: captured rows, their proof, windows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from ..core.documents import rfc3339
from ..core.errors import Invalid, NotFound
from ..core.layout import COLLECTOR_NAME
from ..kernel.paging import PARAMETERS, limit_of, seal, unseal
from ..kernel.service import Context
from ..kernel.web import Call, Route, reply, web
from .manifests import manifests
from .model import CaptureStream
from .spans import Place, Span
from .verify import verify
from .windows import WINDOW_S, Windows, parse_window, window_of

ARROW = "application/vnd.apache.arrow.stream"
LOOK_BACK = timedelta(hours=24)
TIMES = {"start": "From when on: RFC 3339, `2026-11-23T14:00:00Z`.", "end": "Until when, not included."}
ROWS = {**TIMES, "limit": PARAMETERS["limit"], "after": PARAMETERS["after"],
        "order": "`-time` (default): the newest first; `time`: the oldest first.",
        "collect": "A collector's name: its rows instead of the calls."}


async def show(ctx: Context, call: Call) -> web.StreamResponse:
    """Captured calls: a JSON page, inputs and outputs decoded by name; or the raw rows as an Arrow stream."""
    from . import rows  # with pyarrow, which nothing else at start needs

    stream = await _stream(ctx, call)
    collector = call.query.get("collect")
    if collector is not None and not COLLECTOR_NAME.match(collector):
        raise Invalid(f"'{collector}' is not a collector's name", field="collect")
    span = Span(*_times(call), collector)
    if ARROW in call.request.headers.get("Accept", ""):
        limit = _count(call.query["limit"]) if "limit" in call.query else None
        return await call.stream(rows.arrow(ctx, stream, span, limit), ARROW)
    limit, newest_first = limit_of(call.query), _newest_first(call)
    items, place = await rows.page(ctx, stream, span, limit, newest_first, _place(call, newest_first))
    after = seal(["-time" if newest_first else "time", place.begin, place.id, place.rows]) if place else None
    return reply({"items": items, "next": after})


async def prove(ctx: Context, call: Call) -> web.StreamResponse:
    """Whether anything is missing."""
    return reply(await verify(ctx, await _stream(ctx, call), *_times(call)))


async def windows(ctx: Context, call: Call) -> web.StreamResponse:
    """Requests, errors and latency per window, image and model; the last 24 hours unless said."""
    stream = await _stream(ctx, call)
    width = parse_window(call.query["window"]) if "window" in call.query else WINDOW_S
    start, end = _times(call)
    if call.query.get("live", "false") != "false":
        return reply({"windows": await _live(ctx, call, width, start, end)})
    end = end or ctx.now() + timedelta(seconds=1)
    start = start or end - LOOK_BACK
    first = window_of(int(start.timestamp()), width)
    last = window_of(int(end.timestamp()) + width - 1, width)
    found = Windows(width)
    async for segment in manifests(ctx, stream, datetime.fromtimestamp(first, UTC), datetime.fromtimestamp(last, UTC)):
        found.add(segment.image, segment.cells, first, last)
    return reply({"windows": list(found.answers(stream.id))})


async def _live(ctx: Context, call: Call, width: int, start: datetime | None,
                end: datetime | None) -> list[dict[str, Any]]:
    """What the stream worker has of the last quarter of an hour, from Kafka and without a look into the store."""
    if call.query["live"] != "true" or width != WINDOW_S:
        raise Invalid("'live' is true or false, and live windows are one minute wide", field="live")
    answer = await ctx.peers.call("stream", "GET", f"/internal/v1/live/{ctx.peers.quote(call.params['deployment'])}",
                                  workspace=call.workspace)
    return [w for w in (answer or {}).get("windows", [])
            if (start is None or w["end"] > rfc3339(start)) and (end is None or w["start"] < rfc3339(end))]


def routes(ctx: Context) -> Sequence[Route]:
    """All of it."""
    return [
        Route("GET", "/v1/capture/{deployment}", show, "Captured calls of a deployment", query=ROWS),
        Route("GET", "/v1/capture/{deployment}/verify", prove, "Prove that nothing captured is missing", query=TIMES),
        Route("GET", "/v1/telemetry/{deployment}", windows, "Requests, errors and latency of a deployment",
              query={**TIMES, "window": "The width of a window: `1m` (default), a multiple of 10 s.",
                     "live": "`true`: the last 15 minutes as the stream worker (`modelyard serve stream`, on Kafka) "
                             "has them; a window with `provisional: true` is not settled yet."}),
    ]


async def _stream(ctx: Context, call: Call) -> CaptureStream:
    name = call.params["deployment"]
    stream = await ctx.store.get(CaptureStream, name, workspace=call.workspace)
    if stream is None:
        raise NotFound(f"there is no deployment '{name}', and nothing captured of one", kind="deployment", id=name)
    return stream


def _times(call: Call) -> tuple[datetime | None, datetime | None]:
    start, end = (_moment(call, name) for name in ("start", "end"))
    if start is not None and end is not None and end <= start:
        raise Invalid("'end' must be after 'start'", field="end")
    return start, end


def _moment(call: Call, name: str) -> datetime | None:
    text = call.query.get(name)
    if text is None:
        return None
    try:
        # a '+' that was not escaped in the URL arrives as a space
        found = datetime.fromisoformat(text.strip().replace(" ", "+") if "T" in text else text)
    except ValueError as exc:
        raise Invalid(f"'{text}' is not a time; write 2026-11-23T14:00:00Z", field=name) from exc
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise Invalid(f"'limit' is a whole number above 0, not '{text}'", field="limit")
    return int(text)


def _newest_first(call: Call) -> bool:
    order = call.query.get("order", "-time")
    if order not in ("time", "-time"):
        raise Invalid("captured calls are ordered by 'time' or '-time'", field="order")
    return order == "-time"


def _place(call: Call, newest_first: bool) -> Place | None:
    if "after" not in call.query:
        return None
    parts: list[Any] = unseal(call.query["after"], 4)
    order, begin, id_, count = parts
    if order != ("-time" if newest_first else "time") or not isinstance(begin, str) or not isinstance(id_, str) \
            or not isinstance(count, int):
        raise Invalid("'after' is not a cursor of this list in this order", field="after")
    return Place(begin, id_, count)
