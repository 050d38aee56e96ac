"""What was captured goes when its days are over: files first, then what tells of them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TypeVar

from ..core.documents import Document, Range, Where
from ..core.errors import Conflict
from ..kernel.service import Context
from .model import CaptureStream, Process, Segment, Window

D = TypeVar("D", bound=Document)
EVERY = timedelta(hours=1)
AT_ONCE = 200


async def sweep(ctx: Context, stream: CaptureStream) -> datetime:
    """Removes a batch of what is past its retention, when it is time to; gives back when to look again."""
    now = ctx.now()
    if stream.sweep is not None and now < stream.sweep:
        return stream.sweep
    cutoff = now - timedelta(days=stream.retention_days)
    more = await _segments(ctx, stream, cutoff)
    for type_, field in ((Process, "seen"), (Window, "start")):
        old = await _old(ctx, type_, {"deployment": stream.id, field: Range(lt=cutoff)}, stream.workspace)
        for doc in old:
            await _bury(ctx, doc)
        more = more or len(old) == AT_ONCE
    return now if more else now + EVERY


async def _segments(ctx: Context, stream: CaptureStream, cutoff: datetime) -> bool:
    old = await _old(ctx, Segment, {"deployment": stream.id, "end": Range(lt=cutoff)}, stream.workspace)
    for segment in old:
        for file in segment.files:
            await ctx.blobs.delete(file.key)
        await _bury(ctx, segment.evolve(files=[], cells=[]))
    return len(old) == AT_ONCE


async def _old(ctx: Context, type_: type[D], where: Where, workspace: str) -> list[D]:
    return await ctx.store.find(type_, where, workspace=workspace, limit=AT_ONCE)


async def _bury(ctx: Context, doc: Document) -> None:
    try:
        await ctx.commit(doc.evolve(deleted=True))
    except Conflict:
        return  # it changed meanwhile: the next sweep sees it as it is then
