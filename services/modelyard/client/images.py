"""Images: build, wait, read the log, take the build context home, delete."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..core.errors import BuildFailed
from .contexts import upload_context
from .downloads import save
from .fields import ImageFields, Reference, reference
from .http import Http, Params, path
from .models import absent_dropped, pages, pairs
from .requirements import Needs, read_requirements
from .uploads import Artifact, OnProgress, Progress, upload
from .verify import Verification, verify
from .waiting import reason_of, settle

OVER = frozenset({"ready", "failed", "cancelled"})
BUILD_S, LATER_S = 1800.0, 60.0
"""How long a build may take where its image does not say, and after that to be told as over."""


class AsyncImage(ImageFields):
    """An image: what the server answered last, and what can be done with it."""

    def __init__(self, images: AsyncImages, document: dict[str, Any]) -> None:
        self._images = images
        self._document = document

    @property
    def document(self) -> dict[str, Any]:
        """The whole document, as GET answers it."""
        return self._document

    async def reload(self) -> AsyncImage:
        """Asks the server again."""
        self._document = (await self._images.get(self.id)).document
        return self

    async def wait(self, timeout_s: float | None = None, *, on_progress: OnProgress | None = None) -> AsyncImage:
        """Returns when the build is over. Without ``timeout_s`` that is waited for as long as it may take: until the
        image's turn comes, and then its own ``timeout_s`` and a minute. Raises BuildFailed with the reason (file and
        line where known; the rest is in ``log``) and Unavailable with ``code="timeout"``."""
        self._document = await self._images.settled(self.id, timeout_s, on_progress)
        return self

    async def log(self) -> str:
        """The build log so far."""
        return "\n".join([line async for line in self._images.log(self.id)])

    async def update(
        self, *, tags: Mapping[str, str | None] | None = None, properties: Mapping[str, str] | None = None,
        description: str | None = None, auto_delete: bool | None = None,
    ) -> AsyncImage:
        """As ``images.update``; the object shows the new state."""
        changed = await self._images.update(
            self, tags=tags, properties=properties, description=description, auto_delete=auto_delete)
        self._document = changed.document
        return self

    async def delete(self) -> None:
        """As ``images.delete``."""
        await self._images.delete(self)


class AsyncImages:
    """The image builder."""

    def __init__(self, http: Http) -> None:
        self._http = http

    async def build(
        self, name: str, *, models: Sequence[Reference] = (), score: str | Path | None = None,
        requirements: Sequence[str] | str | Path | Needs | None = None, lock: str | Path | None = None,
        python: str | None = None, platform: str | None = None, base: str | None = None,
        dockerfile: str | Path | None = None, env: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None, properties: Mapping[str, str] | None = None,
        description: str | None = None, auto_delete: bool | None = None, timeout_s: int | None = None,
        onnx: bool | None = None, on_progress: OnProgress | None = None,
    ) -> AsyncImage:
        """Asks for the next version of ``name`` and returns at once; ``wait`` on the answer.

        ``score`` is a ``score.py`` or a folder with one (absent: the models' own flavour answers).
        ``requirements`` is a list, or the path of a requirements file, a ``pyproject.toml`` (with extras:
        ``pyproject.toml[gpu]``) or a conda ``environment.yml``, whose Python the image gets unless ``python`` says
        another; ``lock`` a lock to use as it is; ``timeout_s`` how long the build may take (30 min). ``base`` is what
        the image stands on. In its place ``dockerfile``, a folder with a ``Dockerfile`` at its top (or that file
        alone), is built by the yard's Docker Engine; what its ``.dockerignore`` names stays here. With ``auto_delete``
        the image goes when the last deployment that used it needs it no longer. With ``onnx`` small scikit-learn models
        that have a sample are served as ONNX, where that answers the same. Raises Invalid with every problem that can
        be seen before building.

        >>> image = yard.images.build("iris-scorer", models=[model]).wait()
        >>> image.id, image.phase
        ('iris-scorer:1', 'ready')
        """
        needs = requirements if isinstance(requirements, Needs) else await asyncio.to_thread(
            read_requirements, requirements)
        body = absent_dropped(
            name=name, models=[reference(m) for m in models], score=await self._stored(score, on_progress),
            requirements=needs.requirements, constraints=needs.constraints,
            lock=await self._stored(lock, on_progress), python=python or needs.python, platform=platform, base=base,
            dockerfile=await self._stored(dockerfile, on_progress, upload_context), env=env, tags=tags,
            properties=properties, description=description, auto_delete=auto_delete, timeout_s=timeout_s, onnx=onnx,
        )
        return await self.create(body)

    async def _stored(self, source: str | Path | None, on_progress: OnProgress | None,
                      send: Callable[..., Awaitable[Artifact]] = upload) -> str | None:
        """The digest of a file or folder, which ``send`` brings there; a digest as it is."""
        text = None if source is None else str(source)
        if text is None or text.startswith("sha256:"):
            return text
        return (await send(self._http, Path(text), on_progress)).digest

    async def create(self, document: Mapping[str, Any]) -> AsyncImage:
        """Asks for an image by the body of ``POST /v1/images``: files are digests already."""
        return AsyncImage(self, await self._http.json("POST", path("images"), json=dict(document)))

    async def get(self, image: Reference) -> AsyncImage:
        """``iris-scorer:7``, or ``iris-scorer`` (the highest ready version). Raises NotFound."""
        return AsyncImage(self, await self._http.json("GET", path("images", reference(image))))

    async def list(
        self, *, name: str | None = None, model: Reference | None = None, digest: str | None = None,
        tags: Mapping[str, str] | Sequence[str] | None = None, order: str | None = None, limit: int | None = None,
    ) -> list[AsyncImage]:
        """Images that match every term, the newest first. ``digest`` is the image's, whole: which versions are it?

        >>> [i.id for i in yard.images.list(model="iris:1")]
        ['iris-scorer:1']
        """
        params: Params = {
            "name": name, "model": None if model is None else reference(model), "tag": pairs(tags), "order": order,
            "digest": digest}
        return [AsyncImage(self, d) async for d in pages(self._http, path("images"), params, limit)]

    async def update(
        self, image: Reference, *, tags: Mapping[str, str | None] | None = None,
        properties: Mapping[str, str] | None = None, description: str | None = None, auto_delete: bool | None = None,
    ) -> AsyncImage:
        """Sets tags (None takes one away), adds properties (never changes one), sets the description and whether the
        image goes with the last deployment that needs it.

        >>> yard.images.update("iris-scorer:1", tags={"stage": "trial"}, auto_delete=False).tags["stage"]
        'trial'
        """
        patch = absent_dropped(tags=tags, properties=properties, description=description, auto_delete=auto_delete)
        return AsyncImage(self, await self._http.json("PATCH", path("images", reference(image)), json=patch))

    async def delete(self, image: Reference) -> None:
        """Deletes one version. Raises InUse with ``blockers`` while a deployment needs it; one that is not there
        is fine."""
        await self._http.send("DELETE", path("images", reference(image)))

    async def log(self, image: Reference, *, follow: bool = False) -> AsyncIterator[str]:
        """The build log, line by line; ``follow`` goes on until the build is over."""
        where = path("images", reference(image), "log")
        async with self._http.lines(where, params={"follow": follow or None}, endless=follow) as lines:
            async for line in lines:
                yield line.decode(errors="replace")

    async def export(
        self, image: Reference, to: str | Path, *, form: Literal["context", "oci", "docker"] = "context",
        on_progress: OnProgress | None = None,
    ) -> Path:
        """Writes a tar to the file ``to``: the build context (a Dockerfile and everything the image was made from), the
        image as an OCI layout, or as ``docker load`` reads it. Whole or not at all.

        >>> yard.images.export("iris-scorer:1", "iris.tar", form="oci")
        PosixPath('iris.tar')
        """
        if form == "context":
            return await save(self._http, path("images", reference(image), "context"), Path(to),
                              on_progress=on_progress)
        known = await self.get(image)  # one version, and how much of it will come
        return await save(self._http, path("images", known.id, "archive"), Path(to), params={"format": form},
                          size=int(known.document.get("size") or 0), on_progress=on_progress)

    async def kept(self, image: Reference, what: Literal["sbom", "provenance", "lock"]) -> bytes:
        """What the build left beside the image, byte for byte: the bill of materials (CycloneDX 1.6 JSON), the signed
        provenance (a DSSE envelope), or the lock (as pip reads it). Raises NotFound before the image is ready."""
        return (await self._http.send("GET", path("images", reference(image), what))).body

    async def verify(self, image: Reference, key: str | Path | None = None) -> Verification:
        """Checks the image against its signed provenance: manifest, signature, subject, models, lock, base and bill of
        materials. ``key`` is a file of public keys (or their PEM text) to trust; absent, the yard's own is asked for.

        >>> yard.images.verify("iris-scorer:1", key="yard.pub").ok
        True
        """
        return await verify(self._http, reference(image), key)

    async def key(self) -> dict[str, Any]:
        """The public key that the yard signs its images with: ``id``, ``algorithm``, ``pem``."""
        return dict(await self._http.json("GET", path("signing-key")))

    async def settled(self, image: Reference, timeout_s: float | None,
                      on_progress: OnProgress | None) -> dict[str, Any]:
        """The document of an image whose build is over and went well. Raises BuildFailed."""

        def seen(document: dict[str, Any]) -> None:
            if on_progress:
                why = next((f", waiting: {c['message']}" for c in document.get("conditions") or ()
                            if c.get("reason") == "Waiting"), "")
                on_progress(Progress("build", message=f"{document.get('phase')}{why}"))

        ref = reference(image)
        where, what = path("images", ref), f"image '{ref}'"
        if timeout_s is None:
            begun = await settle(self._http, where, lambda d: d.get("phase") != "queued", math.inf, what, seen)
            timeout_s = float(begun.get("timeout_s") or BUILD_S) + LATER_S
        document = await settle(self._http, where, lambda d: d.get("phase") in OVER, timeout_s, what, seen)
        if document["phase"] == "cancelled":
            raise BuildFailed(f"image '{ref}' was cancelled: {reason_of(document)}", code="cancelled", image=ref)
        if document["phase"] != "ready":
            raise BuildFailed(
                f"image '{ref}' {document['phase']}: {reason_of(document)}", image=ref,
                help=f"modelyard images log {ref}")
        return document
