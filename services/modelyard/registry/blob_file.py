"""A blob as a file that threads can read and seek, so that ordinary parsers look into it without a copy."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar, cast

from ..ports.blobs import BlobStore

R = TypeVar("R")
NEAR = 4 << 20
BUFFER = 64 * 1024
THREADS = ThreadPoolExecutor(2, thread_name_prefix="inspect")
"""Of their own: these threads wait for the blob store, whose adapter may need the loop's usual ones."""


class _BlobFile(io.RawIOBase):
    """Keeps one stream of the blob open; goes on in it while reads move forward, opens it anew otherwise."""

    def __init__(self, blobs: BlobStore, key: str, size: int) -> None:
        self._blobs, self._key, self._size = blobs, key, size
        self._loop = asyncio.get_running_loop()
        self._source: AsyncIterator[bytes] | None = None
        self._next = self._at = self._begin = 0
        self._chunk = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        if not self._begin <= self._at < self._begin + len(self._chunk):
            asyncio.run_coroutine_threadsafe(self._pull(), self._loop).result()
        start = self._at - self._begin
        data = memoryview(self._chunk)[start:start + len(buffer)]
        buffer[:len(data)] = data
        self._at += len(data)
        return len(data)

    async def _pull(self) -> None:
        """Makes ``_chunk`` the piece that holds ``_at``; empty at the end of the blob."""
        if self._source is None or not self._next <= self._at <= self._next + NEAR:
            await self.end()
            self._source, self._next = aiter(self._blobs.get(self._key, self._at)), self._at
        while True:
            self._begin = self._next
            self._chunk = await anext(self._source, b"")
            self._next += len(self._chunk)
            if not self._chunk or self._next > self._at:
                return

    async def end(self) -> None:
        source, self._source = self._source, None
        await _end(source)


async def _end(source: AsyncIterator[bytes] | None) -> None:
    if (close := getattr(source, "aclose", None)) is not None:
        await close()


async def _whole(source: AsyncIterator[bytes], size: int) -> bytes:
    """Its bytes, without asking whether there are more."""
    found = b""
    try:
        while len(found) < size and (chunk := await anext(source, b"")):
            found += chunk
    finally:
        await _end(source)
    return found


async def inspect(blobs: BlobStore, key: str, size: int, look: Callable[[BinaryIO], R]) -> R:
    """Runs ``look`` in a thread over the blob, ``size`` bytes long. Raises what it and the store raise."""
    if size <= BUFFER:  # fetched whole: that costs less than one question from the thread
        whole = await _whole(blobs.get(key), size)
        return await asyncio.get_running_loop().run_in_executor(THREADS, look, io.BytesIO(whole))
    raw = _BlobFile(blobs, key, size)
    file = cast(BinaryIO, io.BufferedReader(raw, BUFFER))
    work = asyncio.get_running_loop().run_in_executor(THREADS, look, file)
    try:
        return await asyncio.shield(work)
    finally:
        await asyncio.wait({work})   # it reads through this loop: let it end before its stream is closed
        await raw.end()
