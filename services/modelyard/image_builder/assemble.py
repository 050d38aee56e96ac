"""One build, from the document to the manifest: inputs, checks, lock, layers, config.

Every step can be repeated: what was stored by a build that died is found again by its digest, so a repeated build
gives the same image. Raises BuildFailed for what the owner must fix, Unavailable for what may work later.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..core.errors import BuildFailed, Invalid, Unavailable
from ..core.layout import image_key
from ..core.signatures import Signature
from ..kernel.cache import Cache
from ..kernel.service import Context
from . import parts, serving, sources, store
from .bases import Base
from .config import MANIFEST, about, digest_of, encode, labels, manifest, oci_config
from .convert import Converter
from .dockerfiles import Dockerfiles
from .environment import Environments, told
from .keys import signer
from .locks import Lock, read_lock
from .log import BuildLog
from .memo import Memo, key
from .model import Image
from .provenance import Origin, statement
from .pull import Pull
from .referrers import NAMES
from .resolve import Resolver, server_requirements
from .sbom import Contents, sbom
from .sdists import Sdists
from .tarring import Layer

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a build gives the document."""

    digest: str
    size: int
    lock_digest: str
    python: str
    signatures: dict[str, Signature]
    served_as: dict[str, str]


class Scratch:
    """A folder for temporary files, made when it is first asked for."""

    def __init__(self, make: Callable[[], Path]) -> None:
        self._make = make
        self._path: Path | None = None
        self._turn = asyncio.Lock()

    async def folder(self) -> Path:
        async with self._turn:  # two at once would get two, and making one takes others of this build away
            if self._path is None:
                self._path = await asyncio.to_thread(self._make)
            return self._path

    async def clear(self) -> None:
        """Takes it away."""
        if self._path is not None:
            await asyncio.to_thread(shutil.rmtree, self._path, ignore_errors=True)


class Build:
    """The state of one build: its log, its temporary folder, and what it found so far."""

    def __init__(self, ctx: Context, doc: Image, log: BuildLog, scratch: Scratch) -> None:
        self.ctx, self.doc, self.log, self.scratch = ctx, doc, log, scratch
        self.began = ctx.now()
        self.cache = Cache()
        self.memo = Memo(ctx.data / "image-builder" / "memo", self.cache)
        self.places = [parts.Place.of(m, doc.score is not None) for m in doc.inputs]
        self.looked: set[str] = set()
        self.server: Sequence[str] = ()
        self.packages: list[dict[str, str]] = []
        self.layers: list[Layer] = []
        self.base: Base | None = None
        self.uploads = asyncio.Semaphore(store.UPLOADS)
        self.score: sources.Source = b""
        self.models: list[sources.Source | parts.Made | Layer] = []
        self.signatures: dict[str, Signature] = {}

    async def run(self) -> Result:
        """The whole of it."""
        doc = self.doc
        self.log.note(f"building {doc.id} for {doc.platform}, {f'Python {doc.python}' if doc.python else 'on a base'}; "
                      f"models: {', '.join(doc.models) or 'none'}")
        self.server = await asyncio.to_thread(server_requirements)
        if doc.base is not None:
            self.stand_on(await Pull(self.ctx, doc, self.log, self.memo, self.scratch.folder).base(doc.base))
        elif doc.dockerfile is not None:
            context = await self.bring(doc.dockerfile, "the Dockerfile's folder", "dockerfile")
            own = Dockerfiles(self.ctx, doc, self.log, self.memo, self.scratch.folder)
            self.stand_on(await own.base(doc.dockerfile, context))
        given = await self.fetch()
        lock = await self.environment(await self.locked(given))
        pieces = await self.work(self.pieces)
        self.layers += await store.together([self.added(made) for made in pieces])
        for place, layer in zip(self.places, self.model_layers(), strict=True):
            if layer.size > sources.BATCH:
                await self.memo.put(self._model_key(place), store.pack([layer]))
        return await self.publish(lock)

    @property
    def graphs(self) -> dict[str, parts.Graph]:
        """Those that stand for models, by model id."""
        return {p.model.id: p.graph for p in self.places if p.graph is not None}

    def model_layers(self) -> list[Layer]:
        """They stand before the last one."""
        return self.layers[len(self.layers) - 1 - len(self.places):-1]

    def stand_on(self, base: Base) -> None:
        """The base's layers come first, and its Python decides where the caller did not."""
        self.base = base
        self.doc = self.doc.model_copy(update={"python": self.base.python})
        self.layers += self.base.layers

    # -- inputs and their checks ----------------------------------------------------------------------------------

    async def fetch(self) -> Lock | None:
        """Brings the inputs here and checks them all; BuildFailed with every problem. The lock, if one was given."""
        doc, lock = self.doc, None
        problems: list[str] = []
        if doc.lock:
            lock, problems = await self.given_lock(doc.lock)
        if doc.score:
            self.score = await self.bring(doc.score, "the scoring file", "score")
            problems += await asyncio.to_thread(parts.score_check, self.score)
        for number, place in enumerate(self.places):
            source = await self.source(place, f"model-{number}")
            self.models.append(source)
            served = serving.Served(place.kind)
            if place.kind in serving.LOOKED and isinstance(source, Path | bytes):
                served = await asyncio.to_thread(serving.look, place.kind, place.model, source)
                self.looked |= served.needs
            problems += [*served.problems, *self.signed(place, served.kind)]
        if problems:
            raise BuildFailed("; ".join(problems))
        self.log.note("the inputs are here and pass their checks")
        return lock

    async def source(self, place: parts.Place, name: str) -> sources.Source | parts.Made | Layer:
        """What the model's layer is made of: that of an earlier build; the artifact where it is stored; or brought
        here, if it is small or somebody looks into it."""
        model = place.model
        if layer := await self.remembered(place):
            return layer
        if model.size >= sources.BATCH and not model.unpack and place.kind not in serving.LOOKED:
            return await parts.stored_layer(self.ctx, self.doc, place)
        return await self.bring(model.artifact, f"model '{model.id}'", name)

    def signed(self, place: parts.Place, kind: str) -> list[str]:
        """Keeps what the image says of the model, unless a scoring file serves it; the problems."""
        told, problems = serving.signature(place.model, kind) if place.kind else (None, [])
        if told is not None:
            self.signatures[place.model.id] = told
        return problems

    async def bring(self, digest: str, what: str, name: str) -> sources.Source:
        async def path() -> Path:
            return await self.scratch.folder() / name

        return await sources.fetch(self.ctx, self.doc, digest, what, path)

    async def given_lock(self, digest: str) -> tuple[Lock, list[str]]:
        raw = await self.bring(digest, "the lock", "lock")
        if not isinstance(raw, bytes):
            raise BuildFailed(f"the lock is larger than {sources.BATCH} bytes; that much is read at most")
        lock, problems = read_lock(raw.decode(errors="replace"))
        absent = lock.missing(self.server) if lock.pins else []
        if absent:
            problems.append(f"the lock has no {', '.join(absent)}, which the scoring server needs")
        return lock, problems

    # -- dependencies ---------------------------------------------------------------------------------------------

    async def locked(self, given: Lock | None) -> Lock:
        """The lock of this image, and what is to be said of it."""
        resolver = Resolver(self.ctx, self.doc, self.log, self.memo, self.scratch.folder, self.sdists)
        plain, sources_of = self.places, {p.model.id: s for p, s in zip(self.places, self.models, strict=True)
                                          if isinstance(s, Path | bytes)}
        converter = Converter(resolver, self.log, self.memo, self.scratch.folder, (self.ctx.data,))
        self.places = await converter.all(plain, sources_of)

        async def of_places() -> Lock:
            return await resolver.lock(given, {*self.server, *self.looked, *parts.needs(self.places)})

        try:
            lock = await of_places()
        except BuildFailed as exc:
            if self.places == plain:
                raise
            self.log.note(f"scikit-learn serves, not ONNX: the image's packages cannot be had with it: {exc.message}")
            self.places = plain
            lock = await of_places()
        if any(p.kind == "pytorch" for p in self.places) and any(p.name.startswith("nvidia-") for p in lock.pins):
            self.log.note(serving.CUDA)
        return lock

    async def environment(self, lock: Lock) -> Lock:
        """The layers of the locked packages, from an earlier build or made now; the lock as it is to be kept."""
        if not lock.pins:
            self.log.note("warning: the lock is empty, so the image has no packages, and nothing in it can serve"
                          + ("" if self.base is None else " but what its base brings along"))
            return lock
        known = Environments(self.ctx, self.doc, self.log, self.memo, self.cache, self.sdists)
        layers, self.packages, whole = await known.of(lock, self.scratch.folder)
        self.layers += layers
        if whole != lock:
            await self.ctx.blobs.put(
                image_key(self.doc.workspace, self.doc.id, "lock"), store.Chunks(whole.text.encode()))
        return whole

    @functools.cached_property
    def sdists(self) -> Sdists:
        """What of it exists only as source; asked for once the Python is known."""
        return Sdists(self.doc.python_version, self.doc.platform, self.log, self.cache, self.scratch.folder,
                      (self.ctx.data,))

    # -- the other layers -----------------------------------------------------------------------------------------

    def pieces(self) -> list[parts.Made | Layer]:
        """Code, scoring file, models, ``image.json``. Blocking."""
        out: list[parts.Made | Layer] = [parts.code_layer()]
        if self.doc.score:
            out.append(parts.score_layer(self.score))
        for place, source in zip(self.places, self.models, strict=True):
            out.append(parts.model_layer(place, source) if isinstance(source, Path | bytes) else source)
        said = about(self.doc.python_version, bool(self.doc.score),
                     [(p.model, p.path, p.framework or "") for p in self.places], self.signatures,
                     {id: graph.told for id, graph in self.graphs.items()})
        return [*out, parts.about_layer(said)]

    def _model_key(self, place: parts.Place) -> str:
        return key("model", place.model.artifact, place.model.unpack, place.model.id, place.path, place.kind)

    async def remembered(self, place: parts.Place) -> Layer | None:
        """The layer of this model at this place, when the store has it. Small ones are quicker made again, and of an
        MLflow folder the files say what it needs."""
        if place.kind == "mlflow" or place.model.size < sources.BATCH:
            return None
        found = store.unpack(await self.memo.get(self._model_key(place)) or ())
        return found[0] if found and await store.there(self.ctx, self.doc, found) else None

    async def added(self, made: parts.Made | Layer) -> Layer:
        """In the store when it returns."""
        if isinstance(made, Layer):
            return made
        async with self.uploads:
            new = await store.put(self.ctx, self.doc, made)
        self.log.note(told(made.layer) + ("" if new else " (there already)"))
        return made.layer

    async def work(self, fn: Callable[[], T]) -> T:
        """In a thread; a hostile archive fails the build."""
        try:
            return await asyncio.to_thread(fn)
        except Invalid as exc:
            raise BuildFailed(exc.message) from exc

    async def publish(self, lock: Lock) -> Result:
        """Config, manifest, and what is said of the image. The digest is known before anything of it is sent."""
        doc, images = self.doc, self.ctx.images
        lock_digest = digest_of(lock.text.encode())
        config = oci_config(doc.platform, doc.env, self.layers, self.base, labels(doc, lock_digest, self.base))
        body = manifest(config, self.layers, self.base)
        digest = digest_of(body)

        holds = Contents(self.packages, parts.code_layer().layer, lock_digest, self.base,
                         {id: graph.digest for id, graph in self.graphs.items()})
        await store.together([images.put_blob(doc.repo, digest_of(config), store.Chunks(config)),
                              self.say(digest, holds)])
        try:  # last: a tag is there only of what is whole, and told of
            await images.put_manifest(doc.repo, doc.tag, body, MANIFEST)
        except Invalid as exc:
            raise Unavailable(f"the image is not whole: {exc.message}; building it again") from exc
        size = sum(layer.size for layer in self.layers) + len(config) + len(body)
        return Result(digest, size, lock_digest, doc.python_version, self.signatures,
                      dict.fromkeys(self.graphs, "onnx"))

    async def say(self, digest: str, holds: Contents) -> None:
        """What the image is made of and who made it, kept; it is attached to the image once that is ready."""
        doc, key = self.doc, await signer(self.ctx.data)
        bill = sbom(doc, digest, holds)
        signed = encode(key.sign(statement(doc, Origin(digest, holds, bill, self.began, self.ctx.now()))))
        for name, text in zip(NAMES, (bill, signed), strict=True):
            await self.ctx.blobs.put(image_key(doc.workspace, doc.id, name), store.Chunks(text))
