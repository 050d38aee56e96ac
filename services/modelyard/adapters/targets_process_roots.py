"""What images look like on this machine's disk: layers unpacked once, and roots made of them by hard links.

``<data>/layers/<hex>/`` is one layer, ``<data>/roots/<hex>/`` one image (``opt/…`` inside); both appear by a rename,
so a crash leaves nothing that looks whole and is not, and two who unpack the same thing do not disturb each other.
Files of a root are the layer's own; folders are the root's own, and what Python compiles goes into them. Compiled
code is carried over from an older root when the source is the very same file, so that an upgrade starts fast; and by
way of the user's cache, as environments' layers are, so that another data folder does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..core.errors import Invalid, Unavailable
from ..kernel.cache import Cache
from ..ports.images import ImageStore
from .folder import in_thread
from .targets_process_trees import SharedLayers, link_all_compiled, link_files

LARGEST = 64 << 30
"""Bytes that one layer may unpack to, and the most files below: an end to what a hostile archive can do."""
MOST_FILES = 1_000_000
CHUNK = 1 << 20
WITHIN = "opt"
"""Only what an image keeps under ``/opt`` runs here."""
LAYER, OF_BASE = "io.modelyard.layer", "base: "
"""How the image builder marks the layers of a base. Here this machine takes the base's place: they are not fetched."""
OWN_ENV = "io.modelyard.env"


async def manifest_of(images: ImageStore, repo: str, digest: str) -> dict[str, Any]:
    """The manifest of what shall run. Invalid (``image-gone``) when the store does not have it."""
    found = await images.get_manifest(repo, digest)
    if found is None:
        raise Invalid(f"the image {repo}@{digest} is not in the image store", code="image-gone")
    body: dict[str, Any] = json.loads(found[0])
    return body


@dataclass(frozen=True)
class Root:
    """An image, ready to start: where it lies, its environment, and the names that its server answers to."""

    path: Path
    env: dict[str, str]
    score: bool
    models: tuple[str, ...]


class Roots:
    """The layers and roots under one data folder."""

    def __init__(self, data: Path, images: ImageStore, shared: SharedLayers | None = None) -> None:
        self._layers = data / "layers"
        self._roots = data / "roots"
        self._images = images
        self._shared = shared or SharedLayers(Cache())
        self._unpacking: dict[str, asyncio.Lock] = {}

    def path(self, digest: str) -> Path:
        """Where the root of an image is, or will be."""
        return self._roots / digest.removeprefix("sha256:")

    async def prepare(self, repo: str, digest: str) -> Root:
        """The root of this image, made when it is not there. NotFound, Invalid for an image that cannot run here."""
        manifest = await manifest_of(self._images, repo, digest)
        config = await self._blob(repo, manifest["config"]["digest"])
        layers = [layer["digest"] for layer in manifest["layers"] if not _of_base(layer)]
        root = self.path(digest)
        for _ in range(3):
            for layer in layers:
                await self._unpack(repo, layer)
            try:
                await in_thread(self._assemble, root, [self._layer(d) for d in layers])
                break
            except FileNotFoundError:  # another process collected a layer between the two
                continue
        else:
            raise Unavailable(f"the layers of {repo} are taken away while it is unpacked; is another deployer there?")
        return await in_thread(_described, root, repo, config)

    async def collect(self, keep: Iterable[Path]) -> None:
        """Takes away roots that are not in ``keep``, and layers that no root is made of."""
        await self.harvest()
        await in_thread(self._collect, {path.name for path in keep})

    async def harvest(self) -> None:
        """What Python compiled in the roots goes to the user's cache, as far as their layers are there."""
        await in_thread(self._harvest)

    async def _blob(self, repo: str, digest: str) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(b"".join([chunk async for chunk in self._images.get_blob(repo, digest)]))
        return body

    def _layer(self, digest: str) -> Path:
        return self._layers / digest.removeprefix("sha256:")

    async def _unpack(self, repo: str, digest: str) -> None:
        place = self._layer(digest)
        async with self._unpacking.setdefault(digest, asyncio.Lock()):
            if await in_thread(place.is_dir):
                return
            beside = self._layers / f".{place.name[:16]}.{secrets.token_hex(4)}"
            try:
                await in_thread(beside.mkdir, 0o700, True)
                if not await in_thread(self._shared.fetch, place.name, beside / "tree"):
                    blob = await in_thread(open, beside / "blob", "wb+")
                    with contextlib.closing(blob):
                        async for chunk in self._images.get_blob(repo, digest):
                            await in_thread(blob.write, chunk)
                        await in_thread(_unpack, blob, beside / "tree")
                    await in_thread(self._shared.keep, place.name, beside / "tree")
                await in_thread(_settle, beside / "tree", place)
            except OSError as exc:
                raise Unavailable(f"the layers of {repo} cannot be unpacked under {self._layers}: {exc}") from exc
            finally:
                await in_thread(shutil.rmtree, beside, True)

    def _assemble(self, root: Path, layers: list[Path]) -> None:
        if root.is_dir():
            return
        beside = self._roots / f".{root.name[:16]}.{secrets.token_hex(4)}"
        before = {name: old for old in self._whole() for name in _made_of(old)}
        try:
            with self._lock():
                (beside / WITHIN).mkdir(parents=True, mode=0o700)
                for layer in layers:
                    link_files(layer, beside)
                for layer in layers:  # only now is it certain which layer's file each of them is
                    for old in filter(None, (before.get(layer.name), layer)):
                        link_all_compiled(layer, old, beside)
                (beside / "layers.json").write_text(json.dumps([layer.name for layer in layers]))
                _settle(beside, root)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _collect(self, keep: set[str]) -> None:
        with self._lock():
            for root in self._whole():
                if root.name not in keep:
                    doomed = root.with_name(f".{root.name[:16]}.{secrets.token_hex(4)}")
                    root.rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)
            used = {name for root in self._whole() for name in _made_of(root)}
            for layer in self._layers.iterdir() if self._layers.is_dir() else ():
                if not layer.name.startswith(".") and layer.name not in used and layer.name not in self._unpacking:
                    shutil.rmtree(layer, ignore_errors=True)
        self._unpacking = {d: lock for d, lock in self._unpacking.items() if lock.locked()}

    def _harvest(self) -> None:
        for root in self._whole():
            for name in _made_of(root):
                self._shared.harvest(name, root)
        self._shared.prune()

    def _whole(self) -> list[Path]:
        if not self._roots.is_dir():
            return []
        return [root for root in self._roots.iterdir() if not root.name.startswith(".")]

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Linking and collecting take turns, over all processes."""
        self._roots.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._roots / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _settle(beside: Path, place: Path) -> None:
    """Into place at once; when somebody was faster, theirs is as good."""
    try:
        beside.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def _made_of(root: Path) -> list[str]:
    try:
        found: list[str] = json.loads((root / "layers.json").read_text())
    except (OSError, ValueError):
        return []
    return found


def _unpack(blob: BinaryIO, tree: Path) -> None:
    """A layer, gzip or plain, into ``tree``. Regular files only, nothing outside ``tree``: else Invalid."""
    tree.mkdir(mode=0o700)
    size = count = 0
    blob.seek(0)
    try:
        with tarfile.open(fileobj=blob, mode="r:*") as archive:
            for member in archive:
                path = _inside(member.name)
                if path is None or member.isdir():
                    continue
                if not member.isreg():
                    raise Invalid(f"the layer holds '{member.name}', which is not a regular file; the local target "
                                  "runs images that Modelyard built without a base")
                size, count = size + member.size, count + 1
                if size > LARGEST or count > MOST_FILES:
                    raise Invalid(f"the layer unpacks to more than {LARGEST} bytes or {MOST_FILES} files")
                _write(archive, member, tree / path)
    except (tarfile.TarError, zlib.error, EOFError) as exc:
        raise Invalid(f"the layer is not a tar archive: {exc}") from exc


def _inside(name: str) -> PurePosixPath | None:
    """A member's path below the root, None when it is not ours to unpack. Invalid for one that leads out."""
    path = PurePosixPath(name.removeprefix("/"))
    if ".." in path.parts or "\x00" in name:
        raise Invalid(f"the layer holds '{name}', which leads out of it")
    if not path.parts or path.parts[0] != WITHIN or any(part.startswith(".wh.") for part in path.parts):
        return None
    return path


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Nothing but folders and files of ours can lie in the way: links are never made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with open(path, "xb") as out:
        shutil.copyfileobj(source, out, CHUNK)
        os.fchmod(out.fileno(), 0o555 if member.mode & 0o100 else 0o444)
    os.utime(path, (member.mtime, member.mtime))


def _of_base(layer: dict[str, Any]) -> bool:
    return str((layer.get("annotations") or {}).get(LAYER, "")).startswith(OF_BASE)


def _own_env(config: dict[str, Any]) -> dict[str, str]:
    """What the image sets itself. Its base's environment is for the base's programs."""
    marked = (config.get("Labels") or {}).get(OWN_ENV)
    if marked is not None:
        return {str(name): str(value) for name, value in json.loads(marked).items()}
    env = dict(pair.partition("=")[::2] for pair in config.get("Env") or () if "=" in pair)
    env.pop("PATH", None)
    return env


def _described(root: Path, repo: str, config: dict[str, Any]) -> Root:
    if not (root / "opt/modelyard/launch.py").is_file():
        raise Invalid(f"the image {repo} holds no scoring server (/opt/modelyard/launch.py)")
    env = _own_env(config.get("config") or {})
    try:
        image = json.loads((root / "opt/modelyard/image.json").read_bytes())
    except (OSError, ValueError) as exc:
        raise Invalid(f"the image {repo} does not say what it holds (/opt/modelyard/image.json): {exc}") from exc
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if image.get("python", own) != own:
        raise Invalid(f"the image {repo} is for Python {image['python']}, which its base has; the local target runs it "
                      f"on its own, {own}: deploy it to a container target, or build it with python {own}")
    if not (root / f"opt/env/lib/python{own}/site-packages").is_dir():
        raise Invalid(f"the image {repo} has no packages, as its lock is empty, and the local target has none for it: "
                      "build it without a lock, or with one that has what the scoring server needs")
    return Root(root, env, bool(image.get("score")), tuple(m["name"] for m in image.get("models", ())))

