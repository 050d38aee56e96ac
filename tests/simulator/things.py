"""Blobs, images and capture grants in memory: what is put lies in the dictionaries that an adapter was opened with."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from datetime import UTC, datetime

from modelyard.adapters.blobs_dir import check_key
from modelyard.adapters.images_names import hex_of, parts, repo_of, tag_of
from modelyard.core.errors import Invalid, NotFound
from modelyard.ports.blobs import Blob, BlobStore, CaptureGrants
from modelyard.ports.images import ImageStore

CHUNK = 1 << 16
T0 = datetime(2026, 11, 23, tzinfo=UTC)


class _Plain:
    async def check(self) -> None:
        return

    async def close(self) -> None:
        return


class MemoryBlobs(_Plain, BlobStore):
    def __init__(self, held: dict[str, bytes]) -> None:
        self.held = held

    async def put(self, key: str, chunks: AsyncIterable[bytes], if_absent: bool = False) -> bool:
        check_key(key)
        if if_absent and key in self.held:
            return False
        data = b"".join([chunk async for chunk in chunks])
        if if_absent and key in self.held:
            return False
        self.held[key] = data
        return True

    async def get(self, key: str, start: int = 0) -> AsyncIterator[bytes]:
        check_key(key)
        if key not in self.held:
            raise NotFound(f"there is no blob '{key}'", kind="blob", id=key)
        data = self.held[key]
        for at in range(start, len(data), CHUNK):
            await asyncio.sleep(0)
            yield data[at:at + CHUNK]

    async def stat(self, key: str) -> Blob | None:
        check_key(key)
        return Blob(key, len(self.held[key]), T0) if key in self.held else None

    async def list(self, prefix: str = "", after: str = "") -> AsyncIterator[Blob]:
        if {"..", "."} & set(prefix.split("/")) or prefix.startswith("/") or "//" in prefix:
            raise Invalid(f"'{prefix}' is not the beginning of a key")
        for key in sorted(self.held):
            if key.startswith(prefix) and key > after and key in self.held:
                yield Blob(key, len(self.held[key]), T0)

    async def delete(self, key: str) -> None:
        check_key(key)
        self.held.pop(key, None)


class NoGrants(_Plain, CaptureGrants):
    """Nothing is captured here: what is lent is a word."""

    async def lend(self, workspace: str, deployment: str, seconds: int) -> str:
        return f"memory://{workspace}/{deployment}"

    async def revoke(self, workspace: str, deployment: str) -> None:
        return


class Shed:
    """The images that survive a crash. ``on_its_way`` are blobs put for a manifest that has not come yet."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.on_its_way: dict[str, int] = {}

    def swept(self) -> None:
        """Blobs that no manifest needs go, unless they were put for one that is still to come."""
        needed = {part["digest"] for manifest, _ in self.manifests.values() for part in parts(manifest)}
        for digest in [d for d in self.blobs if d not in needed and not self.on_its_way.get(d)]:
            del self.blobs[digest]


class MemoryImages(_Plain, ImageStore):
    def __init__(self, shed: Shed) -> None:
        self.shed = shed

    async def put_blob(self, repo: str, digest: str, chunks: AsyncIterable[bytes]) -> bool:
        repo_of(repo)
        hex_of(digest)
        self.shed.on_its_way[digest] = 1
        if digest in self.shed.blobs:
            return False
        data = b"".join([chunk async for chunk in chunks])
        _same(data, digest)
        new = digest not in self.shed.blobs
        self.shed.blobs[digest] = data
        return new

    async def get_blob(self, repo: str, digest: str, start: int = 0) -> AsyncIterator[bytes]:
        repo_of(repo)
        hex_of(digest)
        if (data := self.shed.blobs.get(digest)) is None:
            raise NotFound(f"there is no blob {digest}", kind="blob", id=digest)
        for at in range(start, len(data), CHUNK):
            yield data[at:at + CHUNK]
        if start == 0:
            _same(data, digest)

    async def put_manifest(self, repo: str, tag: str, manifest: bytes, media_type: str) -> str:
        found, place = parts(manifest), (repo_of(repo), tag_of(tag))
        here = self.shed.blobs.keys() | {digest for of, digest in self.shed.manifests if of == repo}  # of an index
        if missing := [part["digest"] for part in found if part["digest"] not in here]:
            raise Invalid(f"blobs of this manifest are not here, put it first: {', '.join(missing)}")
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        self.shed.manifests[repo, digest] = (manifest, media_type)
        for part in found:
            self.shed.on_its_way.pop(part["digest"], None)
        before, self.shed.tags[place] = self.shed.tags.get(place), digest
        if before not in (None, digest):
            self._drop(repo, str(before))
        return digest

    async def get_manifest(self, repo: str, reference: str) -> tuple[bytes, str] | None:
        place = repo_of(repo)
        digest = reference if reference.startswith("sha256:") else self.shed.tags.get((place, tag_of(reference)), "")
        return self.shed.manifests.get((place, digest))

    async def remove(self, repo: str, tag: str) -> None:
        if (digest := self.shed.tags.pop((repo_of(repo), tag_of(tag)), None)) is not None:
            self._drop(repo, digest)

    def _drop(self, repo: str, digest: str) -> None:
        if not any(place[0] == repo and found == digest for place, found in self.shed.tags.items()):
            self.shed.manifests.pop((repo, digest), None)
        self.shed.swept()


def _same(data: bytes, digest: str) -> None:
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise Invalid(f"these bytes do not have the digest {digest}")
