"""The registry's routes."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ..core.documents import DIGEST, Where
from ..core.errors import Invalid, NotFound
from ..core.events import Fact
from ..core.layout import artifact_key
from ..core.specs import ALIAS_NAME, MODEL_NAME, ModelSpec, Spec
from ..kernel import paging
from ..kernel.call import check, merge
from ..kernel.problems import answer
from ..kernel.service import Context
from ..kernel.web import Call, Route, reply, web
from . import artifacts, holds, model
from .latest import highest
from .model import Model, ModelName
from .register import register, resolve

FILTERS = {
    "name": "Exact name.", "tag": "`k` or `k=v`; repeat it for more, all must match.",
    "property": "`k` or `k=v`; repeat it for more, all must match.", "run": "The run that made it.",
    "framework": "As registered.", "latest": "`true`: only the highest version of each name.",
}
ORDERS = {"created": "created", "updated": "updated", "name": "place", "framework": "framework", "run": "run"}


class AliasTarget(Spec):
    """Where an alias points."""

    version: int


# -- artifacts ------------------------------------------------------------------------------------------------------


def _digest(call: Call) -> str:
    digest = call.params["digest"]
    if not DIGEST.fullmatch(digest):
        raise Invalid(f"'{digest}' is not a digest; write sha256: and 64 lower-case hexadecimal digits", field="digest")
    return digest


async def put_artifact(ctx: Context, call: Call) -> web.StreamResponse:
    if "Content-Range" in call.request.headers:
        raise Invalid("uploads cannot be resumed here yet: send the whole artifact", field="Content-Range")
    doc, new = await artifacts.upload(ctx, call.workspace, _digest(call), call.chunks(), call.request.content_length)
    return reply({"digest": doc.id, "size": doc.size, "created": doc.view()["created"]}, 201 if new else 200)


async def head_artifact(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await artifacts.kept(ctx, call.workspace, _digest(call))
    if doc is None:
        absent = answer(NotFound(f"there is no artifact {call.params['digest']}"), call.request_id)
        absent.headers["Upload-Offset"] = "0"
        return absent
    return web.Response(headers={"Content-Length": str(doc.size), "Repr-Digest": repr_digest(doc.id)},
                        content_type="application/octet-stream")


def repr_digest(digest: str) -> str:
    """RFC 9530: ``sha-256=:<base64>:``."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(digest.removeprefix('sha256:'))).decode()}:"


# -- models ---------------------------------------------------------------------------------------------------------


async def create(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await register(ctx, call.workspace, await call.body(ModelSpec), call.idempotency_key)
    return reply(doc, 201, {"Location": f"/v1/models/{doc.id}"})


async def index(ctx: Context, call: Call) -> web.StreamResponse:
    where = _where(call)
    order = call.query.get("order", "-created")
    field = ORDERS.get(order.removeprefix("-"))
    if field is None:
        raise Invalid(f"'order' is one of {', '.join(ORDERS)} (with '-' before it for descending), not '{order}'",
                      field="order")
    query = {k: call.query[k] for k in ("limit", "after") if k in call.query}
    query["order"] = order.replace(order.removeprefix("-"), field)
    found, after = await paging.page(ctx.store, Model, where, query, workspace=call.workspace)
    return reply({"items": [doc.view() for doc in found], "next": after})


def _where(call: Call) -> Where:
    where: dict[str, Any] = {k: call.query[k] for k in ("name", "run", "framework") if k in call.query}
    for parameter, field in (("tag", "tags"), ("property", "properties")):
        if terms := call.all(parameter):
            where[field] = _pairs(terms, parameter)
    latest = call.query.get("latest", "false")
    if latest not in ("true", "false"):
        raise Invalid(f"'latest' is true or false, not '{latest}'", field="latest")
    if latest == "true":
        where["marks"] = "latest"
    return where


def _pairs(terms: Sequence[str], parameter: str) -> dict[str, str | None]:
    """``["team=flora", "gold"]`` → ``{"team": "flora", "gold": None}``; None: the key is there, whatever its value."""
    out: dict[str, str | None] = {}
    for term in terms:
        key, equals, value = term.partition("=")
        wanted = value if equals else None
        if not key:
            raise Invalid(f"'{term}' is not a {parameter}; write k or k=v", field=parameter)
        if None not in (old := out.get(key), wanted) and old != wanted:
            raise Invalid(f"a model has one value of '{key}', not two", field=parameter)
        out[key] = wanted if wanted is not None else old
    return out


async def show(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await resolve(ctx, call.workspace, call.params["ref"])
    return reply(doc, headers=_location(call, doc))


def _location(call: Call, doc: Model, below: str = "") -> dict[str, str]:
    return {} if call.params["ref"] == doc.id else {"Content-Location": f"/v1/models/{doc.id}{below}"}


async def patch(ctx: Context, call: Call) -> web.StreamResponse:
    found = await resolve(ctx, call.workspace, call.params["ref"])
    body = await call.value()
    if not isinstance(body, dict):
        raise Invalid("a merge patch is an object", errors=[{"field": "", "message": "an object is needed"}])

    def change(doc: Model) -> tuple[Model, Sequence[Fact]] | None:
        call.check_match(doc)
        view = doc.view()
        wanted = check(ModelSpec, merge({name: view[name] for name in ModelSpec.model_fields}, body))
        step = model.patched(doc, wanted, ctx.now())
        return None if step is None else (step[0], [Fact("model.updated", {"previous": step[1]})])

    doc = await ctx.change(Model, found.id, change, workspace=call.workspace)
    return reply(doc, headers=_location(call, doc))


async def delete(ctx: Context, call: Call) -> web.StreamResponse:
    gone = await holds.remove(ctx, call.workspace, model.exact(call.params["ref"]), call.check_match)
    return reply(gone)


async def content(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await resolve(ctx, call.workspace, call.params["ref"])
    start = _start(call.request.headers, doc)
    headers = _location(call, doc, "/content") | {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(doc.download_name, safe='')}",
        "ETag": f'"{doc.artifact}"', "Repr-Digest": repr_digest(doc.artifact), "Accept-Ranges": "bytes",
    }
    if start:
        headers["Content-Range"] = f"bytes {start}-{doc.size - 1}/{doc.size}"
    return await call.stream(ctx.blobs.get(artifact_key(call.workspace, doc.artifact), start), headers=headers,
                             length=doc.size - start, status=206 if start else 200)


def _start(headers: Mapping[str, str], doc: Model) -> int:
    """``Range: bytes=N-`` goes on behind N bytes, so that a cut download can be resumed. Other forms, and an
    ``If-Range`` that is not this artifact, mean the whole (RFC 9110 lets a server ignore Range)."""
    found = re.fullmatch(r"bytes=([0-9]{1,18})-", headers.get("Range", ""))
    if found is None or headers.get("If-Range", f'"{doc.artifact}"') != f'"{doc.artifact}"':
        return 0
    if int(found[1]) >= doc.size:
        raise Invalid(f"the artifact has {doc.size} bytes; there is nothing behind {found[1]}", field="Range")
    return int(found[1])


# -- aliases --------------------------------------------------------------------------------------------------------


def _alias(call: Call) -> tuple[str, str]:
    name, alias = call.params["name"], call.params["alias"]
    if not MODEL_NAME.fullmatch(name):
        raise Invalid(f"'{name}' is not a model name", field="name")
    if not ALIAS_NAME.fullmatch(alias) or alias == "latest":
        raise Invalid(f"'{alias}' is not an alias: letters, digits, '-', '.', '_', first a letter, and not 'latest' "
                      "(the bare name means that)", field="alias")
    return name, alias


async def list_aliases(ctx: Context, call: Call) -> web.StreamResponse:
    name = call.params["name"]
    doc = await ctx.store.get(ModelName, name, workspace=call.workspace)
    if doc is None:
        top = await highest(ctx, call.workspace, name)
        if top is None:
            raise NotFound(f"there is no model '{name}'", kind="model", id=name)
        doc = ModelName(id=name, workspace=call.workspace, name=name, created=top.created, updated=top.created)
    return reply(doc)


async def put_alias(ctx: Context, call: Call) -> web.StreamResponse:
    name, alias = _alias(call)
    target = await call.body(AliasTarget)
    return reply(await holds.point(ctx, call.workspace, name, alias, target.version, call.check_match))


async def delete_alias(ctx: Context, call: Call) -> web.StreamResponse:
    name, alias = _alias(call)
    return reply(await holds.point(ctx, call.workspace, name, alias, None, call.check_match))


# -- holds of other services ----------------------------------------------------------------------------------------


async def put_hold(ctx: Context, call: Call) -> web.StreamResponse:
    p = call.params
    return reply(await holds.hold(ctx, call.workspace, model.exact(p["id"]), p["kind"], p["holder"]))


async def delete_hold(ctx: Context, call: Call) -> web.StreamResponse:
    p = call.params
    doc = await holds.release(ctx, call.workspace, model.exact(p["id"]), p["kind"], p["holder"])
    return reply(doc if doc is not None else {"id": p["id"]})


ROUTES = (
    Route("PUT", "/v1/artifacts/{digest}", put_artifact, "Upload an artifact: a file, or a folder as a tar", raw=True,
          status=201),
    Route("HEAD", "/v1/artifacts/{digest}", head_artifact, "Whether an artifact is here"),
    Route("POST", "/v1/models", create, "Register a model: the next version of its name", body=ModelSpec,
          answer=Model, status=201),
    Route("GET", "/v1/models", index, "Find models", query=FILTERS | paging.PARAMETERS),
    Route("GET", "/v1/models/{ref}", show, "Show a model: name:version, name (highest version) or name@alias",
          answer=Model),
    Route("PATCH", "/v1/models/{ref}", patch, "Change tags and description, add properties", body=ModelSpec,
          answer=Model),
    Route("DELETE", "/v1/models/{ref}", delete, "Delete a version that nothing uses"),
    Route("GET", "/v1/models/{ref}/content", content, "Download the artifact"),
    Route("GET", "/v1/models/{name}/aliases", list_aliases, "The aliases of a name", answer=ModelName),
    Route("PUT", "/v1/models/{name}/aliases/{alias}", put_alias, "Point an alias at a version", body=AliasTarget,
          answer=ModelName),
    Route("DELETE", "/v1/models/{name}/aliases/{alias}", delete_alias, "Remove an alias"),
    Route("PUT", "/internal/v1/models/{id}/holds/{kind}/{holder}", put_hold, "Hold a model"),
    Route("DELETE", "/internal/v1/models/{id}/holds/{kind}/{holder}", delete_hold, "Release a model"),
)
