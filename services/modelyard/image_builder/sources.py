"""What comes from the registry: its word on models and artifacts, and the holds; bytes come from the blob store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ..core.errors import BuildFailed, Conflict, Invalid, NotFound
from ..core.layout import artifact_key
from ..kernel.forward import Peers
from ..kernel.service import Context
from .model import Image

BATCH = 1 << 20
TAR_MAGIC = slice(257, 262)


def _hold_path(model: str, image: str) -> str:
    return f"/internal/v1/models/{Peers.quote(model)}/holds/image/{Peers.quote(image)}"


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


async def fetch(ctx: Context, doc: Image, digest: str, what: str, path: Path) -> None:
    """Streams an artifact into ``path``. BuildFailed when it is gone or is not what was registered."""
    seen = hashlib.sha256()

    def write(batch: bytes) -> None:
        with path.open("ab") as file:
            file.write(batch)
        seen.update(batch)

    try:
        async for batch in _batches(ctx.blobs.get(artifact_key(doc.workspace, digest))):
            await asyncio.to_thread(write, batch)
    except NotFound as exc:
        raise BuildFailed(f"{what} is gone: {exc.message}") from exc
    if f"sha256:{seen.hexdigest()}" != digest:
        raise BuildFailed(f"{what} is damaged: its bytes do not have the digest {digest}")


async def _batches(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Gathered to about 1 MiB; at least one batch, empty or not."""
    held: list[bytes] = []
    size = 0
    async for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= BATCH:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


def is_archive(path: Path) -> bool:
    """Whether a file is a tar. Blocking."""
    with path.open("rb") as file:
        return file.read(512)[TAR_MAGIC] == b"ustar"
