"""The admin socket: ``/livez``, ``/readyz``, ``/metrics``, ``POST /drain``, ``POST /spread``. For whoever runs the
replica, not for callers; it answers while models load, while calls queue and while the server drains."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web

from .dataplane import DataPlane
from .rest import exposition
from .transport_rest import HttpSite, respond


class Admin:
    """``drain`` is called when somebody posts ``/drain``, ``spread`` when ``/spread``."""

    def __init__(self, address: str, plane: DataPlane, drain: Callable[[], Awaitable[None]],
                 spread: Callable[[], Awaitable[None]]) -> None:
        self._plane, self._drain, self._spread = plane, drain, spread
        app = web.Application()
        app.add_routes([web.get("/livez", self._livez), web.get("/readyz", self._readyz),
                        web.get("/metrics", self._metrics), web.post("/drain", self._on_drain),
                        web.post("/spread", self._on_spread)])
        self._http = HttpSite(address, app, shutdown_s=0.5)

    async def start(self) -> str:
        """Listens; gives back the address with the port it got."""
        return await self._http.start()

    async def close(self) -> None:
        """Closes every connection."""
        await self._http.close()

    async def _livez(self, request: web.Request) -> web.Response:
        return self._state(503 if self._plane.stuck else 200)

    async def _readyz(self, request: web.Request) -> web.Response:
        return self._state(200 if self._plane.ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return respond(exposition(self._plane))

    async def _on_drain(self, request: web.Request) -> web.Response:
        await self._drain()
        return self._state(202)

    async def _on_spread(self, request: web.Request) -> web.Response:
        await self._spread()
        return self._state(202)

    def _state(self, status: int) -> web.Response:
        plane = self._plane
        body = {"ready": plane.ready, "draining": plane.draining, "in_flight": plane.metrics.in_flight,
                "stuck": plane.stuck}
        return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
