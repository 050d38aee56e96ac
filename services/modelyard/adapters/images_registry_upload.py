"""One blob on its way into a registry: in parts, resumed after a cut, checked before it is kept."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import suppress

from yarl import URL

from ..core.errors import Invalid, ModelyardError, NotFound, Unavailable
from .images_registry_errors_http import BROKEN, pause
from .images_registry_http import TRIES, Door, Reply

PART = 4 << 20
"""Bytes sent in one call: what an upload holds in memory, and what a cut may cost at most."""
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


class Upload:
    """One try. ``at``, when it is given, is an upload that the registry has begun."""

    def __init__(self, door: Door, repo: str, digest: str, at: URL | None) -> None:
        self._door, self._path, self._repo, self._digest = door, f"/v2/{repo}", repo, digest
        self._at = at
        self._sent = 0
        self._seen = hashlib.sha256()
        self._about = f"blob {digest[:19]} of {repo}"

    async def send(self, chunks: AsyncIterable[bytes]) -> None:
        """All of it, kept by the registry when this returns. Invalid when it is not what the digest says. Whatever goes
        wrong, the upload is given up and nothing is kept."""
        held: list[bytes] = []
        size = 0
        try:
            async for chunk in chunks:
                held.append(chunk)
                size += len(chunk)
                if size >= PART:
                    await self._patch(b"".join(held))
                    held, size = [], 0
            await self._finish(b"".join(held))
        except BaseException:
            await self._give_up()
            raise

    async def _begin(self) -> URL:
        if self._at is None:
            begun = await self._door.ask("POST", f"{self._path}/blobs/uploads/", about=self._about, ok=(202,),
                                         repo=self._repo, headers={"Content-Length": "0"})
            self._at = self._door.location(begun.headers, begun.url)
        return self._at

    async def _patch(self, part: bytes) -> None:
        """One part; after a cut the registry is asked how much it has, and gets the rest."""
        self._seen.update(part)
        at, end = await self._begin(), self._sent + len(part)
        for attempt in range(1, TRIES + 1):
            rest = part[len(part) - (end - self._sent):]
            if not rest:
                return
            headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{self._sent}-{end - 1}"}
            try:
                done = await self._door.ask("PATCH", at, about=self._about, ok=(202, 204, 404, 416), repo=self._repo,
                                            headers=headers, data=rest, tries=1)
            except Unavailable as exc:
                if attempt == TRIES:
                    raise
                await pause(attempt, exc)
            else:
                if done.status not in (404, 416):
                    self._at = self._door.location(done.headers, done.url)
                    self._sent = end
                    return
            await self._ask_offset(end - len(part), end)
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

    async def _finish(self, last: bytes) -> None:
        if self._sent:
            if last:
                await self._patch(last)
            last = b""
        else:
            self._seen.update(last)
        found = f"sha256:{self._seen.hexdigest()}"
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
