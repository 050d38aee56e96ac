"""Finding the segments that hold a stretch of time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta

from ..core.documents import Range, rfc3339
from ..kernel.service import Context
from .model import CaptureStream, Segment

PAGE = 500


async def manifests(ctx: Context, stream: CaptureStream, start: datetime | None, end: datetime | None,
                    newest_first: bool = False, after: tuple[str, str] | None = None) -> AsyncIterator[Segment]:
    """Segments that may hold calls of ``start <= time < end``, by begin; ``after`` = (begin, id) goes on behind one.

    A segment is found by its begin, which lies at most the longest segment's span before what it holds.
    """
    span = timedelta(seconds=stream.longest_s + 1)
    where: dict[str, object] = {"deployment": stream.id}
    if start is not None or end is not None:
        where["begin"] = Range(gte=None if start is None else start - span,
                               lt=None if end is None else end + timedelta(seconds=1))
    order = "-begin" if newest_first else "begin"
    place: tuple[str | int | float, str] | None = after
    while True:
        page = await ctx.store.find(Segment, where, workspace=stream.workspace, order=order, after=place, limit=PAGE)
        for segment in page:
            if (start is None or segment.end >= start) or segment.cells:
                yield segment
        if len(page) < PAGE:
            return
        place = (rfc3339(page[-1].begin), page[-1].id)
