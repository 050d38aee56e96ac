"""The build log: a file while the build runs, a blob afterwards. Lines begin with the time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ..core.errors import NotFound
from ..core.layout import image_key
from ..kernel.service import Context
from .model import OVER, Image

CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]|\x1b\[[0-9;]*[A-Za-z]")
CHUNK = 64 * 1024
POLL_S = 0.15


def log_file(ctx: Context, doc: Image) -> Path:
    """Where the running build writes; any process with this data folder can read it."""
    return ctx.data / "image-builder" / "logs" / doc.workspace / doc.name / f"{doc.version}.log"


class BuildLog:
    """Appends whole lines. A build that is repeated goes on in the same file, saying so."""

    def __init__(self, path: Path, echo: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = path
        self._now = echo
        self._waiting: list[str] = []

    async def line(self, text: str) -> None:
        """One line, or several; credentials in URLs are masked."""
        self.note(text)
        await self.flush()

    def note(self, text: str) -> None:
        """As ``line``, written with the next one."""
        stamp = self._now().strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z "
        clean = CREDENTIALS.sub("***@", CONTROL.sub("", text))
        self._waiting += [stamp + part + "\n" for part in clean.splitlines() or [""]]

    async def flush(self) -> None:
        lines, self._waiting = self._waiting, []
        if lines:
            await asyncio.to_thread(self._append, "".join(lines))

    def _append(self, text: str) -> None:
        try:
            file = self._path.open("a", encoding="utf-8")
        except FileNotFoundError:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a", encoding="utf-8")
        with file:
            file.write(text)

    async def keep(self, ctx: Context, doc: Image) -> None:
        """The build is over: the file becomes a blob. Whoever follows goes on there, at the same byte."""
        lines, self._waiting = self._waiting, []
        data = await asyncio.to_thread(_whole, self._path)
        await ctx.blobs.put(image_key(doc.workspace, doc.id, "log"), _once(data + "".join(lines).encode()))
        if data:
            await self.forget()

    async def forget(self) -> None:
        """Takes the file away; fine when there is none."""
        await asyncio.to_thread(self._path.unlink, missing_ok=True)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _whole(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _part(path: Path, at: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(CHUNK)
    except FileNotFoundError:
        return b""


async def read_log(ctx: Context, doc: Image, *, follow: bool,
                   fresh: Callable[[], Awaitable[Image | None]]) -> AsyncIterator[bytes]:
    """The log so far; with ``follow`` until the build is over. ``fresh`` reads the document again.

    The blob begins with the same bytes as the file, so a reader changes over in the middle.
    """
    path, at = log_file(ctx, doc), 0
    while doc.phase not in OVER:
        while part := await asyncio.to_thread(_part, path, at):
            at += len(part)
            yield part
        if not follow:
            break
        await asyncio.sleep(POLL_S)  # another process may be writing: there is nothing to be woken by
        newest = await fresh()
        if newest is None:
            return
        doc = newest
    with suppress(NotFound):
        async for chunk in ctx.blobs.get(image_key(doc.workspace, doc.id, "log"), at):
            yield chunk
