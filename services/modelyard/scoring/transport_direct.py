"""REST without a framework in between: plain requests are read here, all others by aiohttp, on the same address.

aiohttp is imported, in a thread, when the first of the others comes: it is a tenth of a cold start, and most callers,
probes among them, never need it.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING

from .dataplane import DataPlane
from .rest import Site
from .rest_connection import Door, Other
from .transport import BACKLOG, Tls, Transport, listen

if TYPE_CHECKING:
    from .transport_rest import RestTransport

KEEP_ALIVE_S = 75
SHUTDOWN_S = 2.0
SWEEP_S = 5.0


class DirectTransport(Transport):
    """An asyncio server whose connections hand over to the aiohttp server that a ``RestTransport`` is."""

    name = "http"
    library = "asyncio, aiohttp"
    _door: Door
    _sweeping: asyncio.TimerHandle

    def __init__(self, address: str, plane: DataPlane, tls: Tls | None = None, site: Site | None = None) -> None:
        self._address, self._plane, self._tls, self._site = address, plane, tls, site or Site(plane)
        self._server: asyncio.Server | None = None
        self._rest: RestTransport | None = None
        self._opening: asyncio.Task[Other] | None = None

    async def start(self) -> str:
        sock, address = listen(self._address)
        self._door = Door(self._plane, self._site, self._behind)
        self._server = await asyncio.get_running_loop().create_server(
            self._door, sock=sock, ssl=self._tls.context() if self._tls else None, backlog=BACKLOG)
        self._sweep()
        return address

    async def loaded(self) -> None:
        """Readiness is asked of the plane itself."""

    async def drain(self) -> None:
        """``Connection: close`` is asked of the plane itself, answer by answer."""

    async def stop(self, grace_s: float) -> None:
        if self._server is None:
            return
        self._server.close()
        self._sweeping.cancel()
        now = asyncio.get_running_loop().time()
        while self._under_way(now) and self._door.time() < now + grace_s:  # noqa: ASYNC110 - it is counted
            await asyncio.sleep(0.02)
        self._door.close()
        if self._opening is not None:
            self._opening.cancel()
        if self._rest is not None:
            await self._rest.stop(grace_s - (self._door.time() - now))

    def _behind(self) -> asyncio.Future[Other]:
        """aiohttp's server, for a connection that needs it."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        return self._opening

    async def _open(self) -> Other:
        module = await asyncio.to_thread(importlib.import_module, f"{__package__}.transport_rest")
        self._rest = module.RestTransport(self._address, self._plane, site=self._site)
        return await self._rest.behind()

    def _under_way(self, asked: float) -> bool:
        """Somebody waits for an answer; whoever still sends a request is waited for less long."""
        patient = self._door.time() < asked + SHUTDOWN_S
        return any(c.unfinished or (c.reading and patient) for c in self._door.open)

    def _sweep(self) -> None:
        self._door.sweep(KEEP_ALIVE_S, self._plane.limits.timeout_ms / 1000)
        self._sweeping = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
