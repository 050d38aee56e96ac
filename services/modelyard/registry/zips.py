"""Zips that nobody trusts: their directory is read only when it is of a sane size, and so is each entry."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import BinaryIO

MOST_DIRECTORY = 4 << 20
MOST_ENTRY = 16 << 20


class BadZip(Exception):
    """Says why, as the end of a sentence that begins with "the file"."""


def opened(file: BinaryIO, size: int) -> zipfile.ZipFile:
    """Raises BadZip."""
    tail = min(size, 22 + 65535)
    file.seek(size - tail)
    raw = file.read(tail)
    at = raw.rfind(b"PK\x05\x06")
    length = struct.unpack("<I", raw[at + 12:at + 16])[0] if 0 <= at <= len(raw) - 22 else MOST_DIRECTORY + 1
    if length > MOST_DIRECTORY:
        raise BadZip("begins as a zip, but its directory is missing or too large")
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as exc:
        raise BadZip(f"begins as a zip, but cannot be read as one: {exc}") from exc


def entry(archive: zipfile.ZipFile, name: str, most: int = MOST_ENTRY) -> bytes:
    """An entry's bytes, or its first ``most``: what the directory says of its size is not believed. Raises BadZip."""
    try:
        with archive.open(name) as found:
            return found.read(most)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, KeyError, EOFError, OSError, RuntimeError,
            struct.error, zlib.error) as exc:
        raise BadZip(f"has an entry {name} that cannot be read: {exc}") from exc
