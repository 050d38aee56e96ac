"""Folders as artifacts: an uncompressed PAX tar with sorted names, mtime 0, uid and gid 0, modes 644 or 755 and
regular files only, so that equal folders have equal digests.

Reading trusts nothing. It is our own parser: ``tarfile``'s filters can be led out of the folder (CVE-2025-4517).
What is not a plain file below the root is refused, and every number is checked against the bytes that are there.
Everything here works on open files and blocks; call it from a thread.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import Conflict, Invalid, Unavailable
from .tarball import BLOCK, CHUNK, Reader, bad, next_header

DEPTH = 64
KINDS = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a named pipe",
         "S": "a sparse file"}
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
LEFT_OUT = "__pycache__"


@dataclass(frozen=True)
class Limits:
    """What an archive may hold: entries, and bytes of all files together."""

    entries: int = 10_000
    size: int = 10 << 30


LIMITS = Limits()


@dataclass(frozen=True)
class Entry:
    """One file: its path below the root, ``/``-separated; its size and where its bytes begin in the archive."""

    name: str
    size: int
    offset: int
    executable: bool


# -- writing --------------------------------------------------------------------------------------------------------


def pack(folder: Path) -> Iterator[bytes]:
    """The archive of a folder, in pieces. Equal files give equal bytes, whatever their times, owners and order.

    Byte code caches (``__pycache__``) and empty folders are left out. Raises Invalid for links, devices and names
    that are not UTF-8, for an empty folder, and when a file changes its size meanwhile.
    """
    files = sorted(_files(folder, ""))
    if not files:
        raise Invalid(f"there is no file in {folder}")
    if len(files) > LIMITS.entries:
        raise Invalid(f"{folder} has more than {LIMITS.entries} files")
    for name, path in files:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            info = tarfile.TarInfo(name)
            info.size = found.st_size
            info.mode = 0o755 if found.st_mode & 0o100 else 0o644
            yield info.tobuf(tarfile.PAX_FORMAT)
            left = found.st_size
            while left and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk
            if left or file.read(1):
                raise Invalid(f"{path} changed while it was read; try again")
            yield bytes(-found.st_size % BLOCK)
    yield bytes(2 * BLOCK)


def _files(folder: Path, base: str) -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as found:
        for one in found:
            name = base + one.name
            _clean(name)
            if one.is_symlink() or not (one.is_dir() or one.is_file()):
                raise Invalid(f"{one.path} is not a regular file; put a copy there (links are not packed)")
            if one.is_file():
                yield name, Path(one.path)
            elif one.name != LEFT_OUT:
                yield from _files(Path(one.path), name + "/")


# -- reading --------------------------------------------------------------------------------------------------------


def inspect(source: BinaryIO, limits: Limits = LIMITS) -> list[Entry]:
    """Every file of an archive, or Invalid (``bad-archive``) saying why it is refused. Writes nothing.

    File contents are passed over by ``seek`` where the source can, so this takes time by entries, not by size.
    """
    return [entry for entry, _ in entries(source, limits)]


def unpack(source: BinaryIO, dest: Path, limits: Limits = LIMITS) -> list[Entry]:
    """Writes an archive's files below ``dest``, which is absent or empty: all of them or, on any error, nothing.

    Raises Invalid as ``inspect`` does, Conflict when ``dest`` holds something, Unavailable when the disk is full.
    """
    if source.seekable():   # so that a bad one costs no writing at all
        at = source.tell()
        inspect(source, limits)
        source.seek(at)
    draft: Path | None = None
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".unpack-", dir=dest.parent))
        done = []
        for entry, content in entries(source, limits):
            _write(draft / entry.name, content, 0o755 if entry.executable else 0o644)
            done.append(entry)
        draft.chmod(0o755)
        draft.rename(dest)
        return done
    except OSError as exc:
        if exc.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise Conflict(f"{dest} cannot be a folder here: something is there already") from exc
        why = "disk full" if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else exc.strerror
        raise Unavailable(f"cannot unpack to {dest}: {why}") from exc
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def _write(path: Path, content: Iterator[bytes], mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        for chunk in content:
            file.write(chunk)


def entries(source: BinaryIO, limits: Limits = LIMITS) -> Iterator[tuple[Entry, Iterator[bytes]]]:
    """Each file with its bytes, in the archive's order. What is left unread of one is passed over."""
    reader, seen = Reader(source), _Names()
    count = total = 0
    while (header := next_header(reader)) is not None:
        count += 1
        total += header.size
        if count > limits.entries:
            raise bad(f"it has more than {limits.entries} entries")
        if total > limits.size:
            raise bad(f"its files have more than {limits.size} bytes")
        if header.kind in KINDS:
            raise bad(f"'{header.name}' is {KINDS[header.kind]}; only regular files are taken")
        if header.kind not in ("0", "\0", "5"):
            raise bad(f"'{header.name}' is of the unknown kind {header.kind!r}; only regular files are taken")
        name = _clean(header.name)
        if header.kind == "5":   # a folder by itself says nothing: it comes with its files
            if header.size:
                raise bad(f"the folder '{name}' has a size")
            continue
        if not name or header.name.endswith(("/", "/.")):
            raise bad(f"'{header.name}' is not the name of a file")
        seen.add(name)
        end = reader.at + header.size + -header.size % BLOCK
        yield Entry(name, header.size, reader.at, bool(header.mode & 0o100)), reader.content(header.size)
        reader.skip_to(end)


class _Names:
    """Files and the folders they imply: no name twice, and no file that is another's folder."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.folders: set[str] = set()

    def add(self, name: str) -> None:
        parents = {name[:at] for at, letter in enumerate(name) if letter == "/"}
        if name in self.files:
            raise bad(f"'{name}' is in it twice")
        if name in self.folders or not self.files.isdisjoint(parents):
            raise bad(f"'{name}' is both a file and a folder")
        self.files.add(name)
        self.folders |= parents


def _clean(name: str) -> str:
    """The name without ``./`` before it. Raises Invalid for every name that could lead somewhere else."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise bad(f"the name {name!a} is not UTF-8") from None
    if CONTROL.search(name):
        raise bad(f"the name {name!a} has control characters")
    if name.startswith("/"):
        raise bad(f"'{name}' is an absolute name")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise bad(f"'{name}' leads out of the folder")
    if size > 1024 or len(parts) > DEPTH or any(len(part.encode()) > 255 for part in parts):
        raise bad(f"the name '{name[:80]}…' is too long or too deep")
    return "/".join(parts)
