"""Routes of the image builder.

Where a problem is told depends on whose it is. A request that cannot be meant is refused at once (422, every problem
in ``errors``): a model or an artifact that is not there, a requirement that is not one, a Python or a platform that
nothing could run, a model that no flavour serves and no scoring file comes with. Whatever needs a look into the
caller's files or an answer from the package index is found by the build: a ``score.py`` that does not parse or has no
``run``, a lock that is not one, a requirement that nobody offers. That image exists; it ends as ``failed`` with the
reason (file and line where known), and its log tells the rest.

The same request twice is one build as long as that is queued or building, whoever asks and with whatever key: the
answer is the first one's image, with ``Idempotency-Replayed: true``. The same means every field, tags as well, after
models and files were looked up. What a build looks up itself (a base's tag, an index) may be another thing tomorrow: so
the same request after a build is over is the next version. Where nothing has changed, that is made of the same layers
in a moment, and has the same digest.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from ..core.attest import ENVELOPE
from ..core.documents import Ref
from ..core.specs import ImageSpec, Spec, TextMap
from ..kernel.idempotency import REPLAYED
from ..kernel.service import Context
from ..kernel.web import Call, Route, reply, web
from . import context as contexts
from . import export, images
from .keys import signer
from .log import read_log
from .model import OVER, Image


class ImagePatch(Spec):
    """What of an image can change: the rest is what it was built from."""

    tags: TextMap
    properties: TextMap
    description: str = Field(default="", max_length=8192)
    auto_delete: bool = False


class ImageView(ImageSpec):
    """An image as GET answers it."""

    id: str
    version: int
    generation: int
    phase: str
    reason: str | None = None
    digest: str | None = None
    size: int | None = None
    lock_digest: str | None = None
    signatures: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Model id → ``{"inputs": [{"name", "datatype", "shape"}], "outputs": […]}``."""
    samples: dict[str, Any] = Field(default_factory=dict)
    """Model id → an input that it takes, as a body of ``/score``."""
    served_as: dict[str, str] = Field(default_factory=dict)
    """Model id → ``onnx``, where the image holds a graph that was made of the model."""


class Key(BaseModel):
    """The public half of the key that signs this yard's images. ``id``: the SHA-256 of its DER form."""

    id: str
    algorithm: str
    pem: str


class Page(BaseModel):
    """A page of images."""

    items: list[ImageView]
    next: str | None = None


async def create(ctx: Context, call: Call) -> web.StreamResponse:
    spec = await call.body(ImageSpec)
    doc, fresh = await images.create(ctx, spec, call.workspace, call.idempotency_key)
    headers = {} if fresh else {REPLAYED: "true"}
    return reply(doc, 202, {"Location": f"/v1/images/{doc.id}", **headers})


async def index(ctx: Context, call: Call) -> web.StreamResponse:
    where = images.where(call.all("name"), call.all("model"), call.all("tag"), call.all("phase"),
                         call.all("digest"))
    return await call.page(ctx, Image, where)


async def show(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await images.find(ctx, call.params["ref"], call.workspace)
    if call.wait_s and doc.phase not in OVER:
        before = doc.phase
        doc = await call.wait_for(ctx, Image, doc.id, lambda d: d.phase != before)
    return reply(doc, headers=_located(call, doc))


def _located(call: Call, doc: Image) -> dict[str, str]:
    bare = Ref.parse(call.params["ref"]).version is None
    return {"Content-Location": f"/v1/images/{doc.id}"} if bare else {}


async def patch(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await images.find(ctx, call.params["ref"], call.workspace)
    given = await call.merged(ImagePatch, doc.view())
    doc = await images.change(ctx, doc, given, call.check_match)
    return reply(doc, headers=_located(call, doc))


async def delete(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await images.delete(ctx, call.params["ref"], call.workspace, call.check_match)
    return reply(None) if doc is None else reply(doc, 202)


async def log(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await images.find(ctx, call.params["ref"], call.workspace)
    follow = call.query.get("follow", "false").lower() in ("true", "1", "yes")

    async def fresh() -> Image | None:
        return await ctx.store.get(Image, doc.id, workspace=doc.workspace)

    return await call.stream(read_log(ctx, doc, follow=follow, fresh=fresh), "text/plain", follow=follow)


async def context(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await images.find(ctx, call.params["ref"], call.workspace)
    name = f'attachment; filename="{doc.name}-{doc.version}-context.tar"'
    return await call.stream(contexts.context(ctx, doc), "application/x-tar", {"Content-Disposition": name})


async def archive(ctx: Context, call: Call) -> web.StreamResponse:
    doc, form = await images.find(ctx, call.params["ref"], call.workspace), call.query.get("format", "oci")
    found = export.archive(ctx.images, doc, await contexts.manifest(ctx, doc), form)
    name = f'attachment; filename="{doc.name}-{doc.version}-{form}.tar"'
    return await call.stream(found.chunks(), "application/x-tar", {"Content-Disposition": name}, length=found.size)


async def sbom(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await images.find(ctx, call.params["ref"], call.workspace)
    return await call.stream(contexts.kept(ctx, doc, "sbom"), "application/vnd.cyclonedx+json")


async def lock(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await images.find(ctx, call.params["ref"], call.workspace)
    return await call.stream(contexts.kept(ctx, doc, "lock"), "text/plain")


async def provenance(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await images.find(ctx, call.params["ref"], call.workspace)
    return await call.stream(contexts.kept(ctx, doc, "provenance"), ENVELOPE)


async def manifest(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await images.find(ctx, call.params["ref"], call.workspace)
    found = await contexts.manifest(ctx, doc)
    return web.Response(body=found[0], content_type=found[1], headers={"Docker-Content-Digest": str(doc.digest)})


async def signing_key(ctx: Context, call: Call) -> web.StreamResponse:
    key = (await signer(ctx.data)).public
    return reply(Key(id=key.id, algorithm="ed25519", pem=key.pem))


async def hold(ctx: Context, call: Call) -> web.StreamResponse:
    given = call.params
    return reply(await images.hold(ctx, given["ref"], given["kind"], given["holder"], call.workspace))


async def release(ctx: Context, call: Call) -> web.StreamResponse:
    given = call.params
    return reply(await images.release(ctx, given["ref"], given["kind"], given["holder"], call.workspace) or {})


ONE = "/v1/images/{ref}"
HOLD = "/internal/v1/images/{ref}/holds/{kind}/{holder}"
WAIT = {"wait": "Seconds to wait for the next phase, at most 60."}
ROUTES = (
    Route("POST", "/v1/images", create, "Ask for an image; it is built behind the answer", body=ImageSpec,
          answer=ImageView, status=202),
    Route("GET", "/v1/images", index, "List images", answer=Page),
    Route("GET", ONE, show, "Show an image: name:version, or name for the highest ready version", answer=ImageView,
          query=WAIT),
    Route("PATCH", ONE, patch, "Change tags and description, add properties", body=ImagePatch, answer=ImageView),
    Route("DELETE", ONE, delete, "Delete an image that no deployment needs", answer=ImageView, status=202),
    Route("GET", ONE + "/log", log, "The build log", query={"follow": "true: go on until the build is over."}),
    Route("GET", ONE + "/context", context, "The build context as a tar"),
    Route("GET", ONE + "/archive", archive, "The image as one tar, for any machine", query={
        "format": "oci (default): an OCI image layout. docker: what docker load reads."}),
    Route("GET", ONE + "/sbom", sbom, "The bill of materials (CycloneDX 1.6 JSON)"),
    Route("GET", ONE + "/lock", lock, "The lock: every package with its version and hashes, as pip reads it"),
    Route("GET", ONE + "/manifest", manifest, "The OCI manifest, byte for byte: its SHA-256 is the image's digest"),
    Route("GET", ONE + "/provenance", provenance, "Where it comes from (SLSA v1 in a signed DSSE envelope)"),
    Route("GET", "/v1/signing-key", signing_key, "The public key that this yard's images are signed with", answer=Key),
    Route("PUT", HOLD, hold, "A service needs this image", answer=ImageView),
    Route("DELETE", HOLD, release, "A service needs this image no longer"),
)
