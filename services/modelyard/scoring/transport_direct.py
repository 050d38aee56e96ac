"""REST without a framework in between: plain requests are read here, all others by aiohttp, on the same address."""

from __future__ import annotations

import asyncio

from .rest_connection import Door
from .transport import BACKLOG, listen
from .transport_rest import KEEP_ALIVE_S, SHUTDOWN_S, RestTransport

SWEEP_S = 5.0


class DirectTransport(RestTransport):
    """An asyncio server whose connections hand over to the aiohttp server that ``RestTransport`` is."""

    library = "asyncio, aiohttp"
    _server: asyncio.Server | None = None
    _door: Door
    _sweeping: asyncio.TimerHandle

    async def start(self) -> str:
        sock, address = listen(self._http.address)
        await self._http.runner.setup()
        assert self._http.runner.server is not None
        self._door = Door(self._plane, self._site, self._http.runner.server)
        tls = self._http.tls
        self._server = await asyncio.get_running_loop().create_server(
            self._door, sock=sock, ssl=tls.context() if tls else None, backlog=BACKLOG)
        self._sweep()
        return address

    async def stop(self, grace_s: float) -> None:
        if self._server is None:
            return
        self._server.close()
        self._sweeping.cancel()
        now = asyncio.get_running_loop().time()
        while self._under_way(now) and self._door.time() < now + grace_s:  # noqa: ASYNC110 - it is counted
            await asyncio.sleep(0.02)
        self._door.close()
        await super().stop(grace_s - (self._door.time() - now))

    def _under_way(self, asked: float) -> bool:
        """Somebody waits for an answer; whoever still sends a request is waited for less long."""
        patient = self._door.time() < asked + SHUTDOWN_S
        return any(c.unfinished or (c.reading and patient) for c in self._door.open)

    def _sweep(self) -> None:
        self._door.sweep(KEEP_ALIVE_S, self._plane.limits.timeout_ms / 1000)
        self._sweeping = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
