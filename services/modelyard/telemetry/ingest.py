"""The ingest loop: raw segments → Parquet, manifests, processes, windows; and away with what is too old.

A step may die anywhere and be repeated: files are put if absent under keys made from replica and sequences, a
manifest's id is made from replica and number, a process absorbs a number once, and a raw segment goes last. Two
steps at once (a lapsed lease) do the same work twice and agree.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from ..core.errors import Conflict, ModelyardError
from ..core.events import Fact
from ..core.layout import SegmentName, parse_segment, segments_prefix
from ..kernel.service import Change, Context, Loop
from . import retention
from .manifests import manifests
from .model import CaptureStream, Process, Segment, Window, process_id, segment_id, window_id
from .windows import GRACE_S, WINDOW_S, Windows, moment, window_of

if TYPE_CHECKING:
    from .unpack import Unpacked

log = logging.getLogger(__name__)
BATCH = 64
SETTLED_AT_ONCE = 200
SOON, IDLE, FORGOTTEN = timedelta(seconds=1), timedelta(seconds=5), timedelta(seconds=60)
BUSY_FOR = timedelta(minutes=10)
TRIES = 20
MALFORMED = (ModelyardError, ValueError, LookupError, TypeError, OverflowError, AttributeError)
"""What frames with a good checksum and nonsense inside may raise: user code shares the process that writes them."""


async def step(ctx: Context, stream: CaptureStream) -> Change[CaptureStream]:
    """One look at a deployment's raw segments."""
    keys, more = await _waiting(ctx, stream)
    taken, aside = [], []
    images: dict[str, str] = {}
    for key, name in keys:
        segment = await _take(ctx, stream, key, name, images.get(name.replica))
        if segment is None:
            aside.append(key)
        else:
            taken.append((key, segment))
            images[name.replica] = segment.image
    if taken:
        await _note(ctx, stream, [segment for _, segment in taken])
    for key, segment in taken:
        await _keep(ctx, segment)
        await ctx.blobs.delete(key)
    settled = set() if more else await _settle(ctx, stream)
    sweep = await retention.sweep(ctx, stream)
    now = ctx.now()

    def settle(newest: CaptureStream) -> tuple[CaptureStream, list[Fact]]:
        doc = newest.evolve(unsettled=[w for w in newest.unsettled if w not in settled], sweep=sweep,
                            aside=sorted({*newest.aside, *aside}), busy=now if keys else newest.busy)
        return doc.evolve(due=now + (timedelta(0) if more else _pause(doc, now))), []

    return settle


INGEST = Loop("ingest", CaptureStream, step, parallel=4, lease_s=30.0, every_s=0.5, max_backoff_s=30.0)


async def _waiting(ctx: Context, stream: CaptureStream) -> tuple[list[tuple[str, SegmentName]], bool]:
    """Raw segments to take now, in order, and whether there are more."""
    found: list[tuple[str, SegmentName]] = []
    async for blob in ctx.blobs.list(segments_prefix(stream.workspace, stream.id)):
        name = parse_segment(blob.key)
        if name is None or blob.key in stream.aside:
            continue
        if len(found) == BATCH:
            return found, True
        found.append((blob.key, name))
    return found, False


async def _take(ctx: Context, stream: CaptureStream, key: str, name: SegmentName, image: str | None) -> Segment | None:
    """The segment's manifest, as stored or new (then its files are stored); None when it cannot be read.

    ``image`` is what another segment of the same process said, for one whose start frame is damaged.
    """
    known = await ctx.store.get(Segment, segment_id(stream.id, name.replica, name.number),
                                workspace=stream.workspace, tombstone=True)
    if known is not None:
        return known
    if image is None:
        process = await ctx.store.get(Process, process_id(stream.id, name.replica), workspace=stream.workspace)
        image = process.image if process is not None else stream.image
    raw = b"".join([chunk async for chunk in ctx.blobs.get(key)])
    try:
        unpacked = await asyncio.to_thread(_unpack, stream, name, raw, image)
    except MALFORMED as exc:
        log.error("the capture segment %s cannot be read and stays where it is: %r", key, exc)
        return None
    for file, body in unpacked.blobs:
        await ctx.blobs.put(file, _once(body), if_absent=True)
    return unpacked.segment


def _unpack(stream: CaptureStream, name: SegmentName, raw: bytes, image: str) -> Unpacked:
    """In a thread, which also spares everybody else the import of pyarrow."""
    from .unpack import unpack

    return unpack(stream.workspace, stream.id, name, raw, image)


async def _note(ctx: Context, stream: CaptureStream, segments: list[Segment]) -> None:
    """Before anything counts: which windows to tell of, and how long segments are. A repeat changes nothing."""
    touched = {window_of(cell.slot, WINDOW_S) for segment in segments for cell in segment.cells}
    longest = max((segment.end - segment.begin).total_seconds() for segment in segments)

    def note(newest: CaptureStream) -> tuple[CaptureStream, list[Fact]] | None:
        if touched <= set(newest.unsettled) and longest <= newest.longest_s:
            return None
        return newest.evolve(unsettled=sorted({*newest.unsettled, *touched}),
                             longest_s=max(newest.longest_s, longest)), []

    await ctx.change(CaptureStream, stream.id, note, workspace=stream.workspace)


async def _keep(ctx: Context, segment: Segment) -> None:
    """Commits the manifest with its events, then lets the process absorb it."""
    if segment.deleted:
        return
    if segment.revision == 0 and not segment.empty:
        facts = [Fact("capture.closed", {"cells": [cell.plain() for cell in segment.cells]})]
        if lost := segment.lost():
            facts.append(Fact("capture.lost", {"lost": lost}))
        try:
            await ctx.commit(segment, *facts)
        except Conflict:  # a step that thought this one dead was faster: its manifest says the same
            log.info("the manifest of %s is there already", segment.id)
    await _absorb(ctx, segment)


async def _absorb(ctx: Context, segment: Segment) -> None:
    id_ = process_id(segment.deployment, segment.replica)
    for _ in range(TRIES):
        known = await ctx.store.get(Process, id_, workspace=segment.workspace, tombstone=True)
        process = known or Process(id=id_, workspace=segment.workspace, deployment=segment.deployment,
                                   image=segment.image, replica=segment.replica, seen=segment.end)
        with_it = process.absorb(segment)
        if with_it is None:
            return
        facts = []
        if with_it.ended is not None and with_it.state == "gaps" and not with_it.told:
            with_it = with_it.evolve(told=True)
            facts.append(Fact("capture.lost", {"gaps": with_it.gaps, "lost_segments": with_it.lost_segments}))
        try:
            await ctx.commit(with_it.evolve(deleted=False), *facts)
            return
        except Conflict:
            continue
    raise Conflict(f"the record of process '{id_}' changes too often")


async def _settle(ctx: Context, stream: CaptureStream) -> set[int]:
    """Tells of the windows that ended long enough ago; gives back which."""
    newest = await ctx.store.get(CaptureStream, stream.id, workspace=stream.workspace) or stream
    until = ctx.now().timestamp() - WINDOW_S - GRACE_S
    ready = [start for start in newest.unsettled if start <= until][:SETTLED_AT_ONCE]
    for start in ready:
        windows = Windows(WINDOW_S)
        async for segment in manifests(ctx, newest, moment(start), moment(start + WINDOW_S)):
            windows.add(segment.image, segment.cells, start, start + WINDOW_S)
        for told in windows.answers(stream.id):
            await _tell(ctx, stream.workspace, told)
    return set(ready)


async def _tell(ctx: Context, workspace: str, told: dict[str, object]) -> None:
    """One settled window as a document with its event; nothing when it was told the same before."""
    id_ = window_id(str(told["deployment"]), str(told["start"]), str(told["image"]), str(told["model"]))
    known = await ctx.store.get(Window, id_, workspace=workspace, tombstone=True)
    fresh = Window.model_validate({"id": id_, "workspace": workspace, **told})
    if known is not None:
        if known.requests == fresh.requests and known.errors == fresh.errors and not known.deleted:
            return
        fresh = fresh.evolve(revision=known.revision, sequence=known.sequence, created=known.created,
                             updated=ctx.now())
    try:
        await ctx.commit(fresh, Fact("telemetry.window"))
    except Conflict:  # another step told of it meanwhile; if that knew less, its window is still unsettled
        log.info("window %s was told by another step", id_)


def _pause(stream: CaptureStream, now: datetime) -> timedelta:
    """How long until the next look."""
    if stream.busy is not None and now - stream.busy < BUSY_FOR:
        return SOON
    return FORGOTTEN if stream.gone else IDLE


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
