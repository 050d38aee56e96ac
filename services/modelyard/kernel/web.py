"""The HTTP side of every service: routes declared as data, and one frame around each request.

A room declares ``Route``s; their handlers get the room's Context and a ``Call``, answer with ``reply`` (or
``call.stream``) and raise the error tree. The frame does the rest, once: request id, trace, guards, problem+json,
Idempotency-Key, metrics.

    async def show(ctx: Context, call: Call) -> web.StreamResponse:
        return reply(await find(ctx, call.params["ref"]))

    ROUTES = [Route("GET", "/v1/models/{ref}", show, "Show a model", answer=ModelView)]
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import hdrs, web
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel

from ..core.errors import Invalid, ModelyardError, NotFound
from ..core.events import event_id
from . import idempotency
from .call import CLOSING, Call, Query, refuse_unknown, reply
from .guard import Guard
from .observe import REGISTRY, fields, in_service, trace_from
from .problems import answer
from .service import Context

__all__ = ["Call", "Handler", "Query", "Route", "application", "mount", "reply", "web"]

log = logging.getLogger(__name__)
Handler = Callable[[Context, Call], Awaitable[web.StreamResponse]]
REQUESTS = Counter("modelyard_http_requests_total", "Requests answered", ["service", "method", "route", "status"],
                   registry=REGISTRY)
SECONDS = Histogram("modelyard_http_request_seconds", "Time until the answer was complete",
                    ["service", "method", "route"], registry=REGISTRY,
                    buckets=(.002, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60))
RUNNING = Gauge("modelyard_http_requests_running", "Requests being answered now", registry=REGISTRY)
REQUEST_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}$")
EVERYWHERE = {"wait": "Seconds to wait for the next phase, at most 60."}
_CALL: web.RequestKey[Call] = web.RequestKey("call", Call)
_TRACE: web.RequestKey[str] = web.RequestKey("trace", str)
_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
_GUARD: web.AppKey[Guard] = web.AppKey("guard", Guard)
_OWNERS: web.AppKey[dict[str, str]] = web.AppKey("owners", dict)


@dataclass(frozen=True)
class Route:
    """One route of a room. ``{ref}`` in ``path`` matches anything but ``/``: ``iris:4`` and ``iris@champion`` arrive
    whole. A GET answers HEAD too. ``query`` names the parameters that it takes (name → one line of help); with it,
    others are refused before the handler runs. Under ``/internal/v1`` only services may call."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    status: int = 200
    raw: bool = False
    query: Mapping[str, str] = field(default_factory=dict)


def application(guard: Guard) -> web.Application:
    """An application with the frame and no routes yet (``mount`` adds them, ``forward_to`` the others')."""
    app = web.Application(middlewares=[frame], client_max_size=0)
    app[_GUARD] = guard
    app[_OWNERS] = {}

    async def opened(app: web.Application) -> None:
        import asyncio

        app[CLOSING] = asyncio.Event()

    async def closing(app: web.Application) -> None:
        app[CLOSING].set()

    app.on_startup.append(opened)
    app.on_shutdown.append(closing)
    app.on_response_prepare.append(_headers)
    return app


def mount(app: web.Application, routes: Iterable[Route], ctx: Context, owner: str | None = None) -> None:
    """Adds a room's routes, answered with its context; metrics count them under ``owner``, else its service."""
    declared = list(routes)
    heads = {r.path for r in declared if r.method == hdrs.METH_HEAD}
    for route in declared:
        handle = _endpoint(route, ctx)
        added = [app.router.add_route(route.method, route.path, handle)]
        if route.method == hdrs.METH_GET and route.path not in heads:
            added.append(app.router.add_route(hdrs.METH_HEAD, route.path, handle))
        for one in added:
            app[_OWNERS][_key(one)] = owner or ctx.service


def forward_to(app: web.Application, service: str, prefixes: Sequence[str],
               forward: Callable[[str, Call], Awaitable[web.StreamResponse]]) -> None:
    """Everything under ``prefixes`` goes to another service."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return await forward(service, request[_CALL])

    for prefix in prefixes:
        app.router.add_route("*", prefix + "{tail:(?:/.*)?}", handle)


def _endpoint(route: Route, ctx: Context) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        in_service(ctx.service)
        call = request[_CALL]
        if route.query:
            refuse_unknown(call.query, {**EVERYWHERE, **route.query})
        if request.method == hdrs.METH_POST:
            return await idempotency.once(ctx, call, lambda: route.handler(ctx, call), raw=route.raw)
        return await route.handler(ctx, call)

    return handle


@web.middleware
async def frame(request: web.Request,
                handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Around every request: ids, trace, guards, errors as problems, metrics, the access line."""
    given = request.headers.get("X-Request-Id", "")
    request[_ID] = given if REQUEST_ID.match(given) else event_id()
    began = time.perf_counter()
    RUNNING.inc()
    status = 500
    with trace_from(request.headers.get("traceparent")) as trace:
        request[_TRACE] = trace
        try:
            response = await _answered(request, handler)
            status = response.status
            return response
        finally:
            RUNNING.dec()
            _count(request, status, time.perf_counter() - began)


async def _answered(request: web.Request,
                    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    try:
        workspace = request.app[_GUARD].admit(request)
        request[_CALL] = Call(request, workspace=workspace, request_id=request[_ID])
        return await handler(request)
    except ConnectionError:
        raise
    except web.HTTPException as exc:
        return answer(_ours(exc, request), request[_ID])
    except ModelyardError as exc:
        return answer(exc, request[_ID])
    except Exception:  # the door to callers: whatever went wrong, they get a problem and the log gets the traceback
        log.exception("request failed", extra=fields(request_id=request[_ID], path=request.path))
        return answer(ModelyardError("something went wrong in this service", code="internal"), request[_ID])


def _ours(exc: web.HTTPException, request: web.Request) -> ModelyardError:
    if isinstance(exc, web.HTTPMethodNotAllowed):
        allowed = sorted(exc.allowed_methods)
        return Invalid(f"{request.method} is not a method of {request.path}; these are: {', '.join(allowed)}",
                       code="method-not-allowed", allow=allowed)
    if exc.status == 404:
        return NotFound(f"there is no route {request.method} {request.path}; the routes are at /v1/docs",
                        code="no-such-route")
    return Invalid(exc.reason, code="malformed")


async def _headers(request: web.Request, response: web.StreamResponse) -> None:
    if _ID in request:
        response.headers["x-request-id"] = request[_ID]
        response.headers.setdefault("traceparent", request.get(_TRACE, ""))
    response.headers["server"] = "modelyard"
    response.headers.setdefault("cache-control", "no-store")
    response.headers["x-content-type-options"] = "nosniff"


def _key(route: web.AbstractRoute) -> str:
    return f"{route.method} {route.resource.canonical if route.resource else '?'}"


def count_unread(status: int) -> None:
    """A request that never became one, because it could not be read."""
    REQUESTS.labels("kernel", "other", "unread", str(status)).inc()


def _count(request: web.Request, status: int, took: float) -> None:
    route = request.match_info.route
    known = route.resource is not None
    path = route.resource.canonical if route.resource is not None else "unmatched"
    service = request.app[_OWNERS].get(_key(route), "kernel") if known else "kernel"
    method = request.method if known else "other"
    REQUESTS.labels(service, method, path, str(status)).inc()
    SECONDS.labels(service, method, path).observe(took)
    log.debug("%s %s", request.method, request.path, extra=fields(
        request_id=request[_ID], status=status, ms=round(took * 1000, 2), route=path))


