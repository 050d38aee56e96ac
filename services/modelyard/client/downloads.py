"""Bytes on their way to a file here: whole or not at all, checked where the digest is known."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

from ..core.errors import Conflict, Invalid, Unavailable
from .http import Http, Params
from .uploads import OnProgress, Progress

CHUNK = 1 << 20


async def save(
    http: Http, where: str, target: Path, *, replace: bool = True, folder: bool = False, digest: str | None = None,
    size: int = 0, params: Params | None = None, on_progress: OnProgress | None = None,
) -> Path:
    """The body of a GET as the file ``target``; with ``folder`` it is a tar, unpacked there.

    Raises Conflict when ``target`` is there and may not be replaced, Invalid when it cannot be written, Unavailable
    when what came is not what ``digest`` says.
    """
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        await asyncio.to_thread(_check, target, replace and not folder)
        came = await _fetch(http, where, params, part, size, on_progress)
        if digest is not None and came != digest:
            raise Unavailable(f"what came for '{target.name}' is not what was registered; try again")
        await asyncio.to_thread(_place, part, target, folder)
    except OSError as exc:
        raise Invalid(f"cannot write '{target}': {exc.strerror or exc}") from exc
    finally:
        await asyncio.to_thread(part.unlink, missing_ok=True)
    return target


def _check(target: Path, replace: bool) -> None:
    if target.exists() and not replace:
        raise Conflict(f"'{target}' is there already; choose another place (--to), or replace a file with --force")
    target.parent.mkdir(parents=True, exist_ok=True)


async def _fetch(http: Http, where: str, params: Params | None, part: Path, size: int,
                 on_progress: OnProgress | None) -> str:
    done, hashed = 0, hashlib.sha256()
    file = await asyncio.to_thread(part.open, "wb")
    write: Callable[[bytes], int] = file.write
    try:
        async with http.stream(where, params=params) as body:
            async for block in body.iter_chunked(CHUNK):
                hashed.update(block)
                await asyncio.to_thread(write, block)
                done += len(block)
                if on_progress:
                    on_progress(Progress("download", done, max(size, done)))
    finally:
        await asyncio.to_thread(file.close)
    return f"sha256:{hashed.hexdigest()}"


def _place(part: Path, target: Path, folder: bool) -> None:
    if not folder:
        part.replace(target)
        return
    from ..core.archives import unpack

    with part.open("rb") as tar:
        unpack(tar, target)
