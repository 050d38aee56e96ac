"""A Dockerfile that a user brings: somebody else's builder builds it, and what it made becomes a base like any other.

Its layers go into our store, ours lie on them, and the Python in them is looked for and checked as in a base that is
pulled. A build is not repeated for the same folder on the same images by the same settings; its digest is what that
build made of it, for steps run at their own time and see their own network.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from weakref import WeakValueDictionary

from ..core import archives
from ..core.errors import BuildFailed, Invalid, NotFound, Unavailable
from ..kernel.service import Context
from ..ports.builders import Ask
from . import bases, instructions, store
from .bases import Base, Files
from .config import digest_of, manifest
from .log import BuildLog
from .memo import Memo, key
from .model import Image
from .parts import Made, made
from .pull import Folder, found_out, looked, remembered, stands_on
from .sources import Source
from .tarring import CHUNK, PACKER, Layer, opened

FORMAT = 1
GZIP = b"\x1f\x8b"
NO_BUILDER = (
    "this yard builds no Dockerfiles. Let the engine of a docker target do it, in the image builder's settings: "
    "MODELYARD_TARGETS='docker=docker://?dockerfiles=none' (RUN steps reach no network; dockerfiles=bridge gives them "
    "the engine's), and start it again; or build the image yourself, push it, and give it as base")
_BUSY: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()


@dataclass(frozen=True)
class Dockerfiles:
    """The Dockerfile of one build. ``folder`` makes one for temporary files."""

    ctx: Context
    doc: Image
    log: BuildLog
    memo: Memo
    folder: Folder

    async def base(self, digest: str, source: Source) -> Base:
        """The base that ``source`` (the tar whose digest it is) builds, its layers in the store. BuildFailed for what
        the owner must fix, Unavailable when the builder is away."""
        builder = self.ctx.dockerfiles
        if builder is None:
            raise BuildFailed(NO_BUILDER)
        text = await asyncio.to_thread(read, source)
        if problems := instructions.refused(text):
            raise BuildFailed("; ".join(problems))
        names = instructions.images(text)
        async with _BUSY.setdefault(f"{digest} {self.doc.platform}", asyncio.Lock()):
            before = await builder.inputs(names)
            found = before and await remembered(self.ctx, self.doc, self.memo, self._key(digest, before))
            if not found:
                with refusals():
                    image = await builder.build(await self._ask(source), self._said)
                found = await self._taken(image)
                if inputs := await builder.inputs(names):
                    await self.memo.put(self._key(digest, inputs), found)
            else:
                await self.log.line("the Dockerfile: built before from the same folder on the same images")
        return await stands_on(self.doc, self.log, f"dockerfile@{digest}", found["digest"], found)

    def _key(self, digest: str, inputs: str) -> str:
        return key("dockerfile", FORMAT, digest, inputs, self.doc.platform)

    async def _ask(self, source: Source) -> Ask:
        if isinstance(source, bytes):
            path = await self.folder() / "dockerfile"
            await asyncio.to_thread(path.write_bytes, source)
            source = path
        return Ask(source, f"{self.doc.workspace}.{self.doc.name}")

    async def _said(self, line: str) -> None:
        await self.log.line(f"dockerfile: {line}")

    async def _taken(self, image: str) -> dict[str, Any]:
        """The builder's image: its layers into our store, and what decides something of it."""
        path = await self.folder() / "dockerfile-image"
        assert self.ctx.dockerfiles is not None
        try:
            try:
                await self.ctx.dockerfiles.save(image, path)
            except NotFound as exc:
                raise Unavailable(f"the Dockerfile's image went before it could be read: {exc.message}") from exc
            config, names = await asyncio.to_thread(_index, path)
            about = json.loads(config)
            self._check(about, names)
            done = [await self._layer(path, name, diff_id, number) for number, (name, diff_id) in enumerate(
                zip(names, about["rootfs"]["diff_ids"], strict=True))]
        finally:
            await asyncio.to_thread(path.unlink, True)
        layers = [layer for layer, _ in done]
        digest = digest_of(manifest(config, layers))
        return found_out(layers, (files for _, files in done), about) | {"digest": digest}

    def _check(self, about: dict[str, Any], names: list[str]) -> None:
        platform = f"{about.get('os')}/{about.get('architecture')}"
        if platform != self.doc.platform:
            raise BuildFailed(f"the Dockerfile was built for {platform}, and the image is for {self.doc.platform}: "
                              "give the platform of the engine that builds it, or build there")
        if len(about.get("rootfs", {}).get("diff_ids") or []) != len(names):
            raise BuildFailed(f"the Dockerfile's image has {len(names)} layers and says otherwise")

    async def _layer(self, archive: Path, name: str, diff_id: str, number: int) -> tuple[Layer, Files]:
        """One layer, gzipped as ours are; of an earlier build where it was in one."""
        noted = key("dockerfile-layer", FORMAT, diff_id, *PACKER)
        known = await self.memo.get(noted)
        if known:
            (layer,) = store.unpack(known["layers"])
            if await store.there(self.ctx, self.doc, [layer]):
                return layer, Files(known["there"], known["gone"])
        out = await self.folder() / f"dockerfile-{number}"
        try:
            packed, files = await asyncio.to_thread(_repacked, archive, name, f"{bases.TITLE}{diff_id[7:19]}", out)
            if packed.layer.diff_id != diff_id:
                raise BuildFailed(f"a layer of the Dockerfile's image unpacks to {packed.layer.diff_id[:19]}, its "
                                  f"config says {diff_id[:19]}")
            await store.put(self.ctx, self.doc, packed)
        finally:
            await asyncio.to_thread(out.unlink, True)
        await self.memo.put(noted, {"layers": store.pack([packed.layer]), "there": dict(files.there),
                                    "gone": list(files.gone)})
        return packed.layer, files


@contextmanager
def refusals() -> Iterator[None]:
    """What the builder will never do is its owner's to fix."""
    try:
        yield
    except Invalid as exc:
        raise BuildFailed(exc.message) from exc


def read(source: Source) -> str:
    """The text of the Dockerfile in a tar. Blocking. BuildFailed for a tar that is none of ours, or has none."""
    try:
        with opened(source) as file:
            for entry, content in archives.entries(file):
                if entry.name == instructions.NAME:
                    if entry.size > instructions.LARGEST:
                        raise BuildFailed(f"the {instructions.NAME} has more than {instructions.LARGEST} bytes")
                    return b"".join(content).decode()
    except Invalid as exc:
        raise BuildFailed(f"the Dockerfile's folder: {exc.message}") from exc
    except UnicodeDecodeError as exc:
        raise BuildFailed(f"the {instructions.NAME} is not UTF-8") from exc
    raise BuildFailed(f"there is no {instructions.NAME} at the top of the folder that was given as dockerfile")


def _index(path: Path) -> tuple[bytes, list[str]]:
    """Of what `docker save` wrote, of any age: the config, and the members that are layers. Blocking."""
    with tarfile.open(path) as archive:
        (about,) = json.loads(_member(archive, "manifest.json"))
        return _member(archive, about["Config"]), list(about["Layers"])


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    with cast(BinaryIO, archive.extractfile(name)) as file:
        return file.read()


def _repacked(archive: Path, name: str, title: str, out: Path) -> tuple[Made, Files]:
    """Blocking. Read twice: once for what is in it, once to be packed."""
    with tarfile.open(archive) as whole:
        files, _ = looked(_plain(whole, name))
        plain = _plain(whole, name)
        return made(title, iter(lambda: plain.read(CHUNK), b""), gzip=True, into=out), files


def _plain(archive: tarfile.TarFile, name: str) -> BinaryIO:
    file = cast(BinaryIO, archive.extractfile(name))
    zipped = file.read(len(GZIP)) == GZIP
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file
