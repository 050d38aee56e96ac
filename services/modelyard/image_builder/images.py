"""Finding, creating, changing and deleting images: what the routes do, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..core.documents import DIGEST, Ref, Where
from ..core.errors import Conflict, InUse, Invalid, ModelyardError, NotFound
from ..core.events import Fact
from ..core.specs import ImageSpec
from ..kernel.forward import Peers
from ..kernel.service import Context
from . import model, request, sources
from .model import Image

TRIES, PAGE = 1000, 100
HOLDERS = {"deployment": ("deployer", "/v1/deployments/")}


async def find(ctx: Context, ref: str, workspace: str) -> Image:
    """The image that ``name:version`` or ``name`` (the highest ready version) means. NotFound."""
    parsed = Ref.parse(ref)
    if parsed.alias is not None:
        raise Invalid("images have no aliases; write name or name:version", field="ref")
    if parsed.version is not None:
        doc = await ctx.store.get(Image, str(parsed), workspace=workspace)
        if doc is None:
            raise NotFound(f"there is no image '{ref}'", kind="image", id=ref)
        return doc
    where: Where = {"name": parsed.name, "phase": "ready"}
    for doc in await ctx.store.find(Image, where, workspace=workspace, order="-version", limit=10):
        if not doc.deleting:
            return doc
    raise NotFound(f"there is no ready image '{ref}'", kind="image", id=ref)


async def create(ctx: Context, spec: ImageSpec, workspace: str, key: str | None) -> tuple[Image, bool]:
    """The next version, ``queued``, its models held as far as the registry answers; the loop does the rest.
    ``key`` seen before: the image made by it. The same request still being built: that image. Whether it is new."""
    if key is not None:
        done = await ctx.store.find(Image, {"made_by": key}, workspace=workspace, limit=1, tombstones=True)
        if done:
            return done[0], False
    found = await request.resolve(ctx, spec, workspace)
    doc, fresh = await _numbered(ctx, spec, found, workspace, key)
    if fresh:
        with suppress(ModelyardError):  # the loop asks again, and says what came of it
            await sources.hold(ctx, doc)
        ctx.wake("build")
    return doc, fresh


async def _numbered(ctx: Context, spec: ImageSpec, found: request.Resolved, workspace: str,
                    key: str | None) -> tuple[Image, bool]:
    for _ in range(TRIES):
        # the number first: who asks for the same after this look takes it too, and then one of us looks again
        top = await ctx.store.find(Image, {"name": spec.name}, workspace=workspace, order="-version", limit=1,
                                   tombstones=True)
        new = model.requested(spec, found.models, workspace=workspace, version=top[0].version + 1 if top else 1,
                              python=found.python, platform=found.platform, now=ctx.now(), made_by=key)
        if top and (same := await _under_way(ctx, new)):
            return same, False
        try:
            return await ctx.commit(new, Fact("image.requested")), True
        except Conflict:  # another request took this version
            continue
    raise Conflict(f"too many requests for images '{spec.name}' at once; try again")


async def _under_way(ctx: Context, new: Image) -> Image | None:
    """An image of the same request whose build is not over. ``queued`` is looked at before ``building``, which is the
    way that images go."""
    for phase in ("queued", "building"):
        where, after = {"name": new.name, "phase": phase, **({"models": new.models[0]} if new.models else {})}, None
        while page := await ctx.store.find(Image, where, workspace=new.workspace, order="version", after=after,
                                           limit=PAGE):
            for doc in page:
                if not doc.deleting and model.alike(doc, new):
                    return doc
            if len(page) < PAGE:
                break
            after = (page[-1].version, page[-1].id)
    return None


async def change(ctx: Context, doc: Image, given: Any, check: Any) -> Image:
    """Tags, description, ``auto_delete`` and new properties; anything else is part of the image. Same: unchanged."""
    def step(newest: Image) -> model.Step | None:
        check(newest)
        kept = {k: v for k, v in newest.properties.items() if given.properties.get(k) != v}
        if kept:
            errors = [{"field": f"properties.{k}", "message": f"is '{v}' and cannot change; properties can be added"}
                      for k, v in sorted(kept.items())]
            raise Invalid("; ".join(f"{e['field']} {e['message']}" for e in errors), code="write-once", errors=errors)
        return model.changed(newest, ctx.now(), given.model_dump())

    return await ctx.change(Image, doc.id, step, workspace=doc.workspace)


async def delete(ctx: Context, id: str, workspace: str, check: Any) -> Image | None:
    """Marks it for the loop; None when it is not there. InUse with the deployments that need it."""
    if Ref.parse(id).version is None:
        raise Invalid(f"'{id}' names no version; write {id}:VERSION", field="ref")
    doc = await ctx.store.get(Image, id, workspace=workspace)
    if doc is None:
        return None
    if doc.deleting:
        return doc
    check(doc)
    blockers, gone = await _blockers(ctx, doc)
    if blockers:
        told = ", ".join(f"{b['kind']} '{b['id']}' ({b['phase']})" for b in blockers)
        raise InUse(f"{id} is in use by {told}", blockers=blockers)

    def step(newest: Image) -> model.Step | None:
        if set(newest.holds) - gone:
            raise Conflict(f"{id} was taken into use just now", code="in-use-now")
        return model.removing(newest, ctx.now(), gone)

    try:
        doc = await ctx.change(Image, id, step, workspace=workspace)
    except NotFound:
        return None
    ctx.wake("build")
    return doc


async def _blockers(ctx: Context, doc: Image) -> tuple[list[dict[str, Any]], frozenset[str]]:
    """The holders that are there, and the holds of those that are not."""
    answers = await asyncio.gather(*(_holder(ctx, hold, doc.workspace) for hold in doc.holds))
    found = dict(zip(doc.holds, answers, strict=True))
    return [b for b in answers if b is not None], frozenset(h for h, b in found.items() if b is None)


async def _holder(ctx: Context, hold: str, workspace: str) -> dict[str, Any] | None:
    kind, _, id = hold.partition("/")
    service, prefix = HOLDERS[kind]
    try:
        answer = await ctx.peers.call(service, "GET", prefix + Peers.quote(id), workspace=workspace)
    except ModelyardError:  # who cannot be asked counts: better a refusal than a hole
        return {"kind": kind, "id": id, "phase": "unknown"}
    return None if answer is None else {"kind": kind, "id": id, "phase": answer.get("phase")}


async def hold(ctx: Context, id: str, kind: str, holder: str, workspace: str) -> Image:
    """The image, held. Repeating is fine. NotFound; Conflict once it is being deleted."""
    def step(newest: Image) -> model.Step | None:
        if newest.deleting:
            raise Conflict(f"image '{id}' is being deleted", code="being-deleted")
        return model.held(newest, _hold(kind, holder))

    return await ctx.change(Image, id, step, workspace=workspace)


async def release(ctx: Context, id: str, kind: str, holder: str, workspace: str) -> Image | None:
    """Without the hold; None when there is no such image. Repeating is fine."""
    try:
        doc = await ctx.change(Image, id, lambda d: model.released(d, _hold(kind, holder), ctx.now()),
                               workspace=workspace)
    except NotFound:
        return None
    if doc.deleting:
        ctx.wake("build")
    return doc


def _hold(kind: str, holder: str) -> str:
    if kind not in HOLDERS:
        raise Invalid(f"'{kind}' holds no images; {', '.join(HOLDERS)} does", field="kind")
    return f"{kind}/{holder}"


def where(names: Sequence[str], models: Sequence[str], tags: Sequence[str], phases: Sequence[str],
          digests: Sequence[str] = ()) -> Where:
    """The filter of a list. ``models``: an exact version, or a name for any version of it. Invalid."""
    out: dict[str, Any] = {}
    if digests:
        if not DIGEST.match(digests[-1]):
            raise Invalid("list images by their whole digest: sha256: and 64 hexadecimal digits", field="digest")
        out["digest"] = digests[-1]
    if names:
        out["name"] = names[-1]
    if phases:
        out["phase"] = phases[-1]
    for text in models[-1:]:
        ref = Ref.parse(text)
        if ref.alias is not None:
            raise Invalid("list images by model name or by name:version", field="model")
        out["models" if ref.version else "model_names"] = str(ref)
    if tags:
        pairs = [text.partition("=") for text in tags]
        out["tags"] = {name: value if equals else None for name, equals, value in pairs}
    return out
