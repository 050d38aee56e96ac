"""ImageStore on one folder: an OCI image layout (``oci-layout``, ``index.json``, ``blobs/sha256``).

Any tool that reads layouts can read it. Beside the standard's files lie ``.lock`` (one writer of the index at a
time, over all processes; the kernel lets go of it when its holder dies), ``.tmp`` (small files on their way),
``.uploads`` (each is locked while somebody writes it; the next process takes away what nobody does) and
``.pins``: a pin says that a repo has put or found a blob that no manifest names yet, so that ``remove`` leaves
it alone. ``put_manifest`` takes the pins of its blobs away; one older than a day belongs to a dead build.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import Invalid, NotFound, Unavailable
from ..ports.images import ImageStore
from .folder import in_thread, sweep
from .images_names import descriptors, hex_of, is_manifest, parts, repo_of, tag_of

CHUNK = 1 << 20
STALE_S = 24 * 3600.0
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
LISTS = frozenset({INDEX_TYPE, "application/vnd.docker.distribution.manifest.list.v2+json"})
REF_NAME = "org.opencontainers.image.ref.name"


def _name(repo: str, tag: str) -> str:
    tag_of(tag)
    return f"{repo_of(repo)}:{tag}"


class LayoutImages(ImageStore):
    """One layout folder, shared by any number of processes on one machine."""

    def __init__(self, root: Path) -> None:
        self._root = Path(root)
        self._blobs = self._root / "blobs" / "sha256"
        self._tmp = self._root / ".tmp"
        self._up = self._root / ".uploads"
        self._pins = self._root / ".pins"
        self._needs: dict[str, frozenset[str]] = {}
        self._made = False

    async def check(self) -> None:
        """Writes and takes away one small file."""
        await in_thread(self._check)

    async def close(self) -> None:
        """Nothing is held between calls."""

    async def put_blob(self, repo: str, digest: str, chunks: AsyncIterable[bytes]) -> bool:
        """Streams into ``.tmp``, checks the digest, then moves into place: nobody sees half a blob."""
        if await in_thread(self._pin, repo_of(repo), hex_of(digest)):
            return False
        upload = _Upload(self._up / secrets.token_hex(16))
        try:
            async for chunk in chunks:
                if upload.hold(chunk):
                    await in_thread(self._guarded, upload.flush)
            return await in_thread(self._guarded, self._keep, upload, repo, digest)
        finally:
            await in_thread(upload.end)

    async def get_blob(self, repo: str, digest: str, start: int = 0) -> AsyncIterator[bytes]:
        """Reads from ``start``; goes on reading when the blob is taken away meanwhile."""
        path = self._blobs / hex_of(digest)
        repo_of(repo)
        if start < 0:
            raise Invalid("a blob is read from byte 0 or later")
        file = await in_thread(_open, path, digest, start)
        seen = hashlib.sha256() if start == 0 else None
        try:
            while chunk := await in_thread(_read, file, seen):
                yield chunk
        finally:
            file.close()
        if seen is not None and f"sha256:{seen.hexdigest()}" != digest:
            raise Invalid(f"blob {digest} is damaged on disk: its bytes hash to sha256:{seen.hexdigest()}")

    async def put_manifest(self, repo: str, tag: str, manifest: bytes, media_type: str) -> str:
        """The tag moves in one step; what only the manifest before it needed goes."""
        name = _name(repo, tag)
        return await in_thread(self._guarded, self._put_manifest, repo, name, manifest, media_type)

    async def get_manifest(self, repo: str, reference: str) -> tuple[bytes, str] | None:
        """By tag or by digest; a digest counts only while the index lists it, or a list in it does. In a layout that
        another tool wrote a tag stands there without a repository: any fits, and none is ``latest``."""
        return await in_thread(self._get_manifest, repo_of(repo), reference)

    async def remove(self, repo: str, tag: str) -> None:
        """The tag goes first, then the blobs: a crash between leaves only unused blobs, and the same call again
        has nothing to do with them; the sweep of old pins does."""
        await in_thread(self._guarded, self._remove, _name(repo, tag))

    # Everything below runs in worker threads.

    def _guarded(self, fn: Any, *args: Any) -> Any:
        try:
            return fn(*args)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Unavailable(f"the disk of the image folder {self._root} is full; free some space") from exc
            raise Unavailable(f"the image folder {self._root} cannot be written: {exc.strerror or exc}") from exc

    def _prepare(self) -> None:
        if self._made:
            return
        for folder in (self._blobs, self._tmp, self._up, self._pins):
            folder.mkdir(parents=True, exist_ok=True)
        sweep(self._up)
        if not (self._root / "oci-layout").exists():
            _replace(self._root / "oci-layout", LAYOUT, self._tmp)
        self._made = True

    def _check(self) -> None:
        def probe() -> None:
            self._prepare()
            path = self._tmp / secrets.token_hex(16)
            path.write_bytes(b"")
            path.unlink()

        self._guarded(probe)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._prepare()
        fd = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _pin_path(self, repo: str, hex_: str) -> Path:
        return self._pins / f"{hex_}.{repo.replace('/', '~')}"

    def _pin(self, repo: str, hex_: str) -> bool:
        def pin() -> bool:
            with self._locked():
                if not (self._blobs / hex_).exists():
                    return False
                self._pin_path(repo, hex_).touch()
                return True

        return bool(self._guarded(pin))

    def _keep(self, upload: _Upload, repo: str, digest: str) -> bool:
        upload.flush(last=True)
        if upload.digest != digest:
            raise Invalid(f"the bytes given for {digest} hash to {upload.digest}; nothing was kept",
                          code="digest-mismatch")
        hex_ = hex_of(digest)
        with self._locked():
            there = (self._blobs / hex_).exists()
            self._pin_path(repo, hex_).touch()
            if not there:
                upload.path.rename(self._blobs / hex_)
                upload.open = False
        return not there

    def _index(self) -> list[dict[str, Any]]:
        try:
            listed = json.loads((self._root / "index.json").read_bytes()).get("manifests", [])
        except FileNotFoundError:
            return []
        except ValueError as exc:
            raise Unavailable(f"{self._root / 'index.json'} is damaged: {exc}") from exc
        return list(listed)

    def _write_index(self, manifests: list[dict[str, Any]]) -> None:
        body = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}
        _replace(self._root / "index.json", json.dumps(body, separators=(",", ":")).encode(), self._tmp)

    def _put_manifest(self, repo: str, name: str, manifest: bytes, media_type: str) -> str:
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        with self._locked():
            needs = self._complete(manifest)
            path = self._blobs / hex_of(digest)
            if not path.exists():
                _replace(path, manifest, self._tmp)
            before = self._index()
            entry = {"mediaType": media_type, "digest": digest, "size": len(manifest), "annotations": {REF_NAME: name}}
            after = [*(m for m in before if _ref(m) != name), entry]
            if after != before:
                self._write_index(after)
            for hex_ in (*needs, hex_of(digest)):
                self._pin_path(repo, hex_).unlink(missing_ok=True)
            self._collect([m["digest"] for m in before if _ref(m) == name and m["digest"] != digest], after)
        return digest

    def _complete(self, manifest: bytes) -> frozenset[str]:
        """What the manifest needs (hex). Raises Invalid for what is not a manifest, or names what is not here."""
        sizes = {hex_of(part["digest"]): part["size"] for part in parts(manifest)}
        for hex_, size in sizes.items():
            path = self._blobs / hex_
            if not path.exists() or path.stat().st_size != size:
                raise Invalid(f"the manifest needs blob sha256:{hex_} of {size} bytes; put it first",
                              code="blob-missing")
        return frozenset(sizes)

    def _get_manifest(self, repo: str, reference: str) -> tuple[bytes, str] | None:
        by_digest = reference.startswith("sha256:")
        wanted = {f"sha256:{hex_of(reference)}"} if by_digest else {_name(repo, reference), reference}
        if reference == "latest":
            wanted.add("")
        for entry in self._entries(by_digest):
            if (entry["digest"] if by_digest else _ref(entry)) in wanted:
                with suppress(FileNotFoundError):
                    return (self._blobs / hex_of(entry["digest"])).read_bytes(), entry["mediaType"]
        return None

    def _entries(self, nested: bool) -> Iterator[dict[str, Any]]:
        """What the index lists; ``nested``: and what the lists that it lists do."""
        waiting = self._index()
        while waiting:
            entry = waiting.pop(0)
            yield entry
            if nested and entry["mediaType"] in LISTS:
                with suppress(FileNotFoundError, ValueError):
                    waiting += json.loads((self._blobs / hex_of(entry["digest"])).read_bytes()).get("manifests", ())

    def _remove(self, name: str) -> None:
        with self._locked():
            before = self._index()
            after = [m for m in before if _ref(m) != name]
            if len(after) != len(before):
                self._write_index(after)
            self._collect([m["digest"] for m in before if _ref(m) == name], after)
            self._sweep(after)

    def _needed_by(self, digest: str) -> frozenset[str]:
        """The manifest itself and all it names, as hex. Manifests never change: remembered."""
        known = self._needs.get(digest)
        if known is None:
            hex_ = hex_of(digest)
            known = frozenset({hex_})
            with suppress(FileNotFoundError, ValueError):
                for part in descriptors(json.loads((self._blobs / hex_).read_bytes())):
                    child = part["digest"]
                    known |= self._needed_by(child) if is_manifest(part) else {hex_of(child)}
            self._needs[digest] = known
        return known

    def _collect(self, gone: Iterable[str], index: list[dict[str, Any]]) -> None:
        candidates = set().union(*(self._needed_by(d) for d in gone))
        pinned = {p.name.partition(".")[0] for p in self._pins.iterdir()} if candidates else set()
        for entry in index:
            candidates -= self._needed_by(entry["digest"])
        for hex_ in candidates - pinned:
            (self._blobs / hex_).unlink(missing_ok=True)
            self._needs.pop(f"sha256:{hex_}", None)

    def _sweep(self, index: list[dict[str, Any]]) -> None:
        """What builds that died a day ago left behind."""
        limit = time.time() - STALE_S
        for path in (*self._pins.iterdir(), *self._tmp.iterdir()):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime >= limit:
                    continue
                path.unlink()
                hex_ = path.name.partition(".")[0]
                if path.parent == self._pins and not any(hex_ in self._needed_by(m["digest"]) for m in index):
                    (self._blobs / hex_).unlink(missing_ok=True)


class _Upload:
    """Bytes on their way into ``path``, gathered so that a small blob costs one trip to a worker thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._held: list[bytes] = []
        self._size = 0
        self._file: BinaryIO | None = None
        self.open = False
        """Something of it lies in ``path``."""

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def hold(self, chunk: bytes) -> bool:
        """True when enough is held to be worth a flush."""
        self._held.append(bytes(chunk))
        self._size += len(chunk)
        return self._size >= CHUNK

    def flush(self, last: bool = False) -> None:
        if self._file is None:
            self._file = self._locked()
        for chunk in self._held:
            self._hash.update(chunk)
        os_write_all(self._file.fileno(), b"".join(self._held))
        self._held, self._size = [], 0
        if last:
            os.fsync(self._file.fileno())

    def _locked(self) -> BinaryIO:
        while True:
            file = self.path.open("xb", buffering=0)
            fcntl.flock(file, fcntl.LOCK_EX)
            if self.path.exists():  # else a sweep came between making and locking it
                self.open = True
                return file
            file.close()

    def end(self) -> None:
        """Whatever was not kept goes."""
        if self.open:
            self.path.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()


def os_write_all(fd: int, data: bytes) -> None:
    """``os.write`` until everything is written."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest):]


def _replace(path: Path, data: bytes, tmp: Path) -> None:
    """Whole or not at all, also after a power cut."""
    side = tmp / secrets.token_hex(16)
    fd = os.open(side, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os_write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    side.rename(path)


def _open(path: Path, digest: str, start: int) -> BinaryIO:
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError as exc:
        raise NotFound(f"there is no blob {digest}") from exc
    file.seek(start)
    return file


def _read(file: BinaryIO, seen: Any) -> bytes:
    chunk = file.read(CHUNK)
    if seen is not None:
        seen.update(chunk)
    return chunk


def _ref(entry: dict[str, Any]) -> str:
    return str(entry.get("annotations", {}).get(REF_NAME, ""))
