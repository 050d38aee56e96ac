"""Files and folders on their way to the registry: hashed first, sent only when they are not there yet."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import Invalid, NotFound
from .http import Http, path

CHUNK = 1 << 20


@dataclass(frozen=True)
class Progress:
    """How far a long step is. ``stage`` is ``hash``, ``upload``, ``download``, ``build`` or ``deploy``;
    ``done`` and ``total`` are bytes for the first three, else 0; ``message`` is a line for people."""

    stage: str
    done: int = 0
    total: int = 0
    message: str = ""


OnProgress = Callable[[Progress], None]
"""Called often, from the SDK's own thread when the client is the blocking one; must return fast."""


FRAMEWORK_OF = {".onnx": "onnx", ".skops": "scikit-learn", ".joblib": "scikit-learn", ".ubj": "xgboost",
                ".pt": "pytorch", ".pt2": "pytorch", ".pth": "pytorch"}
"""What a file's ending says about its framework when the caller does not say."""


@dataclass(frozen=True)
class Artifact:
    """A file or folder as the registry knows it, or would: its digest, whether it is a folder's tar, its own name, the
    framework that its ending (or a folder's ``MLmodel``) tells."""

    digest: str
    unpack: bool
    filename: str
    framework: str | None


def _chunks(source: Path) -> Iterator[bytes]:
    """A file's bytes, or a folder's as the tar that equal folders have in common."""
    if source.is_dir():
        from ..core.archives import pack

        yield from pack(source)
        return
    with source.open("rb") as f:
        while block := f.read(CHUNK):
            yield block


def _digest(source: Path, on_progress: OnProgress | None) -> tuple[str, int]:
    total, done, hashed = source.stat().st_size if source.is_file() else 0, 0, hashlib.sha256()
    for block in _chunks(source):
        hashed.update(block)
        done += len(block)
        if on_progress:
            on_progress(Progress("hash", done, max(total, done)))
    return f"sha256:{hashed.hexdigest()}", done


def inspect(source: Path, on_progress: OnProgress | None = None) -> tuple[Artifact, int]:
    """What ``upload`` would store, and its size in bytes; reads it whole, sends nothing, blocks.

    Raises Invalid when there is nothing to read at ``source``.
    """
    try:
        if not (source.is_file() or source.is_dir()):
            raise Invalid(f"there is no file or folder '{source}'", field="path")
        digest, size = _digest(source, on_progress)
        return Artifact(digest, source.is_dir(), source.resolve().name, _framework(source)), size
    except OSError as exc:
        raise Invalid(f"cannot read '{source}': {exc.strerror or exc}", field="path") from exc


def _framework(source: Path) -> str | None:
    if source.is_dir():
        return "mlflow" if (source / "MLmodel").is_file() else None
    return FRAMEWORK_OF.get(source.suffix.lower())


async def upload(http: Http, source: Path, on_progress: OnProgress | None = None) -> Artifact:
    """Stores a file, or a folder as a tar, by its digest. What the registry has already is not sent again.

    Memory stays flat: 1 MiB at a time. Raises Invalid when there is nothing at ``source`` or it changes while
    it is read.
    """
    artifact, size = await asyncio.to_thread(inspect, source, on_progress)
    if not await _known(http, artifact.digest):
        try:
            await _put(http, source, artifact.digest, size, on_progress)
        except OSError as exc:
            raise Invalid(f"cannot read '{source}': {exc.strerror or exc}", field="path") from exc
    return artifact


async def _known(http: Http, digest: str) -> bool:
    try:
        await http.send("HEAD", path("artifacts", digest))
    except NotFound:
        return False
    return True


async def _put(http: Http, source: Path, digest: str, size: int, on_progress: OnProgress | None) -> None:
    async def body() -> AsyncIterator[bytes]:
        done, chunks = 0, _chunks(source)
        while block := await asyncio.to_thread(next, chunks, b""):
            yield block
            done += len(block)
            if on_progress:
                on_progress(Progress("upload", done, max(size, done)))

    head = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
    await http.send("PUT", path("artifacts", digest), chunks=body, headers=head)
