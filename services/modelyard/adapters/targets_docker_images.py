"""Images on their way into a Docker Engine: pulled by digest out of a registry, or streamed in out of any store.

An engine calls an image by the digest of its config, however it came by it. Each one in use has a name of ours there,
so that clearing up dangling images does not take it away.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tarfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import Invalid, ModelyardError, NotFound, Unavailable
from ..ports.images import ImageStore
from .folder import in_thread
from .targets_docker_engine import Engine
from .targets_process_roots import manifest_of

log = logging.getLogger(__name__)
ENTRY = ("python3", "-I", "-S", "/opt/modelyard/launch.py")
ABOUT = "/opt/modelyard/image.json"
BLOCK = 512


@dataclass(frozen=True)
class Placed:
    """An image that the engine has."""

    id: str
    entry: tuple[str, ...]
    score: bool
    models: tuple[str, ...]


class EngineImages:
    """The images of one yard in one engine, under ``repository``."""

    def __init__(self, engine: Engine, images: ImageStore, repository: str) -> None:
        self._engine = engine
        self._images = images
        self._repository = repository
        self._placed: dict[str, Placed] = {}
        self._turn: dict[str, asyncio.Lock] = {}

    def tag(self, digest: str) -> str:
        return digest.removeprefix("sha256:")[:32]

    async def place(self, repo: str, digest: str) -> Placed:
        """Has the engine have this image. Invalid when the store has it not or it holds no scoring server."""
        async with self._turn.setdefault(digest, asyncio.Lock()):
            manifest = await manifest_of(self._images, repo, digest)
            id_, pulled = manifest["config"]["digest"], ""
            if await in_thread(self._engine.image, id_) is None:
                pulled = await self._bring(repo, digest, manifest)
                self._placed.pop(digest, None)
            await in_thread(self._engine.tag, id_, self._repository, self.tag(digest))
            if pulled:  # the name that it came by would keep it for ever
                await in_thread(self._engine.untag, pulled)
            if digest not in self._placed:
                self._placed[digest] = await self._describe(repo, id_)
            return self._placed[digest]

    async def collect(self, keep: set[str]) -> None:
        """Takes our names from the images whose digests are not in ``keep``."""
        kept = {f"{self._repository}:{self.tag(digest)}" for digest in keep}
        for name in await in_thread(self._engine.tags, self._repository):
            if name not in kept:
                await in_thread(self._engine.untag, name)

    async def _bring(self, repo: str, digest: str, manifest: dict[str, Any]) -> str:
        """From registry to engine without us, where the store is a registry that the engine reaches; else by us. The
        name that it was pulled by, if it was."""
        reference = getattr(self._images, "reference", None)
        if reference is not None:
            try:
                name: str = reference(repo, digest)
                await in_thread(self._engine.pull, name)
                return name
            except ModelyardError as exc:
                log.info("the engine cannot pull %s itself, so it is sent: %s", digest, exc.message)
        config = b"".join([chunk async for chunk in self._images.get_blob(repo, manifest["config"]["digest"])])
        wanted = json.loads(config).get("rootfs", {}).get("diff_ids") or []
        known = await in_thread(self._known, wanted)
        try:
            await self._send(repo, manifest, config, known)
        except Invalid:
            if not known:
                raise
            await self._send(repo, manifest, config, 0)  # an image was taken away meanwhile, and layers with it
        return ""

    def _known(self, wanted: Sequence[str]) -> int:
        """How many of the first layers the engine has already: they need not be sent."""
        most = 0
        for layers in self._engine.layers():
            same = next((n for n, (a, b) in enumerate(zip(layers, wanted, strict=False)) if a != b),
                        min(len(layers), len(wanted)))
            most = max(most, same)
        return most

    async def _send(self, repo: str, manifest: dict[str, Any], config: bytes, known: int) -> None:
        loop = asyncio.get_running_loop()

        def blob(descriptor: dict[str, Any]) -> Iterator[bytes]:
            """In the engine's thread, of what is read here."""
            chunks = self._images.get_blob(repo, descriptor["digest"])
            while (chunk := asyncio.run_coroutine_threadsafe(_next(chunks), loop).result()) is not None:
                yield chunk

        def archive() -> Iterator[bytes]:
            layers = [f"{layer['digest'].removeprefix('sha256:')}/layer.tar" for layer in manifest["layers"]]
            index = json.dumps([{"Config": "config.json", "RepoTags": None, "Layers": layers}]).encode()
            yield from _member("manifest.json", len(index), iter([index]))
            yield from _member("config.json", len(config), iter([config]))
            sent = set(layers[:known])
            for name, layer in zip(layers, manifest["layers"], strict=True):
                if name not in sent:
                    sent.add(name)
                    yield from _member(name, layer["size"], blob(layer))
            yield bytes(2 * BLOCK)

        await in_thread(self._engine.load, archive())
        if await in_thread(self._engine.image, manifest["config"]["digest"]) is None:
            raise Unavailable(f"the engine took the image {repo} and has it not")

    async def _describe(self, repo: str, id_: str) -> Placed:
        config = (await in_thread(self._engine.image, id_) or {}).get("Config") or {}
        raw = await in_thread(self._engine.read, id_, ABOUT)
        if raw is None:
            raise Invalid(f"the image {repo} holds no scoring server ({ABOUT})")
        try:
            about = json.loads(raw)
        except ValueError as exc:
            raise Invalid(f"the image {repo} does not say what it holds ({ABOUT}): {exc}") from exc
        return Placed(id_, tuple(config.get("Entrypoint") or ENTRY), bool(about.get("score")),
                      tuple(model["name"] for model in about.get("models", ())))


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    try:
        return await anext(chunks, None)
    except NotFound as exc:
        raise Invalid(f"a layer of the image is not in the image store: {exc.message}", code="image-gone") from exc


def _member(name: str, size: int, data: Iterator[bytes]) -> Iterator[bytes]:
    """One file of a tar archive, as a stream."""
    info = tarfile.TarInfo(name)
    info.size = size
    yield info.tobuf(tarfile.PAX_FORMAT)
    whole = 0
    for chunk in data:
        whole += len(chunk)
        yield chunk
    if whole != size:
        raise Invalid(f"{name} has {whole} bytes where the manifest says {size}")
    yield bytes(-size % BLOCK)
