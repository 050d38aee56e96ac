"""One blob on its way into a registry: as one stream, resumed after a cut, checked before it is kept.

Blobs that are larger than a part are sent as ``docker push`` sends them, in a call whose end is not told before: each
part is read and hashed while the one before it is on the wire.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import suppress

from yarl import URL

from ..core.errors import Invalid, ModelyardError, NotFound, Unavailable
from .images_registry_errors_http import BROKEN, pause
from .images_registry_http import TRIES, Door, Reply

PART = 2 << 20
"""Bytes read at once: an upload holds two or three of these. What is no larger is sent in one piece."""
STRETCH = 128 << 20
"""Bytes sent in one call: what a cut costs at most, before a registry that keeps only what ended well."""
CANCEL_S = 5.0


class Lost(Unavailable):
    """The registry has not what it took, and we have it no more: only the whole can be sent again."""


async def send(door: Door, repo: str, digest: str, chunks: AsyncIterable[bytes], at: URL | None = None) -> None:
    """A blob, kept by the registry when this returns. One that it lost on the way is sent again, as often as ``TRIES``,
    when ``chunks`` can be read again; an iterator cannot. ``at`` is an upload that the registry has begun already."""
    for attempt in range(1, TRIES + 1):
        try:
            return await Upload(door, repo, digest, at).send(chunks)
        except Lost:
            if attempt == TRIES or isinstance(chunks, AsyncIterator):
                raise
            at = None
            await pause(attempt)


class Blob:
    """What is to be sent, in parts, from any byte on; each byte is hashed once, ahead of being asked for."""

    def __init__(self, chunks: AsyncIterable[bytes]) -> None:
        self._chunks, self._reader = chunks, chunks.__aiter__()
        self._ahead: asyncio.Task[bytes] | None = None
        self._seen, self._hashed, self._read = hashlib.sha256(), 0, 0
        self.place = 0
        """Of the first byte that was not given yet."""

    @property
    def digest(self) -> str:
        """Of all that was read."""
        return f"sha256:{self._seen.hexdigest()}"

    async def take(self) -> bytes:
        """The next part; a smaller one is the last, and b"" is behind it."""
        part = await self._next()
        self.place += len(part)
        self._ahead = asyncio.create_task(self._fetch()) if part else self._ahead
        return part

    async def ended(self) -> bool:
        return not await self._next()

    async def _next(self) -> bytes:
        if self._ahead is None:
            self._ahead = asyncio.create_task(self._fetch())
        return await asyncio.shield(self._ahead)  # a call that breaks off takes nothing with it

    async def stretch(self, start: int, end: int) -> AsyncIterator[bytes]:
        """From a byte on, in whole parts, as far as ``end`` or a little further."""
        await self.seek(start)
        while self.place < end and (part := await self.take()):
            yield part

    async def seek(self, start: int) -> None:
        """What is given next. Lost when it was given before, and cannot be read again."""
        if start == self.place:
            return
        if isinstance(self._chunks, AsyncIterator):
            raise Lost("what was sent of a blob cannot be read again here; try again")
        await self._idle()
        self._reader, self._read, self.place = self._chunks.__aiter__(), 0, start
        self._ahead = asyncio.create_task(self._fetch(start))

    async def _fetch(self, skip: int = 0) -> bytes:
        held: list[bytes] = []
        size = 0
        async for chunk in self._reader:
            held.append(chunk[skip:] if skip else chunk)
            size += len(held[-1])
            self._read += len(chunk) - len(held[-1])
            skip -= len(chunk) - len(held[-1])
            if size >= PART:
                break
        return await asyncio.to_thread(self._joined, held) if size else b""

    def _joined(self, held: list[bytes]) -> bytes:
        part = b"".join(held)
        new = self._read + len(part) - self._hashed
        if new > 0:
            self._seen.update(memoryview(part)[-new:])
            self._hashed += new
        self._read += len(part)
        return part

    def failed(self) -> BaseException | None:
        """Why it could not be read."""
        ahead = self._ahead
        return ahead.exception() if ahead is not None and ahead.done() and not ahead.cancelled() else None

    async def close(self) -> None:
        """Nothing is read any more when it returns."""
        if self._ahead is not None:
            self._ahead.cancel()
        await self._idle()

    async def _idle(self) -> None:
        """Lets go of what is read from."""
        if self._ahead is not None:
            await asyncio.wait({self._ahead})
            self.failed()  # somebody has to look at it
        if isinstance(self._reader, AsyncGenerator):
            await self._reader.aclose()


class Upload:
    """One try. ``at``, when it is given, is an upload that the registry has begun."""

    def __init__(self, door: Door, repo: str, digest: str, at: URL | None) -> None:
        self._door, self._path, self._repo, self._digest = door, f"/v2/{repo}", repo, digest
        self._at = at
        self._sent = 0
        self._about = f"blob {digest[:19]} of {repo}"

    async def send(self, chunks: AsyncIterable[bytes]) -> None:
        """All of it, kept by the registry when this returns. Invalid when it is not what the digest says. Whatever goes
        wrong, the upload is given up and nothing is kept."""
        blob = Blob(chunks)
        try:
            first = await blob.take()
            if await blob.ended():
                return await self._finish(blob.digest, first)
            while not await blob.ended():
                await self._stream(blob, first)
                first = b""
            await self._finish(blob.digest, b"")
        except BaseException:
            await self._give_up()
            raise
        finally:
            await blob.close()

    async def _begin(self) -> URL:
        if self._at is None:
            begun = await self._door.ask("POST", f"{self._path}/blobs/uploads/", about=self._about, ok=(202,),
                                         repo=self._repo, headers={"Content-Length": "0"})
            self._at = self._door.location(begun.headers, begun.url)
        return self._at

    async def _stream(self, blob: Blob, first: bytes) -> None:
        """One call's worth; after a cut the registry is asked how much it has, and gets the rest. ``first`` was taken
        from the blob before."""
        async def body() -> AsyncIterator[bytes]:
            nonlocal first
            taken, first = first, b""
            if taken:
                yield taken
            async for part in blob.stretch(self._sent + len(taken), self._sent + STRETCH):
                yield part

        at = await self._begin()
        for attempt in range(1, TRIES + 1):
            try:
                done = await self._door.ask("PATCH", at, about=self._about, ok=(202, 204, 404, 416), repo=self._repo,
                                            headers={"Content-Type": "application/octet-stream"}, data=body, tries=1)
            except Unavailable as exc:
                if (failed := blob.failed()) is not None:
                    raise failed from exc
                if attempt == TRIES:
                    raise
                await pause(attempt, exc)
            else:
                if done.status not in (404, 416):
                    self._at = self._door.location(done.headers, done.url)
                    self._sent = blob.place
                    return
            await self._ask_offset(self._sent, blob.place)
            await blob.seek(self._sent + len(first))
            at = await self._begin()

    async def _ask_offset(self, low: int, high: int) -> None:
        """How much the registry has. Lost when that is not what is in our hands; so is it always where a registry signs
        the offset of an upload, and took more than it told (CNCF Distribution)."""
        try:
            told = await self._door.ask("GET", await self._begin(), about=self._about, ok=(204, 200), repo=self._repo)
        except NotFound as exc:
            raise Lost(f"{self._about}: the registry {self._door.host} lost the upload; try again") from exc
        self._sent = _offset(told)
        if not low <= self._sent <= high:
            raise Lost(f"{self._about}: the registry {self._door.host} has {self._sent} bytes of it, where {low} were "
                       "taken; try again")
        with suppress(Unavailable):
            self._at = self._door.location(told.headers, told.url)

    async def _finish(self, found: str, last: bytes) -> None:
        if found != self._digest:
            raise Invalid(f"the bytes given for {self._digest} hash to {found}; nothing was kept",
                          code="digest-mismatch")
        for attempt in range(1, TRIES + 1):
            at = (await self._begin()).update_query(digest=self._digest)
            try:
                await self._door.ask("PUT", at, about=self._about, ok=(201, 204), repo=self._repo, data=last, tries=1,
                                     headers={"Content-Type": "application/octet-stream"})
            except (Unavailable, NotFound) as exc:  # the answer may be all that was lost
                if await self._kept():
                    break
                if self._sent:
                    raise Lost(f"{self._about}: the registry {self._door.host} did not keep it; try again") from exc
                if attempt == TRIES:
                    raise
                await pause(attempt, exc)
                self._at = None  # all of it is in our hands: a new upload is the surest
                continue
            break
        self._at = None

    async def _kept(self) -> bool:
        with suppress(ModelyardError):
            found = await self._door.ask("HEAD", f"{self._path}/blobs/{self._digest}", about=self._about, ok=(200, 404),
                                         repo=self._repo)
            return found.status == 200
        return False

    async def _give_up(self) -> None:
        """Tells the registry, as far as it listens; else it sweeps old uploads itself."""
        if self._at is None:
            return
        with suppress(ModelyardError, asyncio.CancelledError, *BROKEN):
            async with asyncio.timeout(CANCEL_S):
                await self._door.ask("DELETE", self._at, about=self._about, ok=(202, 204, 404), repo=self._repo,
                                     tries=1)


def _offset(told: Reply) -> int:
    """``Range: 0-4194303`` → 4194304. Of nothing at all a registry says ``0-0``, too."""
    last = told.headers.get("Range", "").removeprefix("bytes=").rpartition("-")[2]
    return int(last) + 1 if last.isascii() and last.isdigit() and last != "0" else 0
