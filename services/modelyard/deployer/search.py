"""Finding deployments: query parameters to the store's terms."""

from __future__ import annotations

from typing import Any

from ..core.documents import Ref, Where
from ..core.errors import Invalid
from ..kernel.service import Context
from ..kernel.web import Call

FILTERS = {
    "model": "Deployments whose image holds this model: `iris` (any version), `iris:4` or `iris@champion`.",
    "image": "Deployments of this image: `iris-scorer` (any version) or `iris-scorer:7`.",
    "target": "Deployments on this target.", "tag": "`k` or `k=v`; repeat it for more, all must match.",
}


async def where(ctx: Context, call: Call) -> Where:
    """The filters of a request as the store has them. Invalid for one that cannot be read."""
    terms: dict[str, Any] = {}
    if "model" in call.query:
        terms |= await _by_model(ctx, call.query["model"], call.workspace)
    if "image" in call.query:
        ref = Ref.parse(call.query["image"])
        terms |= {"image": str(ref)} if ref.version else {"image_name": ref.name}
    if "target" in call.query:
        terms["target"] = call.query["target"]
    if tags := call.all("tag"):
        pairs = [tag.partition("=") for tag in tags]
        if not all(key for key, _, _ in pairs):
            raise Invalid("a tag is written k or k=v", field="tag")
        terms["tags"] = {key: value if equals else None for key, equals, value in pairs}
    return terms


async def _by_model(ctx: Context, reference: str, workspace: str) -> dict[str, Any]:
    ref = Ref.parse(reference)
    if ref.alias is not None:
        found = await ctx.peers.call("registry", "GET", f"/v1/models/{ctx.peers.quote(reference)}", workspace=workspace)
        if found is None:
            raise Invalid(f"there is no model '{reference}'", field="model")
        return {"models": found["id"]}
    return {"models": str(ref)} if ref.version else {"model_names": ref.name}
