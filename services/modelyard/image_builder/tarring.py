"""Tar streams that are the same wherever and whenever they are made.

Every entry: owner 0/0, time 0, mode 644 or 755, PAX. Parents come before children, names in order, and the end is
two empty blocks and no more, so that layers can be joined into one archive.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import deflate

TAR = "application/vnd.oci.image.layer.v1.tar"
TAR_GZ = "application/vnd.oci.image.layer.v1.tar+gzip"
BLOCK = 512
END = bytes(2 * BLOCK)
CHUNK = 1 << 20
GZIP_LEVEL = 6
MEMBER = 4 << 20
"""So much of a tar is one gzip member, wherever its pieces end. A layer is several, one after the other."""
PACKER = ("libdeflate", deflate.__version__, GZIP_LEVEL, MEMBER)
"""What the digest of a gzipped layer follows from, beside its contents."""


@dataclass(frozen=True)
class Entry:
    """One file: its name in the archive, and where its bytes are (a path, or the bytes themselves)."""

    name: str
    source: Path | bytes
    executable: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer in the store's terms. ``diff_id`` is the digest of the tar, ``digest`` of what is stored of it."""

    title: str
    digest: str
    diff_id: str
    size: int
    media_type: str

    @property
    def descriptor(self) -> dict[str, object]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size,
                "annotations": {"io.modelyard.layer": self.title}}


def header(name: str, size: int = 0, *, folder: bool = False, executable: bool = False) -> bytes:
    """One entry's header block or blocks."""
    info = tarfile.TarInfo(name.rstrip("/") + "/" if folder else name)
    info.size, info.mtime = size, 0
    info.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
    info.mode = 0o755 if folder or executable else 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """What fills the last block of a file of ``size`` bytes."""
    return bytes(-size % BLOCK)


def parents(name: str, seen: set[str]) -> bytes:
    """Headers of the folders above ``name`` that are not in ``seen`` yet."""
    parts, out = name.split("/")[:-1], b""
    for depth in range(1, len(parts) + 1):
        folder = "/".join(parts[:depth])
        if folder not in seen:
            seen.add(folder)
            out += header(folder, folder=True)
    return out


def tar(entries: Iterable[Entry], end: bytes = END) -> Iterator[bytes]:
    """The archive of ``entries``, sorted by name, in pieces. Blocking: reads files."""
    seen: set[str] = set()
    for entry in sorted(entries, key=lambda e: e.name):
        size = len(entry.source) if isinstance(entry.source, bytes) else entry.source.stat().st_size
        yield parents(entry.name, seen) + header(entry.name, size, executable=entry.executable)
        if isinstance(entry.source, bytes):
            yield entry.source
        else:
            yield from file_chunks(entry.source, size)
        yield padding(size)
    yield end


def file_chunks(path: Path, size: int) -> Iterator[bytes]:
    """Exactly ``size`` bytes of a file; a file that changed its size meanwhile is an error."""
    with path.open("rb", buffering=0) as file:
        left = size
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise OSError(f"{path} became shorter while it was read")
            left -= len(chunk)
            yield chunk


def opened(source: Path | bytes) -> BinaryIO:
    """A file or bytes, to read and seek."""
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def write_layer(title: str, pieces: Iterable[bytes], out: BinaryIO, *, gzip: bool) -> Layer:
    """Writes a tar stream, as it is or gzipped, in one pass. Blocking."""
    if not gzip:
        return plain(title, _copied(pieces, out))
    whole, stored, size = hashlib.sha256(), hashlib.sha256(), 0
    for member in _members(pieces):
        whole.update(member)
        squeezed = deflate.gzip_compress(member, GZIP_LEVEL)
        size += len(squeezed)
        stored.update(squeezed)
        out.write(squeezed)
    return Layer(title, f"sha256:{stored.hexdigest()}", f"sha256:{whole.hexdigest()}", size, TAR_GZ)


def _members(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, ``MEMBER`` of them at a time; the last are what is left."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) > MEMBER:
            yield bytes(memoryview(held)[:MEMBER])
            del held[:MEMBER]
    yield bytes(held)


def plain(title: str, pieces: Iterable[bytes]) -> Layer:
    """The layer that an uncompressed tar stream is. Blocking."""
    whole, size = hashlib.sha256(), 0
    for piece in pieces:
        whole.update(piece)
        size += len(piece)
    return uncompressed(title, f"sha256:{whole.hexdigest()}", size)


def uncompressed(title: str, digest: str, size: int) -> Layer:
    """What is stored is the tar."""
    return Layer(title, digest, digest, size, TAR)


def _copied(pieces: Iterable[bytes], out: BinaryIO) -> Iterator[bytes]:
    for piece in pieces:
        out.write(piece)
        yield piece
