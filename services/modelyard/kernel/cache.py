"""The user's cache: what was made on this machine once and can be made again, shared by all data folders.

``$XDG_CACHE_HOME/modelyard``, else ``~/.cache/modelyard``; 0700. An entry is ``<kind>/<name>``, a file or a folder,
named by the digest of what it is or was made from. It appears whole, by a rename, and its time is when it was last
used. Only ever a cache: deleting any of it at any moment costs time and nothing else, and where it cannot be read or
written (no home, full, read-only, another file system) everything works without it and nobody is told.

It is not guarded against its owner: scoring code runs as the same user, who could as well change the data folders,
uv's cache or Modelyard itself. Against other users it is: a folder that is not ours, or that others may write to, is
not used. All of it blocks: call it from a thread.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

UNUSED_S = 30 * 24 * 3600.0
DAY_S = 24 * 3600.0
CAP = 10 << 30
"""Bytes in all; beyond it the entries that were used longest ago go first."""
OTHERS_WRITE = 0o022


def user_folder() -> Path | None:
    """Where the cache is, whether or not it exists; None for a user without a home."""
    above = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(above):
        return Path(above, "modelyard")
    with suppress(RuntimeError):
        return Path.home() / ".cache" / "modelyard"
    return None


class Cache:
    """Any number of processes may use the same one. ``folder``: the user's own when not given."""

    def __init__(self, folder: Path | None = None, *, clock: Callable[[], float] = time.time, cap: int = CAP) -> None:
        self._folder = folder or user_folder()
        self._clock = clock
        self._cap = cap

    def find(self, kind: str, name: str) -> Path | None:
        """The entry, which counts as used now; None when there is none."""
        place = self._place(kind, name)
        if place is None or not self._safe():
            return None
        with suppress(OSError):  # a cache that can only be read is as good
            self._touch(place)
        return place if place.exists() and not place.is_symlink() else None

    def keep(self, kind: str, name: str, make: Callable[[Path], None]) -> bool:
        """Adds an entry: ``make`` makes it at the path it is given. When it raises OSError, or somebody was faster,
        nothing is left of it. True when the entry is there now."""
        place = self._place(kind, name)
        if place is None:
            return False
        beside = place.with_name(f".{secrets.token_hex(8)}")
        try:
            self._open(place.parent)
            make(beside)
            self._touch(beside)
            beside.rename(place)
        except OSError:
            return self._safe() and os.path.lexists(place)
        finally:
            _delete(beside)
        return True

    def drop(self, kind: str, name: str) -> None:
        """Takes an entry away: it was damaged."""
        if (place := self._place(kind, name)) is not None and self._safe():
            _remove(place)

    def prune(self, every_s: float = 0.0) -> None:
        """Takes away what was not used for 30 days, and what is over the cap. Nothing when that was done, by
        whichever process, less than ``every_s`` ago."""
        if self._folder is None or not self._safe():
            return
        with suppress(OSError):
            stamp, now = self._folder / ".pruned", self._clock()
            if stamp.exists() and 0 <= now - stamp.stat().st_mtime < every_s:
                return
            stamp.touch()
            self._touch(stamp)
            self._prune(now)

    def _prune(self, now: float) -> None:
        kept: list[tuple[float, int, Path]] = []
        for used, path in self._entries():
            age = now - used
            if path.name.startswith("."):
                if age > DAY_S:  # of a process that died while it added it, or took it away
                    _delete(path)
            elif age > UNUSED_S:
                _remove(path)
            else:
                kept.append((used, _size(path), path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self._cap:
                break
            _remove(path)
            total -= size

    def _entries(self) -> Iterator[tuple[float, Path]]:
        assert self._folder is not None
        for kind in [kind for kind in self._folder.iterdir() if kind.is_dir() and not kind.is_symlink()]:
            for entry in list(os.scandir(kind)):
                with suppress(OSError):
                    yield entry.stat(follow_symlinks=False).st_mtime, Path(entry.path)

    def _place(self, kind: str, name: str) -> Path | None:
        if self._folder is None or not name or name.startswith(".") or "/" in name or "\0" in name:
            return None
        return self._folder / kind / name

    def _touch(self, path: Path) -> None:
        now = self._clock()
        os.utime(path, (now, now), follow_symlinks=False)

    def _safe(self) -> bool:
        try:
            about = os.stat(self._folder or "")
        except OSError:
            return False
        return about.st_uid == os.geteuid() and not about.st_mode & OTHERS_WRITE

    def _open(self, kind: Path) -> None:
        """Makes the folders. PermissionError when the cache is not ours alone."""
        kind.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._safe():
            raise PermissionError(13, "not ours alone", str(kind.parent))
        kind.mkdir(mode=0o700, exist_ok=True)


def _remove(place: Path) -> None:
    """Gone at once for everybody who looks, then from the disk."""
    doomed = place.with_name(f".{secrets.token_hex(8)}")
    with suppress(OSError):
        place.rename(doomed)
        _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Bytes of all files of an entry; what vanishes meanwhile does not count."""
    total = 0
    with suppress(OSError):
        total = 0 if path.is_dir() else path.lstat().st_size
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total
