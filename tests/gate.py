"""A gate before a real registry that fails on order: statuses, silence, cuts; and keeps what passed through it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

HOP = {"transfer-encoding", "connection", "content-length"}


@dataclass
class Fault:
    """What happens to the next ``times`` calls that fit: ``status``; or silence; or the connection is cut when so many
    bytes of the request (``sent``) or of the answer (``got``) went through; ``after``: cut once the registry did it."""

    fits: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    silent: bool = False
    sent: int | None = None
    got: int | None = None
    after: bool = False
    ranges: bool = True


class Gate:
    """Passes calls on to a registry, and fails as planned. ``seen`` are the calls, ``PATCH /v2/…``."""

    def __init__(self, port: int) -> None:
        self.target, self.port = f"http://127.0.0.1:{port}", 0
        self.planned: list[Fault] = []
        self.seen: list[str] = []
        self.wants: Callable[[web.Request], web.Response | None] = lambda request: None
        """Looks at each call first; what it answers, if anything, is the answer."""
        self._silence = asyncio.Event()
        self._holds: dict[str, asyncio.Event] = {}

    @property
    def url(self) -> str:
        return f"oci://127.0.0.1:{self.port}"

    def plan(self, fits: str, **how: Any) -> None:
        self.planned.append(Fault(fits, **how))

    def count(self, fits: str) -> int:
        return sum(bool(re.search(fits, call)) for call in self.seen)

    def hold(self, fits: str) -> asyncio.Event:
        """Calls that fit do not go on until ``let_go``; the event says that one is there."""
        return self._holds.setdefault(fits, asyncio.Event())

    def let_go(self) -> None:
        """They fail, as they would at the end of who made them."""
        self._holds.clear()
        self._silence.set()
        self._silence = asyncio.Event()

    def _due(self, call: str) -> Fault | None:
        found = next((f for f in self.planned if f.times and re.search(f.fits, call)), None)
        if found is not None:
            found.times -= 1
        return found

    async def handle(self, request: web.Request) -> web.StreamResponse:
        call = f"{request.method} {request.path_qs}"
        self.seen.append(call)
        if (refused := self.wants(request)) is not None:
            return refused
        if held := next((event for fits, event in self._holds.items() if re.search(fits, call)), None):
            held.set()
            await self._silence.wait()
            return web.Response(status=503)
        fault = self._due(call)
        if fault is not None and fault.silent:
            await self._silence.wait()
        if fault is not None and fault.status:
            return web.Response(status=fault.status, headers=fault.headers, body=fault.body)
        body = await request.read()
        cut = body[:fault.sent] if fault is not None and fault.sent is not None else body
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP}
        if fault is not None and not fault.ranges:
            headers.pop("Range", None)
        async with aiohttp.ClientSession(auto_decompress=False) as session, session.request(
                request.method, self.target + request.path_qs, headers=headers, data=cut or None) as answer:
            got = await answer.read()
            if fault is not None and (fault.sent is not None or fault.after):
                assert request.transport is not None
                request.transport.abort()
            return await self._answer(request, answer, got, fault.got if fault is not None else None)

    async def _answer(self, request: web.Request, answer: aiohttp.ClientResponse, got: bytes,
                      limit: int | None) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers={
            k: v for k, v in answer.headers.items() if k.lower() not in HOP or request.method == "HEAD"})
        if request.method != "HEAD":
            response.content_length = len(got)
        await response.prepare(request)
        if request.method != "HEAD":
            await response.write(got if limit is None else got[:limit])
            if limit is not None:
                assert request.transport is not None
                request.transport.abort()
        return response

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Gate]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            self._silence.set()
            await runner.cleanup()
