"""The spool: a folder of segments between a scoring process and the shipper beside it. Standard library only.

``<replica>-<n>.live`` is being written; its writer holds an exclusive flock, which the kernel drops when the
process dies, however it dies. ``<replica>-<n>.seg`` is closed and wants to be shipped. ``….new`` is a file in the
moment of its making: it has no record yet. ``grant`` holds the newest grant URL where a supervisor renews it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..core.layout import segment_name
from ..core.segments import START, new_mark, pack_json

GRANT = "grant"
T = TypeVar("T")
PLAIN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
JOINED, PIECES = 2**20, 1000
"""Up to so many bytes, joining the pieces costs less than telling the kernel of each; and more pieces than that (its
IOV_MAX is 1024) it does not take."""


class LiveSegment:
    """One segment file that this process writes. Not safe for two threads at once."""

    def __init__(self, spool: Path, replica: str, number: int, about: dict[str, Any], started_ns: int,
                 sync: bool = False) -> None:
        """``sync``: what is written is on the disk when ``write`` returns, the file's name included. Raises OSError;
        then nothing is left behind but perhaps a ``.new`` file."""
        self.mark = new_mark(secrets.token_bytes(4))
        self.number = number
        self.size = 0
        self.holds = 0
        self._sync = sync
        self._closed_as = spool / segment_name(replica, number)
        self._path = self._closed_as.with_suffix(".live")
        making = self._closed_as.with_suffix(".new")
        self._fd = os.open(making, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.write([pack_json(self.mark, START, about, started_ns=started_ns)], 0)
            os.rename(making, self._path)
            if sync:
                sync_folder(spool)
        except OSError:
            os.close(self._fd)
            for path in (making, self._path):
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise

    def write(self, pieces: Sequence[bytes], holds: int = 1) -> None:
        """All of it with one write, or an OSError and nothing of it in the file. ``holds`` tells how many
        frames worth shipping it carries."""
        wanted = sum(map(len, pieces))
        if wanted <= JOINED or len(pieces) > PIECES:
            pieces = (b"".join(pieces),)
        try:
            written = os.writev(self._fd, pieces)
            if written != wanted:
                raise OSError(errno.ENOSPC, f"only {written} of {wanted} bytes could be written")
            if self._sync:
                os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size += wanted
        self.holds += holds

    def close(self) -> None:
        """Gives it to the shipper. The lock goes last: nobody can take it for a dead writer's."""
        try:
            os.rename(self._path, self._closed_as)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Closes the file and leaves it to the shipper as a dead writer's."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def sync_folder(folder: Path) -> None:
    """The names in it are on the disk when this returns."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def used_bytes(spool: Path) -> int:
    """What the folder holds, in bytes; files that vanish meanwhile count nothing."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(spool) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def closed_segments(spool: Path) -> list[Path]:
    """Segments to ship, the oldest number of each replica first."""
    with contextlib.suppress(OSError):
        return sorted(Path(e.path) for e in os.scandir(spool) if e.name.endswith(".seg"))
    return []


def read_segment(path: Path) -> bytes:
    """Its bytes. OSError for what is no plain file: a writer may have fewer rights than who ships for it, and a link
    would lend it theirs."""
    fd = os.open(path, PLAIN)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file")
        return file.read()


def adopt_dead(spool: Path, older_than: float) -> int:
    """Closes the segments whose writer is dead, and removes ``.new`` leftovers last touched before
    ``older_than`` (epoch seconds). Returns how many segments were closed."""
    adopted = 0
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(spool)):
            with contextlib.suppress(OSError):
                if entry.name.endswith(".live"):
                    adopted += _adopt(Path(entry.path))
                elif entry.name.endswith(".new") and entry.stat().st_mtime < older_than:
                    os.unlink(entry.path)
    return adopted


def _adopt(path: Path) -> bool:
    """Renames one live file when its lock is free. A writer that closes it at this moment renames it first:
    then the path is gone and there is nothing to do."""
    fd = os.open(path, PLAIN)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(path, path.with_suffix(".seg"))
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def in_children(owner: T, let_go: Callable[[T], None]) -> None:
    """A forked child's copy of who writes here is told to let go, as long as there is one."""
    known = weakref.ref(owner)

    def told() -> None:
        if (mine := known()) is not None:
            let_go(mine)

    os.register_at_fork(after_in_child=told)
