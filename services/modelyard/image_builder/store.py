"""Layers into the image store, and layers that are there from an earlier build."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..kernel.service import Context
from .model import Image
from .parts import Made
from .tarring import CHUNK, Layer

T = TypeVar("T")
UPLOADS = 4
"""Blobs of one build on their way into the store at once."""


class _Absent(Exception):
    """The store asked for the bytes: it does not have them."""


async def put(ctx: Context, doc: Image, made: Made) -> bool:
    """Stores a layer; False when it was there."""
    source = Chunks(made.source) if isinstance(made.source, Path | bytes) else made.source
    return await ctx.images.put_blob(doc.repo, made.layer.digest, source)


@dataclass(frozen=True)
class Chunks:
    """A file or bytes as a stream that can be read again."""

    source: Path | bytes

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _read(self.source)


async def _read(source: Path | bytes) -> AsyncIterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    file = await asyncio.to_thread(source.open, "rb", buffering=0)
    try:
        while chunk := await asyncio.to_thread(file.read, CHUNK):
            yield chunk
    finally:
        file.close()


async def _refuse() -> AsyncIterator[bytes]:
    raise _Absent
    yield b""  # makes this a generator


async def there(ctx: Context, doc: Image, layers: Sequence[Layer]) -> bool:
    """Whether the store has all of them; it keeps them for this image from now on."""
    try:
        for layer in layers:
            await ctx.images.put_blob(doc.repo, layer.digest, _refuse())
    except _Absent:
        return False
    return True


def pack(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """For the memo."""
    return [asdict(layer) for layer in layers]


def unpack(entry: Any) -> list[Layer]:
    """From the memo."""
    return [Layer(**one) for one in entry]


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first error once everything else has ended, so that nothing goes on behind it."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [o for o in outcomes if not isinstance(o, BaseException)]
