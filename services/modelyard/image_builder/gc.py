"""What of images nothing refers to any more: found first, taken away when asked to.

- tags of images that this yard deleted (its store was restored, a removal was cut short), and what was attached to
  them. Tags that this yard knows nothing of are somebody else's, and stay;
- blobs that no tag needs and no build has put or found lately; uploads that broke off;
- entries of the memo that name layers which are gone, or locks that are too old to be used; folders of dead builds.

Builds may run meanwhile: they pin what they use, and losing a memo's entry costs time only.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import Invalid
from ..ports.images import ImageStore
from ..ports.store import DocumentStore
from .model import Image
from .referrers import OF
from .resolve import RESOLVED_S

DIED_S = 24 * 3600.0
ATTACHED = re.compile(r"^sha256-[0-9a-f]{64}(?:\.(?P<version>[0-9]+)\.[a-z]+)?$")


class Broom(Protocol):
    """An image store that can be swept from outside: a folder, not a registry."""

    async def tags(self) -> list[str]: ...
    async def has(self, digest: str) -> bool: ...
    async def sweep(self, gone: Collection[str], older_s: float, dry: bool) -> list[tuple[str, str, int]]: ...


@dataclass(frozen=True)
class Stray:
    """Something that nothing needs: ``tag``, ``blob``, ``upload``, ``memo`` or ``folder``."""

    kind: str
    name: str
    size: int

    @property
    def document(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "size": self.size}


@dataclass(frozen=True)
class Garbage:
    """Where to look: the image builder's documents, its image store (``broom``: None for a registry), its folder."""

    store: DocumentStore
    images: ImageStore
    broom: Broom | None
    data: Path

    async def collect(self, *, older_s: float = DIED_S, dry: bool = True) -> list[Stray]:
        """Finds it all, and takes it away unless ``dry``. Only what is older than ``older_s`` seconds."""
        found: list[Stray] = []
        if self.broom is not None:
            gone = [tag for tag in await self.broom.tags() if await self._over(tag)]
            found += [Stray(*one) for one in await self.broom.sweep(gone, older_s, dry)]
        dropped = frozenset(f"sha256:{s.name}" for s in found if s.kind == "blob")
        memo = self.data / "image-builder" / "memo"
        for path, value in await asyncio.to_thread(lambda: list(_entries(memo, time.time() - older_s))):
            if await self._useless(value, dropped):
                found.append(await asyncio.to_thread(_taken, "memo", path, dry))
        died = self.data / "image-builder" / "tmp"
        for path in await asyncio.to_thread(lambda: list(_older(died, time.time() - max(older_s, DIED_S)))):
            found.append(await asyncio.to_thread(_taken, "folder", path, dry))
        return found

    async def _over(self, name: str) -> bool:
        """Whether this yard deleted the image that a ``repo:tag`` is, or is about."""
        repo, _, tag = name.rpartition(":")
        about = ATTACHED.match(tag)
        if about is None:
            return await self._deleted(repo, tag)
        if about["version"]:
            return await self._deleted(repo, about["version"])
        found = await self.images.get_manifest(repo, tag)
        entries = json.loads(found[0]).get("manifests", ()) if found else ()
        told = {str((entry.get("annotations") or {}).get(OF, "")).rpartition(":")[2] for entry in entries}
        return bool(told) and all([await self._deleted(repo, version) for version in told])

    async def _deleted(self, repo: str, tag: str) -> bool:
        """Known to be: there is a tombstone. It is written when all else of an image is gone, so a version whose number
        can never be given again."""
        workspace, _, name = repo.rpartition("/")
        try:
            doc = await self.store.get(Image, f"{name}:{tag}", workspace=workspace or "default", tombstone=True)
        except Invalid:
            return False
        return doc is not None and doc.deleted

    async def _useless(self, value: Any, dropped: Collection[str]) -> bool:
        """Of a memo's entry: a lock is used for a day, layers only while the store has all of them."""
        if isinstance(value, dict) and "at" in value:
            return not 0 <= time.time() - float(value["at"]) < RESOLVED_S
        layers = value.get("layers") if isinstance(value, dict) else value
        if not isinstance(layers, list):
            return True
        digests = [str(layer.get("digest")) for layer in layers if isinstance(layer, dict)]
        if any(digest in dropped for digest in digests):
            return True
        return self.broom is not None and not all([await self.broom.has(digest) for digest in digests])


def _older(folder: Path, limit: float) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            if path.lstat().st_mtime < limit:
                yield path
        except FileNotFoundError:
            continue


def _entries(folder: Path, limit: float) -> Iterator[tuple[Path, Any]]:
    for path in _older(folder, limit):
        try:
            yield path, json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except ValueError:
            yield path, None


def _taken(kind: str, path: Path, dry: bool) -> Stray:
    size = sum(p.lstat().st_size for p in (path, *path.rglob("*")) if p.is_file())
    if not dry:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return Stray(kind, path.name, size)
