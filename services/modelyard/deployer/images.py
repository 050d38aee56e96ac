"""What the deployer asks the image builder: what an image is, and to keep it while a deployment needs it."""

from __future__ import annotations

from ..core.attest import require
from ..core.documents import Ref
from ..core.errors import Conflict, InUse, Invalid, Unavailable
from ..kernel.service import Context
from ..ports.targets import DeploymentTarget
from .model import Deployment, Found

BUILDER = "image-builder"


async def look_up(ctx: Context, reference: str, workspace: str) -> Found | None:
    """The image that a reference means now (a bare name: the highest ready version), or None."""
    answer = await ctx.peers.call(BUILDER, "GET", f"/v1/images/{ctx.peers.quote(reference)}", workspace=workspace)
    return None if answer is None else Found.model_validate(answer)


async def resolve(ctx: Context, reference: str, workspace: str) -> Found:
    """As look_up; Invalid when there is none."""
    found = await look_up(ctx, reference, workspace)
    if found is None:
        ready = "" if Ref.parse(reference).version else " with a ready version"
        message = f"there is no image '{reference}'{ready}"
        raise Invalid(message, errors=[{"field": "image", "message": message}])
    return found


async def trusted(ctx: Context, target: DeploymentTarget, image: str, digest: str, workspace: str) -> None:
    """Returns when the target may run the image: it trusts whoever signed the provenance of exactly this digest, or
    asks for no signature. Invalid (``unsigned``) with the reason; Unavailable when the builder does not answer."""
    if not target.signed_by:
        return
    where = f"/v1/images/{ctx.peers.quote(image)}/provenance"
    try:
        answer = await ctx.peers.call(BUILDER, "GET", where, workspace=workspace)
        if answer is None:
            raise Invalid("it has no provenance")
        require(answer, target.signed_by, digest)
    except Invalid as exc:
        message = f"{image} is unsigned: {exc.message}; this target runs only what a key that it trusts has signed"
        raise Invalid(message, code="unsigned", errors=[{"field": "image", "message": message}]) from exc


async def hold(ctx: Context, doc: Deployment, image: str) -> str:
    """Keeps the image from being deleted. Empty when it is held, else why it cannot be. Raises Unavailable."""
    try:
        answer = await ctx.peers.call(BUILDER, "PUT", _hold(ctx, doc, image), workspace=doc.workspace)
    except (Conflict, InUse) as exc:
        return exc.message
    return f"image {image} is gone" if answer is None else ""


async def let_go(ctx: Context, doc: Deployment, image: str) -> None:
    """Gives a hold back; one that was never placed is fine. Raises Unavailable."""
    await ctx.peers.call(BUILDER, "DELETE", _hold(ctx, doc, image), workspace=doc.workspace)


async def keep_holds(ctx: Context, doc: Deployment) -> tuple[dict[str, bool], str]:
    """Places what is wanted, gives back what nobody needs: ({image: placed or given back}, why the image that this
    generation wants cannot be held). What the builder does not answer to is tried at the next look."""
    done: dict[str, bool] = {}
    refused = ""
    try:
        for image, state in doc.holds.items():
            if image not in doc.needs():
                await let_go(ctx, doc, image)
                done[image] = False
            elif state == "wanted":
                why = await hold(ctx, doc, image)
                if not why:
                    done[image] = True
                elif image == doc.image:
                    refused = why
    except Unavailable:
        return done, ""
    return done, refused


def _hold(ctx: Context, doc: Deployment, image: str) -> str:
    return f"/internal/v1/images/{ctx.peers.quote(image)}/holds/deployment/{ctx.peers.quote(doc.id)}"
