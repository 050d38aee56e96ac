"""Artifacts: bytes by digest, kept while a model needs them.

An upload writes the blob first and the record afterwards; only the record counts. When the last model of a digest
goes, its record is ``doomed`` and a loop takes the blob away in steps, so that a registration or an upload that comes
meanwhile either rescues it by one commit or learns for certain that it came too late:

    kept -> doomed -> (nobody uses it) -> erasing -> blob deleted -> tombstone
             `-> kept: somebody wants it again
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Sequence

from ..core.errors import Conflict, Invalid, NotFound
from ..core.events import Fact
from ..core.layout import artifact_key
from ..kernel.service import Change, Context
from .model import Artifact, Model

PATIENCE_S = 5.0


class Hashed:
    """Passes chunks on and, behind the last, checks what they were. Raises Invalid then: nothing is kept."""

    def __init__(self, chunks: AsyncIterable[bytes], digest: str, length: int | None) -> None:
        self.chunks, self.digest, self.length, self.size = chunks, digest, length, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        sha = hashlib.sha256()
        async for chunk in self.chunks:
            sha.update(chunk)
            self.size += len(chunk)
            yield chunk
        if self.length is not None and self.size != self.length:
            raise Invalid(f"{self.size} bytes arrived, Content-Length says {self.length}", code="cut")
        if (found := f"sha256:{sha.hexdigest()}") != self.digest:
            raise Invalid(f"the {self.size} bytes have the digest {found}, not {self.digest}; nothing was kept",
                          code="digest-mismatch", found=found, size=self.size)


async def upload(ctx: Context, workspace: str, digest: str, chunks: AsyncIterable[bytes],
                 length: int | None) -> tuple[Artifact, bool]:
    """Stores an artifact; the record, and whether this call made it. The body is read and checked either way."""
    body = Hashed(chunks, digest, length)
    if (record := await kept(ctx, workspace, digest)) is not None:
        async for _ in body:
            pass
        return record, False
    base = await ctx.store.get(Artifact, digest, workspace=workspace, tombstone=True)
    await ctx.blobs.put(artifact_key(workspace, digest), body)
    now = ctx.now()
    new = Artifact(id=digest, workspace=workspace, size=body.size, created=now, updated=now)
    if base is not None:
        new = new.evolve(revision=base.revision, sequence=base.sequence)
    try:
        return await ctx.commit(new), True
    except Conflict:   # another upload of the same bytes was faster, or they are being erased again
        if (record := await kept(ctx, workspace, digest)) is None:
            raise _going(digest) from None
        return record, False


async def kept(ctx: Context, workspace: str, digest: str) -> Artifact | None:
    """The record of an artifact that will stay, doomed ones rescued; None when there is none.

    Waits while it is being erased; raises Conflict (retryable) when that takes long.
    """
    clock = asyncio.get_running_loop()
    end = clock.time() + PATIENCE_S
    while True:
        doc = await ctx.store.get(Artifact, digest, workspace=workspace)
        if doc is not None and doc.fate == "doomed":
            doc = await _changed(ctx, doc, _rescue)
        if doc is None or doc.fate == "kept":
            return doc
        if clock.time() > end:
            raise _going(digest)
        await asyncio.sleep(0.02)


def _going(digest: str) -> Conflict:
    return Conflict(f"{digest} is being removed just now; upload it again in a moment", code="being-removed",
                    retry_after=1)


async def _changed(ctx: Context, doc: Artifact, fn: Change[Artifact]) -> Artifact | None:
    try:
        return await ctx.change(Artifact, doc.id, fn, workspace=doc.workspace)
    except NotFound:
        return None


def _rescue(doc: Artifact) -> tuple[Artifact, Sequence[Fact]] | None:
    return (doc.evolve(fate="kept", due=None), ()) if doc.fate == "doomed" else None


async def in_use(ctx: Context, workspace: str, digest: str) -> bool:
    """Whether any living model needs it."""
    return bool(await ctx.store.find(Model, {"artifact": digest}, workspace=workspace, limit=1))


async def doom(ctx: Context, workspace: str, digest: str) -> None:
    """Hands the artifact to the loop when no model needs it any more. Repeating is fine."""
    doc = await ctx.store.get(Artifact, digest, workspace=workspace)
    if doc is None or doc.fate != "kept" or await in_use(ctx, workspace, digest):
        return
    now = ctx.now()
    await _changed(ctx, doc, lambda d: (d.evolve(fate="doomed", due=now), ()) if d.fate == "kept" else None)
    ctx.wake("purge")


async def purge(ctx: Context, doc: Artifact) -> Change[Artifact]:
    """The loop's step on a doomed artifact: see the top of this file."""
    if doc.fate == "doomed":
        if await in_use(ctx, doc.workspace, doc.id):
            return _rescue
        now = await _changed(ctx, doc, lambda d: (d.evolve(fate="erasing"), ()) if d.fate == "doomed" else None)
        doc = now or doc.evolve(fate="kept")
    if doc.fate != "erasing":
        return lambda newest: None
    await ctx.blobs.delete(artifact_key(doc.workspace, doc.id))
    return lambda newest: (newest.evolve(deleted=True, fate="kept"), ()) if newest.fate == "erasing" else None
