"""The build log: a file where the build runs, and a blob for everybody else: as far as it is a moment ago while the
build goes on, whole afterwards. Lines begin with the time."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from ..core.errors import ModelyardError, NotFound, Unavailable
from ..core.layout import image_key
from ..kernel.service import Context
from .model import OVER, Image

CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]|\x1b\[[0-9;]*[A-Za-z]")
CHUNK = 64 * 1024
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
POLL_S = 0.15
SHOW_S = 0.5
HERE: set[Path] = set()
"""The logs of builds that this process runs: their files are ahead of the blobs."""


def log_file(ctx: Context, doc: Image) -> Path:
    """Where a build that this process runs writes."""
    return ctx.data / "image-builder" / "logs" / doc.workspace / doc.name / f"{doc.version}.log"


class BuildLog:
    """Appends whole lines. A build that is repeated, here or by another process, goes on where the last one was."""

    def __init__(self, path: Path, echo: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = path
        self._now = echo
        self._waiting: list[str] = []
        self._shown = 0
        self._turn = threading.Lock()

    async def line(self, text: str) -> None:
        """One line, or several; credentials in URLs are masked."""
        self.note(text)
        await self.flush()

    def note(self, text: str) -> None:
        """As ``line``, written with the next one."""
        clean = CREDENTIALS.sub("***@", CONTROL.sub("", text))
        self._waiting += [_stamped(self._now(), part) for part in clean.splitlines() or [""]]

    async def flush(self) -> None:
        """Writes what is noted; where the disk is full, with the next line: no build fails by its log."""
        lines, self._waiting = self._waiting, []
        if lines and not await asyncio.to_thread(self._append, "".join(lines)):
            self._waiting = lines + self._waiting

    def _append(self, text: str) -> bool:
        """False when there is no room: then nothing of it is written, no half line either."""
        data = text.encode()
        with self._turn:
            try:
                fd = _opened(self._path, APPEND)
            except OSError:
                return False
            try:
                before, written = os.fstat(fd).st_size, os.write(fd, data)
                if written < len(data):
                    os.ftruncate(fd, before)
                return written == len(data)
            except OSError:
                return False
            finally:
                os.close(fd)

    @asynccontextmanager
    async def shown(self, ctx: Context, doc: Image) -> AsyncIterator[None]:
        """Meanwhile those who follow it through another process see it too, ``SHOW_S`` later at most."""
        await self._go_on(ctx, doc)
        HERE.add(self._path)
        task = asyncio.create_task(self._show_on(ctx, doc))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            HERE.discard(self._path)

    async def _go_on(self, ctx: Context, doc: Image) -> None:
        """Begins with what the last builder showed, so that whoever follows reads on."""
        told = b""
        with suppress(NotFound):
            told = b"".join([chunk async for chunk in ctx.blobs.get(image_key(doc.workspace, doc.id, "log"))])
        await asyncio.to_thread(_begin_with, self._path, told)
        self._shown = len(told)

    async def _show_on(self, ctx: Context, doc: Image) -> None:
        while True:
            await asyncio.sleep(SHOW_S)
            with suppress(ModelyardError):  # later: the build does not wait for who reads along
                await self.show(ctx, doc)

    async def show(self, ctx: Context, doc: Image) -> None:
        """What is written so far is there for everybody."""
        data = await asyncio.to_thread(_whole, self._path)
        if len(data) > self._shown:
            await ctx.blobs.put(image_key(doc.workspace, doc.id, "log"), _once(data))
            self._shown = len(data)

    async def keep(self, ctx: Context, doc: Image) -> None:
        """The build is over: the file becomes a blob. Whoever follows goes on there, at the same byte."""
        lines, self._waiting = self._waiting, []
        data = await asyncio.to_thread(_whole, self._path)
        await ctx.blobs.put(image_key(doc.workspace, doc.id, "log"), _once(data + "".join(lines).encode()))
        if data:
            await self.forget()

    async def forget(self) -> None:
        """Takes the file away; fine when there is none."""
        await asyncio.to_thread(cleared, self._path)


def cleared(path: Path) -> None:
    """Takes a log's file away, and the folders above it that are then empty. Blocking."""
    path.unlink(missing_ok=True)
    with suppress(OSError):  # another log is there, or another took it away
        path.parent.rmdir()
        path.parents[1].rmdir()


def _stamped(when: datetime, text: str) -> str:
    return f"{when.strftime('%Y-%m-%dT%H:%M:%S.%f')[:-3]}Z {text}\n"


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _begin_with(path: Path, told: bytes) -> None:
    if not _whole(path).startswith(told):  # another process went on with it since
        with os.fdopen(_opened(path, APPEND | os.O_TRUNC), "wb") as file:
            file.write(told)


def _opened(path: Path, flags: int) -> int:
    """The file, in folders that somebody else's ``cleared`` may be taking away. Raises OSError."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return os.open(path, flags, 0o644)


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
        here = path in HERE
        async for part in _of_file(path, at) if here else _of_blob(ctx, doc, at):
            at += len(part)
            yield part
        if not follow:
            break
        await asyncio.sleep(POLL_S if here else SHOW_S)  # another process writes: there is nothing to be woken by
        newest = await fresh()
        if newest is None:  # deleted, and all of it gone since the last look
            yield _stamped(ctx.now(), "cancelled: it was deleted before it was built").encode()
            return
        doc = newest
    with suppress(NotFound):
        async for chunk in ctx.blobs.get(image_key(doc.workspace, doc.id, "log"), at):
            yield chunk
    if doc.phase == "cancelled":  # whoever built it does not write any more, and its log goes with it
        yield _stamped(doc.updated, f"cancelled: {doc.reason}").encode()


async def _of_file(path: Path, at: int) -> AsyncIterator[bytes]:
    while part := await asyncio.to_thread(_part, path, at):
        at += len(part)
        yield part


async def _of_blob(ctx: Context, doc: Image, at: int) -> AsyncIterator[bytes]:
    """What another builder showed; where that fails the next look, or the whole log at the end, tells."""
    with suppress(NotFound, Unavailable):
        async for part in ctx.blobs.get(image_key(doc.workspace, doc.id, "log"), at):
            yield part
