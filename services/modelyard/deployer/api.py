"""The deployer's routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
from pydantic import BaseModel, ConfigDict, Field

from ..core.documents import STORED, plain
from ..core.errors import Conflict, Invalid, ModelyardError, NotFound, Unavailable
from ..core.specs import DeploymentSpec
from ..kernel.paging import PARAMETERS
from ..kernel.service import Context
from ..kernel.web import Call, Route, reply, web
from . import model
from .images import hold, look_up, resolve, trusted
from .model import Deployment, Found, Past, Sweep
from .search import FILTERS, where

LOG = {"tail": "How many lines to begin with, default 100.", "follow": "`true`: go on with what comes."}
MOST_LINES = 10_000
SCORE_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)
PASSED_IN = ("Content-Type", "Accept", "x-request-id", "traceparent")
PASSED_BACK = ("Content-Type", "Retry-After", "x-modelyard-model", "x-modelyard-deployment")


class Rollback(BaseModel):
    """Which generation to copy; absent: the last healthy one."""

    model_config = ConfigDict(extra="forbid")

    generation: int | None = Field(None, ge=1)


async def create(ctx: Context, call: Call) -> web.StreamResponse:
    spec = await call.body(DeploymentSpec)
    values = _checked(ctx, spec)
    before = await ctx.store.get(Deployment, spec.name, workspace=call.workspace, tombstone=True)
    if before is not None and call.idempotency_key is not None and before.made_by == call.idempotency_key:
        return _answer(before, 202)  # also when it was deleted since
    if before is not None and not before.deleted:
        raise _taken(spec.name)
    return await _create(ctx, call, spec, values, before)


async def put(ctx: Context, call: Call) -> web.StreamResponse:
    spec = await call.body(DeploymentSpec)
    _same_name(call, spec)
    values = _checked(ctx, spec)
    before = await ctx.store.get(Deployment, spec.name, workspace=call.workspace, tombstone=True)
    if before is None or before.deleted:
        if call.if_match() is not None:
            raise Conflict(f"there is no deployment '{spec.name}' to match", code="stale")
        return await _create(ctx, call, spec, values, before)
    return await _revise(ctx, call, values, await _image(ctx, before, values["image"]))


async def patch(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await _get(ctx, call)
    spec = await call.merged(DeploymentSpec, doc.view())
    _same_name(call, spec)
    values = _checked(ctx, spec)
    return await _revise(ctx, call, values, await _image(ctx, doc, values["image"]))


async def rollback(ctx: Context, call: Call) -> web.StreamResponse:
    wanted = await call.body(Rollback) if (await call.read()).strip() else Rollback(generation=None)
    doc = await _get(ctx, call)
    if call.idempotency_key and any(p.made_by == call.idempotency_key for p in doc.history):
        return _answer(doc, 202)
    past = model.rollback_to(doc, wanted.generation)
    image = await look_up(ctx, past.image, call.workspace)
    if image is None:
        raise Conflict(f"generation {past.generation} ran {past.image}, which is gone", code="image-gone",
                       image=past.image)
    return await _revise(ctx, call, _values_of(past), await _runnable(ctx, doc.target, image, doc.workspace),
                         always=True)


async def show(ctx: Context, call: Call) -> web.StreamResponse:
    first = await _get(ctx, call)
    if not call.wait_s or first.settled:
        return _answer(first)
    now = await call.wait_for(ctx, Deployment, first.id, lambda d: d.settled or (d.phase, d.generation) != (
        first.phase, first.generation))
    return _answer(now)


async def index(ctx: Context, call: Call) -> web.StreamResponse:
    return await call.page(ctx, Deployment, await where(ctx, call))


async def history(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await _get(ctx, call)
    items = [{k: v for k, v in plain(past).items() if k != "made_by"} for past in reversed(doc.history)]
    return reply({"items": items, "next": None})


async def delete(ctx: Context, call: Call) -> web.StreamResponse:
    id_ = call.params["name"]

    def change(doc: Deployment) -> model.Step | None:
        call.check_match(doc)
        return model.deleting(doc, ctx.now())

    try:
        doc = await ctx.change(Deployment, id_, change, workspace=call.workspace)
    except NotFound:
        return reply(None)
    ctx.wake("converge")
    try:
        return _answer(await call.wait_for(ctx, Deployment, id_, lambda _: False) if call.wait_s else doc, 202)
    except NotFound:  # gone while we waited: no work remains
        return _answer(doc)


async def log(ctx: Context, call: Call) -> web.StreamResponse:
    doc = await _get(ctx, call)
    tail, follow = call.query.get("tail", "100"), call.query.get("follow", "false")
    if not (tail.isascii() and tail.isdigit() and int(tail[:9]) <= MOST_LINES):
        raise Invalid(f"'tail' is a number from 0 to {MOST_LINES}, not '{tail}'", field="tail")
    if follow not in ("true", "false", "1", "0"):
        raise Invalid(f"'follow' is true or false, not '{follow}'", field="follow")
    going_on = follow in ("true", "1")
    return await call.stream(_lines(ctx, doc, int(tail), going_on), "text/plain", follow=going_on)


async def score(ctx: Context, call: Call) -> web.StreamResponse:
    """A convenience: callers who can reach the endpoint itself are better served there."""
    doc = await _get(ctx, call)
    if not doc.serving or "rest" not in doc.endpoints:
        raise Unavailable(f"deployment '{doc.id}' is {doc.phase} and answers no calls yet", retry_after=1)
    body = await call.read(doc.limits.max_message_bytes)
    given = {name: call.request.headers[name] for name in PASSED_IN if name in call.request.headers}
    headers = {**given, "x-request-id": call.request_id}
    url = f"{doc.endpoints['rest']}/score"
    try:
        async with aiohttp.ClientSession(timeout=SCORE_TIMEOUT, auto_decompress=False) as session:
            try:
                return await _scored(session, url, body, headers)
            except aiohttp.ServerDisconnectedError:  # closed before any byte of the answer: a replica went away
                return await _scored(session, url, body, headers)
    except (aiohttp.ClientError, TimeoutError, OSError) as exc:
        raise Unavailable(f"deployment '{doc.id}' does not answer at {url}: {exc}", retry_after=1) from exc


async def _scored(session: aiohttp.ClientSession, url: str, body: bytes, headers: Mapping[str, str]) -> web.Response:
    async with session.post(url, data=body, headers=headers) as answer:
        back = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers}
        return web.Response(status=answer.status, body=await answer.read(), headers=back)


# -- what the handlers share ------------------------------------------------------------------------------------------


def _answer(doc: Deployment, status: int = 200) -> web.Response:
    return reply(doc, status, {"Location": f"/v1/deployments/{doc.id}"} if status == 202 else None)


def _taken(name: str) -> Conflict:
    return Conflict(f"there is a deployment '{name}'; change it with PUT or PATCH, or choose another name",
                    code="name-taken")


def _checked(ctx: Context, spec: DeploymentSpec) -> dict[str, Any]:
    """The fields to store. Invalid for what cannot be run here."""
    if spec.target not in ctx.targets:
        known = ", ".join(sorted(ctx.targets)) or "none"
        message = f"there is no target '{spec.target}'; the targets are: {known}"
        raise Invalid(message, errors=[{"field": "target", "message": message}])
    return model.values_of(spec)


def _same_name(call: Call, spec: DeploymentSpec) -> None:
    if spec.name != call.params["name"]:
        message = f"the body names '{spec.name}', the path '{call.params['name']}'; a deployment keeps its name"
        raise Invalid(message, errors=[{"field": "name", "message": message}])


async def _get(ctx: Context, call: Call) -> Deployment:
    doc = await ctx.store.get(Deployment, call.params["name"], workspace=call.workspace)
    if doc is None:
        raise NotFound(f"there is no deployment '{call.params['name']}'", kind="deployment", id=call.params["name"])
    return doc


async def _image(ctx: Context, doc: Deployment, reference: str) -> Found:
    """What a change refers to. An exact version that the deployment has already is not asked for again."""
    if reference == doc.image:
        phase = "ready" if doc.image_digest else "unknown"
        return Found(id=doc.image, name=doc.image_name, phase=phase, digest=doc.image_digest, models=doc.models)
    return await _runnable(ctx, doc.target, await resolve(ctx, reference, doc.workspace), doc.workspace)


async def _runnable(ctx: Context, target: str, image: Found, workspace: str) -> Found:
    """The image, when the target can run it and may. Invalid for one without an operating system where one is needed,
    and for one that nobody signed whom the target trusts; of one that is not built yet the loop finds that out."""
    place = ctx.targets.get(target)
    if place is not None and place.needs_base and image.base is None and image.dockerfile is None:
        message = (f"{image.id} has no base, and '{target}' runs containers, which need one: build it with base "
                   "(--base HOST/REPOSITORY:TAG), or deploy it to local")
        raise Invalid(message, code="needs-base", errors=[{"field": "image", "message": message}])
    if place is not None and image.phase == "ready" and image.digest:
        await trusted(ctx, place, image.id, image.digest, workspace)
    return image


async def _create(ctx: Context, call: Call, spec: DeploymentSpec, values: Mapping[str, Any],
                  before: Deployment | None) -> web.Response:
    found = await resolve(ctx, values["image"], call.workspace)
    image = await _runnable(ctx, spec.target, found, call.workspace)
    doc, facts = model.requested({**values, "image": image.id}, spec.name, image, workspace=call.workspace,
                                 now=ctx.now(), made_by=call.idempotency_key, before=before)
    try:
        doc = await ctx.commit(doc, *facts)
    except Conflict as exc:
        raise _taken(spec.name) from exc
    await _sweep_from_now_on(ctx)
    return await _begun(ctx, doc)


async def _revise(ctx: Context, call: Call, values: dict[str, Any], image: Found, *,
                  always: bool = False) -> web.Response:
    changed = False

    def change(doc: Deployment) -> model.Step | None:
        nonlocal changed
        call.check_match(doc)
        step = model.revised(doc, values, image, ctx.now(), always=always, made_by=call.idempotency_key)
        changed = step is not None
        return step

    doc = await ctx.change(Deployment, call.params["name"], change, workspace=call.workspace)
    return await _begun(ctx, doc) if changed else _answer(doc)


async def _begun(ctx: Context, doc: Deployment) -> web.Response:
    """The intent is written: hold the image now, so that nobody deletes it before the loop comes. The loop makes sure
    and says so when it could not be held."""
    with contextlib.suppress(ModelyardError):
        await hold(ctx, doc, doc.image)
    ctx.wake("converge")
    return _answer(doc, 202)


async def _sweep_from_now_on(ctx: Context) -> None:
    if await ctx.store.get(Sweep, "sweep") is None:
        try:
            await ctx.commit(Sweep(id="sweep", due=ctx.now()))
        except Conflict:
            return


def _values_of(past: Past) -> dict[str, Any]:
    """A kept generation as the fields to store."""
    spec = DeploymentSpec.model_validate({"name": "kept", **past.spec}, extra="allow", context=STORED)
    return {**(spec.model_extra or {}), **model.values_of(spec)}


async def _lines(ctx: Context, doc: Deployment, tail: int, follow: bool) -> AsyncIterator[bytes]:
    target = ctx.targets.get(doc.target)
    if target is None:
        raise Unavailable(f"the target '{doc.target}' is not in this deployer's settings")
    try:
        async for lines in target.logs(doc.workspace, doc.id, tail, follow):
            yield lines
    except NotFound:  # nothing was started yet, so nothing was said
        return


def routes(ctx: Context) -> list[Route]:
    """All routes under ``/v1/deployments``."""
    one = "/v1/deployments/{name}"
    return [
        Route("POST", "/v1/deployments", create, "Deploy an image", body=DeploymentSpec, answer=Deployment, status=202),
        Route("GET", "/v1/deployments", index, "Find deployments by model, image, target or tag",
              query={**FILTERS, **PARAMETERS}),
        Route("GET", one, show, "Show a deployment; with `wait`, at its next phase", answer=Deployment),
        Route("PUT", one, put, "Create or replace a deployment", body=DeploymentSpec, answer=Deployment, status=202),
        Route("PATCH", one, patch, "Change some of a deployment", body=DeploymentSpec, answer=Deployment, status=202),
        Route("DELETE", one, delete, "Drain and remove a deployment", answer=Deployment, status=202),
        Route("GET", one + "/history", history, "The last ten generations, newest first"),
        Route("POST", one + "/rollback", rollback, "A new generation copied from an earlier one", body=Rollback,
              answer=Deployment, status=202),
        Route("GET", one + "/log", log, "What the replicas wrote", query=LOG),
        Route("POST", one + "/score", score, "Score through the deployer", raw=True),
    ]
