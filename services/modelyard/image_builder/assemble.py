"""One build, from the document to the manifest: inputs, checks, lock, layers, config.

Every step can be repeated: what was stored by a build that died is found again by its digest, so a repeated build
gives the same image. Raises BuildFailed for what the owner must fix, Unavailable for what may work later.
"""

from __future__ import annotations

import asyncio
import csv
import functools
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ..core.errors import BuildFailed, Invalid, NotFound, Unavailable
from ..core.layout import image_key
from ..kernel.service import Context
from . import parts, sources, store, uv
from .checks import requirement
from .config import MANIFEST, about, digest_of, manifest, oci_config
from .locks import EMPTY, Lock, read_lock
from .log import BuildLog
from .memo import Memo, key
from .model import Image
from .sbom import sbom
from .tarring import GZIP_LEVEL, Entry, Layer, tar, write_layer
from .wheels import LARGE, distributions, grouped

ENV_FORMAT = 1
RESOLVED_S = 24 * 3600
SERVER = Path(__file__).parents[1] / "scoring" / "requirements.txt"
LOCK_LIMIT = 16_000_000
_BUSY: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()


@dataclass(frozen=True)
class Result:
    """What a build gives the document."""

    digest: str
    size: int
    lock_digest: str


class Build:
    """The state of one build: its folder for temporary files, its log, and what it found so far."""

    def __init__(self, ctx: Context, doc: Image, log: BuildLog, folder: Path) -> None:
        self.ctx, self.doc, self.log, self.folder = ctx, doc, log, folder
        self.memo = Memo(ctx.data / "image-builder" / "memo")
        self.places = [parts.Place.of(m, doc.score is not None) for m in doc.inputs]
        self.needs = self.flavours()
        self.server: Sequence[str] = ()
        self.packages: list[dict[str, str]] = []
        self.layers: list[Layer] = []

    async def run(self) -> Result:
        """The whole of it."""
        doc = self.doc
        self.log.note(f"building {doc.id} for {doc.platform}, Python {doc.python}; "
                      f"models: {', '.join(doc.models) or 'none'}")
        self.server = await asyncio.to_thread(server_requirements)
        given = await self.fetch()
        lock = await self.locked(given)
        await self.environment(lock)
        await self.add(await asyncio.to_thread(parts.code_layer))
        if doc.score:
            await self.add(await self.work(parts.score_layer, self.folder / "score", self.folder / "score.layer"))
        for number, place in enumerate(self.places):
            await self.model(number, place)
        said = about(doc.python, bool(doc.score), [(p.model, p.path, p.framework or "") for p in self.places])
        entry = Entry(f"{parts.HOME}/image.json", said)
        await self.add(await asyncio.to_thread(parts.small_layer, "about", [entry]))
        return await self.publish(lock)

    # -- inputs and their checks ----------------------------------------------------------------------------------

    async def fetch(self) -> Lock | None:
        """Brings the inputs here and checks them all; BuildFailed with every problem. The lock, if one was given."""
        doc, lock = self.doc, None
        problems: list[str] = []
        if doc.lock:
            lock, problems = await self.given_lock(doc.lock)
        if doc.score:
            await sources.fetch(self.ctx, doc, doc.score, "the scoring file", self.folder / "score")
            problems += await asyncio.to_thread(parts.score_check, self.folder / "score")
        for number, place in enumerate(self.places):
            if await self.remembered(place) is None:
                path, model = self.folder / f"model-{number}", place.model
                await sources.fetch(self.ctx, doc, model.artifact, f"model '{model.id}'", path)
                if place.kind == "mlflow":
                    needs, why = await asyncio.to_thread(parts.mlflow_needs, model, path)
                    self.needs |= needs
                    problems += why
        if problems:
            raise BuildFailed("; ".join(problems))
        self.log.note("the inputs are here and pass their checks")
        return lock

    async def given_lock(self, digest: str) -> tuple[Lock, list[str]]:
        path = self.folder / "lock"
        await sources.fetch(self.ctx, self.doc, digest, "the lock", path)
        raw = await asyncio.to_thread(path.read_bytes)
        if len(raw) > LOCK_LIMIT:
            raise BuildFailed(f"the lock has {len(raw)} bytes; {LOCK_LIMIT} are read at most")
        lock, problems = read_lock(raw.decode(errors="replace"))
        absent = lock.missing(self.server) if lock.pins else []
        if absent:
            problems.append(f"the lock has no {', '.join(absent)}, which the scoring server needs")
        return lock, problems

    # -- dependencies ---------------------------------------------------------------------------------------------

    async def locked(self, given: Lock | None) -> Lock:
        """The lock of this image: given, stored by an earlier try of this build, or resolved now."""
        where = image_key(self.doc.workspace, self.doc.id, "lock")
        lock = given or await self.stored_lock(where)
        if lock is None:
            lock = await self.resolved()
        await self.ctx.blobs.put(where, store.chunks(lock.text.encode()))
        names = ", ".join(p.text for p in lock.pins)
        await self.log.line(f"locked {len(lock.pins)} packages: {names}" if lock.pins else EMPTY)
        return lock

    async def stored_lock(self, where: str) -> Lock | None:
        try:
            raw = b"".join([chunk async for chunk in self.ctx.blobs.get(where)])
        except NotFound:
            return None
        return read_lock(raw.decode())[0]

    async def resolved(self) -> Lock:
        doc = self.doc
        wanted = sorted({*self.server, *self.needs, *(requirement(r)[0] for r in doc.requirements)})
        name = key("resolved", wanted, doc.python, doc.platform)
        found = await self.memo.get(name)
        if found and 0 <= time.time() - found["at"] < RESOLVED_S:
            await self.log.line("requirements: the same as of a build of the last 24 hours; its lock is used")
            return read_lock(found["lock"])[0]
        await self.log.line(f"requirements: {', '.join(wanted)}")
        lock = await uv.resolve(wanted, doc.python, doc.platform, self.folder, self.log)
        await self.memo.put(name, {"at": time.time(), "lock": lock.text})
        return lock

    def flavours(self) -> set[str]:
        """What the models need where no scoring file serves them."""
        needs: set[str] = set()
        for place in self.places:
            needs |= parts.NEEDS.get(place.kind, set())
            if place.framework == "scikit-learn" and place.kind and place.model.framework_version:
                needs.add(f"scikit-learn=={place.model.framework_version}")
        return needs

    async def environment(self, lock: Lock) -> None:
        """The layers of the locked packages, from an earlier build or made now."""
        if not lock.pins:
            return
        name = key("env", ENV_FORMAT, lock.digest, self.doc.python, self.doc.platform, LARGE, GZIP_LEVEL,
                   zlib.ZLIB_RUNTIME_VERSION)
        async with _BUSY.setdefault(name, asyncio.Lock()):
            found = await self.memo.get(name)
            if found is None or not await store.there(self.ctx, self.doc, store.unpack(found["layers"])):
                found = await self.install(lock)
                await self.memo.put(name, found)
            else:
                await self.log.line(f"environment: {len(found['layers'])} layers of an earlier build")
        self.packages = found["packages"]
        self.layers += store.unpack(found["layers"])

    async def install(self, lock: Lock) -> dict[str, Any]:
        root = await uv.install(lock, self.doc.python, self.doc.platform, self.folder, self.log)
        try:
            found = await asyncio.to_thread(distributions, root, self.doc.python)
        except (KeyError, ValueError, csv.Error, FileNotFoundError) as exc:
            raise BuildFailed(f"a package is not installed as wheels are: {exc}") from exc
        limit, groups = asyncio.Semaphore(2), grouped(found)

        async def one(number: int, title: str, entries: list[Entry]) -> Layer:
            async with limit:
                out = self.folder / f"env-{number}.layer"
                made = await self.work(_env_layer, title, entries, out)
                await store.put(self.ctx, self.doc, made)
                await self.log.line(_told(made.layer))
                await asyncio.to_thread(out.unlink)
                return made.layer

        work = [one(n, title, entries) for n, (title, entries) in enumerate(groups)]
        layers = await store.together(work)
        packages = [{"name": d.name, "version": d.version, "license": d.license} for d in found]
        return {"layers": store.pack(layers), "packages": packages}

    # -- the other layers -----------------------------------------------------------------------------------------

    def _model_key(self, place: parts.Place) -> str:
        return key("model", place.model.artifact, place.model.unpack, place.model.id, place.path, place.kind)

    async def remembered(self, place: parts.Place) -> Layer | None:
        """The layer of this model at this place, when the store has it."""
        if place.kind == "mlflow":
            return None  # what it needs is read from its files
        found = await self.memo.get(self._model_key(place))
        layers = store.unpack(found or ())
        return layers[0] if layers and await store.there(self.ctx, self.doc, layers) else None

    async def model(self, number: int, place: parts.Place) -> None:
        path = self.folder / f"model-{number}"
        if not await asyncio.to_thread(path.exists):
            layer = await self.remembered(place)
            if layer is None:
                raise Unavailable(f"the layer of model '{place.model.id}' was taken away meanwhile; trying again")
            self.layers.append(layer)
            return
        made = await self.work(parts.model_layer, place, path, self.folder / f"model-{number}.layer")
        await self.add(made)
        if made.layer.size > 1 << 20:
            await self.memo.put(self._model_key(place), store.pack([made.layer]))

    async def add(self, made: parts.Made) -> None:
        new = await store.put(self.ctx, self.doc, made)
        self.log.note(_told(made.layer) + ("" if new else " (there already)"))
        self.layers.append(made.layer)

    async def work(self, fn: Callable[..., parts.Made], *args: Any) -> parts.Made:
        """Makes a layer in a thread."""
        try:
            return await asyncio.to_thread(fn, *args)
        except Invalid as exc:
            raise BuildFailed(exc.message) from exc

    async def publish(self, lock: Lock) -> Result:
        """Config, manifest, bill of materials."""
        doc, images = self.doc, self.ctx.images
        config = oci_config(doc.platform, doc.env, self.layers)
        body = manifest(config, self.layers)
        await images.put_blob(doc.repo, digest_of(config), store.chunks(config))
        try:
            digest = await images.put_manifest(doc.repo, doc.tag, body, MANIFEST)
        except Invalid as exc:
            raise Unavailable(f"the image is not whole: {exc.message}; building it again") from exc
        bill = sbom(doc, digest, self.packages)
        await self.ctx.blobs.put(image_key(doc.workspace, doc.id, "sbom"), store.chunks(bill))
        size = sum(layer.size for layer in self.layers) + len(config) + len(body)
        return Result(digest, size, digest_of(lock.text.encode()))


def _env_layer(title: str, entries: list[Entry], out: Path) -> parts.Made:
    return parts.Made(write_layer(title, tar(entries), out, gzip=True), out)


def _told(layer: Layer) -> str:
    return f"layer {layer.title}: {layer.size / 1e6:.2f} MB, {layer.digest[:19]}"


@functools.cache
def server_requirements() -> Sequence[str]:
    """What the scoring server itself needs. Blocking, once."""
    lines = (line.partition("#")[0].strip() for line in SERVER.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line)
