"""What comes from the registry: its word on models and artifacts, and the holds; bytes come from the blob store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import BuildFailed, Conflict, Invalid, NotFound
from ..core.layout import artifact_key
from ..kernel.forward import Peers
from ..kernel.service import Context
from .model import Image
from .tarring import opened

BATCH = 1 << 20
Source = Path | bytes
"""An artifact that was brought here: a file, or its bytes when they are few."""
NOTES = 1024
_PLACED: dict[tuple[int, str, str], bool] = {}
"""Images whose holds this process has placed and whose build has not begun: it saves asking twice."""
TAR_MAGIC = slice(257, 262)


def _hold_path(model: str, image: str) -> str:
    return f"/internal/v1/models/{Peers.quote(model)}/holds/image/{Peers.quote(image)}"


def _note(ctx: Context, doc: Image) -> tuple[int, str, str]:
    return id(ctx.store), doc.workspace, doc.id


async def hold_once(ctx: Context, doc: Image) -> None:
    """As ``hold``, unless this process has done it for this image a moment ago, when it was asked for."""
    if _PLACED.pop(_note(ctx, doc), None) is None:
        await hold(ctx, doc)


async def hold(ctx: Context, doc: Image) -> None:
    """Asks the registry to keep the image's models. BuildFailed when one is gone or going."""
    answers = await asyncio.gather(
        *(ctx.peers.call("registry", "PUT", _hold_path(m, doc.id), workspace=doc.workspace) for m in doc.models),
        return_exceptions=True)
    refused = []
    for model, answer in zip(doc.models, answers, strict=True):
        if answer is None:
            refused.append(f"model '{model}' is gone")
        elif isinstance(answer, Conflict | NotFound | Invalid):
            refused.append(f"model '{model}' cannot be used: {answer.message}")
        elif isinstance(answer, BaseException):
            raise answer
    if refused:
        raise BuildFailed("; ".join(refused))
    _PLACED[_note(ctx, doc)] = True
    while len(_PLACED) > NOTES:
        del _PLACED[next(iter(_PLACED))]


async def let_go(ctx: Context, doc: Image) -> None:
    """Takes the holds away; repeating is fine, and so is a model that is gone."""
    await asyncio.gather(
        *(ctx.peers.call("registry", "DELETE", _hold_path(m, doc.id), workspace=doc.workspace) for m in doc.models))


async def resolve_model(ctx: Context, ref: str, workspace: str) -> dict[str, Any] | None:
    """The registry's document of the model that ``ref`` means now, or None."""
    return await ctx.peers.call("registry", "GET", f"/v1/models/{Peers.quote(ref)}", workspace=workspace)


async def has_artifact(ctx: Context, digest: str, workspace: str) -> bool:
    """Whether the registry knows this artifact as whole."""
    path = f"/v1/artifacts/{Peers.quote(digest)}"
    return await ctx.peers.call("registry", "HEAD", path, workspace=workspace) is not None


async def fetch(ctx: Context, doc: Image, digest: str, what: str, path: Callable[[], Awaitable[Path]]) -> Source:
    """An artifact: its bytes when it is small, else a file at ``path``. BuildFailed when it is gone or is not what
    was registered."""
    seen, few, many = hashlib.sha256(), b"", None
    try:
        async for batch in _batches(ctx.blobs.get(artifact_key(doc.workspace, digest))):
            if many is None and len(batch) < BATCH:
                few = batch  # the only one: a batch is smaller only at the end
                seen.update(few)
                continue
            many = many or await path()
            await asyncio.to_thread(_append, many, batch, seen)
    except NotFound as exc:
        raise BuildFailed(f"{what} is gone: {exc.message}") from exc
    _sound(digest, what, seen)
    return few if many is None else many


@dataclass(frozen=True)
class Stored:
    """An artifact that stays in the blob store, with what stands before and behind it in a layer: read from there each
    time it is iterated over. BuildFailed when it is gone."""

    ctx: Context
    place: str
    what: str
    before: bytes
    after: bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.before
        try:
            async for chunk in self.ctx.blobs.get(self.place):
                yield chunk
        except NotFound as exc:
            raise BuildFailed(f"{self.what} is gone: {exc.message}") from exc
        yield self.after


async def stored(ctx: Context, doc: Image, digest: str, what: str, around: tuple[bytes, bytes]) -> tuple[Stored, str]:
    """The artifact between the bytes ``around`` it, and the digest of the three; nothing is written. BuildFailed when
    it is gone or is not what was registered."""
    found = Stored(ctx, artifact_key(doc.workspace, digest), what, *around)
    own, whole = hashlib.sha256(), hashlib.sha256(found.before)
    async for batch in _batches(replace(found, before=b"", after=b"").__aiter__()):
        await asyncio.gather(asyncio.to_thread(own.update, batch), asyncio.to_thread(whole.update, batch))
    whole.update(found.after)
    _sound(digest, what, own)
    return found, f"sha256:{whole.hexdigest()}"


def _sound(digest: str, what: str, seen: Any) -> None:
    if f"sha256:{seen.hexdigest()}" != digest:
        raise BuildFailed(f"{what} is damaged: its bytes do not have the digest {digest}")


def _append(path: Path, batch: bytes, seen: Any) -> None:
    with path.open("ab") as out:
        out.write(batch)
    seen.update(batch)


async def _batches(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Gathered to at least 1 MiB each, but for the last."""
    held: list[bytes] = []
    size = 0
    async for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= BATCH:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def is_archive(source: Source) -> bool:
    """Whether it is a tar. Blocking."""
    with opened(source) as file:
        return file.read(512)[TAR_MAGIC] == b"ustar"
