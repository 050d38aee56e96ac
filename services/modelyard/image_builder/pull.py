"""A base image into our own image store: blob by blob, looked into on the way, nothing of it run."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import posixpath
import tarfile
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..core.errors import BuildFailed, Denied, Invalid, NotFound
from ..kernel.service import Context
from ..ports.images import ImageStore
from . import bases, store
from .bases import Base, Files, Reference
from .config import digest_of
from .log import BuildLog
from .memo import Memo, key
from .model import Image
from .tarring import CHUNK, TAR_GZ, Layer

FORMAT = 1
LARGEST_JSON = 8 << 20
LARGEST_LAYER = 64 << 30
MOST_TOLD = 100_000
Folder = Callable[[], Awaitable[Path]]
KEPT_HISTORY = ("created", "created_by", "comment", "empty_layer")


@dataclass(frozen=True)
class Pull:
    """The base of one build. ``folder`` makes one for temporary files."""

    ctx: Context
    doc: Image
    log: BuildLog
    memo: Memo
    folder: Folder

    async def base(self, name: str) -> Base:
        """The base, with its layers in the store. BuildFailed for what the owner must fix: it is not there, is for
        another platform, has no Python that fits. Unavailable when its registry does not answer."""
        place = bases.reference(name)
        with owners(name):
            source = await self.ctx.open_images(place.url)
            try:
                digest, manifest = await self._manifest(source, place, name)
                known = await remembered(self.ctx, self.doc, self.memo, self._key(digest)) \
                    or await self._bring(source, place, digest, manifest, name)
            finally:
                await source.close()
        return await stands_on(self.doc, self.log, name, digest, known)

    async def _manifest(self, source: ImageStore, place: Reference, name: str) -> tuple[str, dict[str, Any]]:
        """Of the image for our platform."""
        body, version = b"", place.version
        for _ in range(3):  # a list, of lists at most
            found = await source.get_manifest(place.repo, version)
            if found is None:
                raise BuildFailed(await asyncio.to_thread(_nothing, place, name, version))
            body = found[0]
            parsed = _json(body, f"the manifest of {name}")
            if "manifests" not in parsed:
                if not _all_objects(parsed.get("layers")) or not isinstance(parsed.get("config"), dict):
                    raise BuildFailed(f"the base {name} is not an OCI image ({found[1]})")
                return digest_of(body), parsed
            if not _all_objects(parsed["manifests"]):
                raise BuildFailed(f"the base {name} is a list of what are no images")
            version = bases.chosen(parsed["manifests"], self.doc.platform)
        raise BuildFailed(f"the base {name} is a list of lists of images")

    def _key(self, digest: str) -> str:
        return key("base", FORMAT, digest, self.doc.platform)  # what is for another platform is looked at, and refused

    async def _bring(self, source: ImageStore, place: Reference, digest: str, manifest: dict[str, Any],
                     name: str) -> dict[str, Any]:
        config = await self._config(source, place, manifest, name)
        limit = asyncio.Semaphore(store.UPLOADS)
        diff_ids = config["rootfs"].get("diff_ids") or []
        if len(diff_ids) != len(manifest["layers"]):
            raise BuildFailed(f"the base {name} has {len(manifest['layers'])} layers and says {len(diff_ids)}")

        async def one(number: int, descriptor: dict[str, Any], diff_id: str) -> tuple[Layer, Files]:
            async with limit:
                return await self._layer(source, place, number, descriptor, diff_id)

        made = await store.together([
            one(n, d, diff_id) for n, (d, diff_id) in enumerate(zip(manifest["layers"], diff_ids, strict=True))])
        found = found_out([layer for layer, _ in made], (files for _, files in made), config)
        await self.memo.put(self._key(digest), found)
        return found

    async def _config(self, source: ImageStore, place: Reference, manifest: dict[str, Any], name: str) -> Any:
        body = b""
        async for chunk in source.get_blob(place.repo, str(manifest["config"].get("digest"))):
            body += chunk
            if len(body) > LARGEST_JSON:
                raise BuildFailed(f"the config of {name} has more than {LARGEST_JSON} bytes")
        config = _json(body, f"the config of {name}")
        platform = f"{config.get('os')}/{config.get('architecture')}"
        if platform != self.doc.platform:
            raise BuildFailed(f"the base {name} is for {platform}, the image for {self.doc.platform}; give a base for "
                              "it, or the image's platform")
        if not isinstance(config.get("rootfs"), dict) or not isinstance(config.get("config") or {}, dict) \
                or not _all_objects(config.get("history") or []):
            raise BuildFailed(f"the config of {name} is not one of an OCI image")
        return config

    async def _layer(self, source: ImageStore, place: Reference, number: int, descriptor: dict[str, Any],
                     diff_id: str) -> tuple[Layer, Files]:
        digest, kind = str(descriptor.get("digest")), bases.MEDIA.get(str(descriptor.get("mediaType")))
        if kind is None:
            raise BuildFailed(f"the base's layer {digest[:19]} is of type {descriptor.get('mediaType')}; layers are "
                              "taken that are tar or gzipped tar, which every container engine reads")
        path = await self.folder() / f"base-{number}"
        try:
            left = size if isinstance(size := descriptor.get("size"), int) else 0
            with await asyncio.to_thread(path.open, "xb", buffering=0) as out:
                async for chunk in source.get_blob(place.repo, digest):
                    if (left := left - len(chunk)) < 0:
                        raise BuildFailed(f"the base's layer {digest[:19]} is larger than its manifest says")
                    await asyncio.to_thread(_write, out, chunk)
            files, found = await asyncio.to_thread(look_into, path, kind)
            if found != diff_id:
                raise BuildFailed(f"the base's layer {digest[:19]} unpacks to {found[:19]}, its config says "
                                  f"{diff_id[:19]}")
            await self.ctx.images.put_blob(self.doc.repo, digest, store.Chunks(path))
            size = (await asyncio.to_thread(path.stat)).st_size
        finally:
            await asyncio.to_thread(path.unlink, True)
        return Layer(f"{bases.TITLE}{digest[7:19]}", digest, diff_id, size, kind), files


def found_out(layers: Sequence[Layer], files: Iterable[Files], config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a base decides something, as the memo keeps it. ``config`` is the base's own."""
    return {
        "layers": store.pack(layers), "files": bases.together(files),
        "env": [e for e in (config.get("config") or {}).get("Env") or () if isinstance(e, str) and "=" in e],
        "history": [{k: h[k] for k in KEPT_HISTORY if k in h} for h in config.get("history") or ()]}


async def remembered(ctx: Context, doc: Image, memo: Memo, name: str) -> Any:
    """What an earlier build ``found_out``, while the store has all the layers; else None."""
    found = await memo.get(name)
    return found if found and await store.there(ctx, doc, store.unpack(found["layers"])) else None


async def stands_on(doc: Image, log: BuildLog, name: str, digest: str, known: Mapping[str, Any]) -> Base:
    """The base of which this is ``found_out``. BuildFailed for one that cannot be built on."""
    files, env = known["files"], known["env"]
    for warning in bases.fits(files, name):
        await log.line(f"warning: {warning}")
    python, path = bases.interpreter(files, env, doc.python, name)
    layers = store.unpack(known["layers"])
    await log.line(f"base {name}: {digest[:19]}, {len(layers)} layers, "
                   f"{sum(layer.size for layer in layers) / 1e6:.1f} MB, Python {python} at {path}")
    return Base(name, digest, tuple(layers), tuple(env), tuple(known["history"]), python, path)


def _write(out: BinaryIO, chunk: bytes) -> None:
    """All of it: a file without a buffer may take less when the disk is full."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[out.write(rest):]


def _nothing(place: Reference, name: str, version: str) -> str:
    """Why there is no such base. Blocking."""
    folder = place.url.removeprefix(bases.LAYOUT)
    if folder != place.url and not Path(folder, "index.json").is_file():
        what = "is no OCI layout (it has no index.json)" if Path(folder).is_dir() else "does not exist"
        return (f"there is no base image {name}: {folder} {what} on the image builder's machine; "
                f"make one there with `modelyard images base --debian --to {folder}`, or check the path")
    return f"there is no base image {name} ({version}); check the name and the tag"


@contextmanager
def owners(name: str) -> Iterator[None]:
    """What a base's registry refuses is its owner's to fix."""
    try:
        yield
    except (Denied, NotFound, Invalid) as exc:
        raise BuildFailed(f"the base {name} cannot be had: {exc.message}") from exc


def look_into(path: Path, kind: str) -> tuple[Files, str]:
    """What of a layer decides something, and the digest of its tar. Blocking."""
    with path.open("rb") as raw:
        return looked(cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if kind == TAR_GZ else raw)


def looked(layer: BinaryIO) -> tuple[Files, str]:
    """As ``look_into``, of a tar that is read from its beginning to its end."""
    there: dict[str, str] = {}
    gone: list[str] = []
    try:
        plain = _Watched(layer)
        with tarfile.open(fileobj=plain, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                _note(member, there, gone)
                if len(there) + len(gone) > MOST_TOLD:
                    raise BuildFailed("a layer of the base takes too many files away, or has too many Pythons")
        while plain.read(CHUNK):
            pass
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, ValueError) as exc:
        raise BuildFailed(f"a layer of the base is not a tar archive: {exc}") from exc
    return Files(there, gone), f"sha256:{plain.seen.hexdigest()}"


def _note(member: tarfile.TarInfo, there: dict[str, str], gone: list[str]) -> None:
    name = posixpath.normpath(member.name).lstrip("/")
    folder, last = posixpath.split(name)
    if last == ".wh..wh..opq":
        gone.append(f"{folder}/" if folder else "")
    elif last.startswith(".wh."):
        gone.append(posixpath.join(folder, last.removeprefix(".wh.")))
    elif bases.TOLD.search(name):
        there[name] = member.linkname if member.issym() or member.islnk() else ""


class _Watched:
    """Reads on, and knows the digest of what went through; a layer that never ends does."""

    def __init__(self, source: BinaryIO) -> None:
        self._source, self.seen, self._size = source, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self.seen.update(data)
        self._size += len(data)
        if self._size > LARGEST_LAYER:
            raise BuildFailed(f"a layer of the base unpacks to more than {LARGEST_LAYER} bytes")
        return data


def _all_objects(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(one, dict) for one in found)


def _json(body: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as exc:
        raise BuildFailed(f"{what} is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise BuildFailed(f"{what} is not an object")
    return found
