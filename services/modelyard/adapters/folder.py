"""Files that appear whole or not at all: what the folder adapters stand on. Standard library only."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..core.errors import Invalid, ModelyardError, Unavailable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
R = TypeVar("R")


async def in_thread(fn: Callable[..., R], *args: Any) -> R:
    """Runs ``fn`` in a thread and, when cancelled, waits for it to end: its files are never closed under it."""
    work = asyncio.get_running_loop().run_in_executor(None, fn, *args)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({work})
        if not work.cancelled():
            work.exception()
        raise


def refuse(what: str, exc: OSError) -> ModelyardError:
    """Our error for the operating system's: full disks and closed doors can be mended, bad keys cannot."""
    if exc.errno in FULL:
        return Unavailable(f"disk full: cannot store {what} ({exc.strerror}); free some space, then try again")
    if exc.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        return Invalid(f"{what} is not usable as a blob key: {exc.strerror} (one key is the folder of another?)")
    return Unavailable(f"the blob folder does not take {what}: {exc.strerror or exc}; check that it is there and ours")


@contextmanager
def ours(what: str) -> Iterator[None]:
    """OSErrors of the block become ours; wrap file work in it, never a caller's stream."""
    try:
        yield
    except OSError as exc:
        raise refuse(what, exc) from exc


class Draft:
    """A file on its way. It is locked while somebody writes it, so that a sweep knows the dead from the living."""

    def __init__(self, folder: Path) -> None:
        while True:
            self.path = folder / secrets.token_hex(8)
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.file: BinaryIO = os.fdopen(fd, "wb")
            fcntl.flock(fd, fcntl.LOCK_EX)
            if self.path.exists():   # else a sweep came between making and locking it
                return
            self.file.close()

    def write(self, chunks: Sequence[bytes]) -> None:
        for chunk in chunks:
            self.file.write(chunk)

    def publish(self, path: Path, if_absent: bool) -> bool:
        """Durable, then visible under its name in one step. A parent may be pruned meanwhile: then again."""
        self.file.flush()
        os.fsync(self.file.fileno())
        while True:
            try:
                make_folder(path.parent)
                if if_absent:
                    os.link(self.path, path)
                else:
                    os.replace(self.path, path)
            except FileNotFoundError:
                if not self.path.exists():
                    raise
                continue
            except FileExistsError:
                if path.is_dir():
                    raise OSError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
                return False
            sync_folder(path.parent)
            return True

    def discard(self) -> None:
        """Takes away what was not published. Harmless after publishing."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.file.close()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    with suppress(FileNotFoundError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_folder(folder: Path) -> None:
    """The folder and its parents, each durable in the one above it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        sync_folder(folder.parent)
    with suppress(FileNotFoundError):  # pruned meanwhile: whoever needs it finds that out and makes it again
        if not stat.S_ISDIR(folder.stat().st_mode):  # one look: between two of them it may come and go
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One at a time in this folder, over all processes."""
    make_folder(folder)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def sweep(folder: Path) -> None:
    """Removes the drafts whose writers died: nobody holds their lock."""
    for path in folder.iterdir():
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
