"""REST: Open Inference Protocol v2, ``/score`` and its companions, metrics. Errors are problem documents.

While it drains, idle connections stay open and the next request on one is answered with ``Connection: close``:
a client never meets a connection that closed under its request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from ..core.errors import Invalid, ModelyardError, NotFound
from ..core.inference import BINARY, JSON
from ..core.version import __version__
from . import metrics
from .calls import Answer, Call, Codec, statuses
from .codecs import PROBLEM, RestCodec, ScoreCodec, problem
from .dataplane import DataPlane, too_large
from .image import Slot
from .swagger import describe
from .transport import Tls, Transport, listen, request_id, trace_id

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ["binary_tensor_data"]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpSite:
    """An aiohttp application on ``host:port`` or ``unix:PATH``; port 0 gives a free one."""

    def __init__(self, address: str, app: web.Application, shutdown_s: float = 2.0, tls: Tls | None = None) -> None:
        self._address, self._tls = address, tls
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=shutdown_s,
                                     handler_cancellation=True, keepalive_timeout=75)
        self._site: web.BaseSite | None = None

    async def start(self) -> str:
        """Listens; gives back the address with the port it got. Raises OSError."""
        sock, address = listen(self._address)
        await self._runner.setup()
        self._site = web.SockSite(self._runner, sock, ssl_context=self._tls.context() if self._tls else None)
        await self._site.start()
        return address

    async def stop_listening(self) -> None:
        """No new connection; open ones go on."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    async def close(self) -> None:
        """Ends every connection, after what it is answering or the shutdown time."""
        await self._runner.cleanup()


class RestTransport(Transport):
    """One aiohttp server over the plane."""

    name = "http"
    library = "aiohttp"

    def __init__(self, address: str, plane: DataPlane, tls: Tls | None = None) -> None:
        self._plane = plane
        self._rest, self._score = RestCodec(), ScoreCodec()
        app = web.Application(client_max_size=plane.limits.max_message_bytes, middlewares=[self._around])
        app.add_routes(self._routes())
        self._http = HttpSite(address, app, tls=tls)

    def _routes(self) -> list[web.RouteDef]:
        model, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        return [
            web.get("/", self._healthy), web.post("/score", self._on_score), web.get("/swagger.json", self._on_swagger),
            web.get("/metrics", self._on_metrics), web.get("/v2", self._server_metadata),
            web.get("/v2/health/live", self._live), web.get("/v2/health/ready", self._ready),
            *(route for base in (model, versioned) for route in (
                web.get(base, self._model_metadata), web.get(base + "/ready", self._model_ready),
                web.post(base + "/infer", self._on_infer))),
        ]

    async def start(self) -> str:
        return await self._http.start()

    async def loaded(self) -> None:
        """Readiness is asked of the plane itself."""

    async def drain(self) -> None:
        """``Connection: close`` is asked of the plane itself, answer by answer."""

    async def stop(self, grace_s: float) -> None:
        await self._http.stop_listening()
        end = asyncio.get_running_loop().time() + grace_s
        while self._plane.metrics.in_flight and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 - counted
            await asyncio.sleep(0.02)
        await self._http.close()

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except ModelyardError as exc:
            response = self._failed(request, exc)
        except web.HTTPException as exc:
            response = _json({"type": "about:blank", "title": exc.reason, "status": exc.status, "detail": exc.reason,
                              "code": exc.reason.lower().replace(" ", "-"), "error": exc.reason}, exc.status, PROBLEM)
            if "Allow" in exc.headers:
                response.headers["Allow"] = exc.headers["Allow"]
        if self._plane.draining:
            response.force_close()
        return response

    def _failed(self, request: web.Request, error: ModelyardError) -> web.Response:
        status, http = statuses(error)
        self._plane.metrics.refused("rest", status)
        return web.Response(body=problem(error, request_id(request.headers.get("x-request-id"))), status=http,
                            content_type=PROBLEM, headers=_retry(error))

    async def _on_infer(self, request: web.Request) -> web.StreamResponse:
        length = request.headers.get(HEADER_LENGTH)
        if length is not None and not (length.isascii() and length.isdigit()):
            raise Invalid(f"{HEADER_LENGTH} must be a whole number")
        body = await self._body(request)
        kind = JSON if length is None else f"{BINARY}; header-length={int(length)}"
        call = self._call(request, "rest", "ModelInfer", body, kind, self._rest)
        call.model, call.version = request.match_info["model"], request.match_info.get("version", "")
        call.options = None if length is None else int(length)
        return await self._answer(call)

    async def _on_score(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        kind = request.headers.get("Content-Type", JSON)
        return await self._answer(self._call(request, "score", "score", body, kind, self._score))

    async def _body(self, request: web.Request) -> bytes:
        limit = self._plane.limits.max_message_bytes
        if request.content_length is not None and request.content_length > limit:
            raise too_large(limit, request.content_length)
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge as exc:
            raise too_large(limit) from exc

    def _call(self, request: web.Request, protocol: str, method: str, body: bytes, kind: str, codec: Codec) -> Call:
        return Call(protocol, method, body, kind, codec, request_id=request_id(request.headers.get("x-request-id")),
                    trace_id=trace_id(request.headers.get("traceparent")),
                    key=request.headers.get(self._plane.sampling_header, ""))

    async def _answer(self, call: Call) -> web.Response:
        answer = (await self._plane.handle((call,)))[0]
        status = 200 if answer.error is None else statuses(answer.error)[1]
        return web.Response(body=answer.body, status=status, headers=self._headers(answer))

    def _headers(self, answer: Answer) -> dict[str, str]:
        kind, _, length = answer.body_type.partition("; header-length=")
        headers = {"Content-Type": kind, "x-request-id": answer.request_id, "x-modelyard-model": answer.model,
                   "x-modelyard-deployment": self._plane.deployment, "x-modelyard-prediction-id": answer.prediction_id}
        if length:
            headers[HEADER_LENGTH] = length
        return headers if answer.error is None else headers | _retry(answer.error)

    async def _healthy(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="Healthy") if self._plane.ready else web.Response(text="Not ready", status=503)

    async def _live(self, request: web.Request) -> web.StreamResponse:
        return _json({"live": True})

    async def _ready(self, request: web.Request) -> web.StreamResponse:
        return _json({"ready": self._plane.ready}, 200 if self._plane.ready else 503)

    async def _server_metadata(self, request: web.Request) -> web.StreamResponse:
        return _json({"name": "modelyard", "version": __version__, "extensions": EXTENSIONS})

    async def _model_ready(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        self._plane.about(name, request.match_info.get("version", ""))
        return _json({"name": name, "ready": self._plane.ready}, 200 if self._plane.ready else 503)

    async def _model_metadata(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        _, runner = self._plane.about(name, request.match_info.get("version", ""))
        return _json({"name": name, "versions": self._plane.table.versions(name), "platform": runner.platform,
                      "inputs": _slots(runner.inputs), "outputs": _slots(runner.outputs)})

    async def _on_metrics(self, request: web.Request) -> web.StreamResponse:
        return metrics_response(self._plane)

    async def _on_swagger(self, request: web.Request) -> web.StreamResponse:
        version = request.query.get("version", "2")
        if version not in ("2", "3"):
            raise NotFound(f"there is no swagger of version '{version}'; ask for 2 or 3")
        default = self._plane.table.default
        runner = self._plane.about(default)[1] if default else None
        return _json(describe(self._plane.deployment, runner, int(version)))


def metrics_response(plane: DataPlane) -> web.Response:
    """The plane's metrics in Prometheus' text format."""
    return web.Response(body=plane.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})


def _json(body: Any, status: int = 200, kind: str = JSON) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type=kind)


def _slots(slots: tuple[Slot, ...]) -> list[dict[str, Any]]:
    return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in slots]


def _retry(error: ModelyardError) -> dict[str, str]:
    seconds = error.detail.get("retry_after")
    return {} if seconds is None else {"Retry-After": str(seconds)}
