"""REST on aiohttp.

While it drains, idle connections stay open and the next request on one is answered with ``Connection: close``:
a client never meets a connection that closed under its request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from ..core.errors import Invalid, ModelyardError
from .calls import TooSlow, UnknownEncoding, too_large
from .dataplane import DataPlane
from .http_server import Runner
from .rest import SERVER, Reply, Site, refusal
from .transport import BACKLOG, Tls, Transport, listen
from .transport_direct import KEEP_ALIVE_S, SHUTDOWN_S

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ENCODINGS = ("gzip", "deflate")
"""Of bodies; aiohttp takes them off, what others it may know besides is chance."""


class RestTransport(Transport):
    """One aiohttp server over the plane, or over another ``site`` than its own."""

    name = "http"
    library = "aiohttp"

    def __init__(self, address: str, plane: DataPlane, tls: Tls | None = None, site: Site | None = None) -> None:
        self._address, self._plane, self._tls, self._site = address, plane, tls, site or Site(plane)
        self._patience_s = plane.limits.timeout_ms / 1000
        app = web.Application(client_max_size=plane.limits.max_message_bytes, middlewares=[self._around])
        # the routes are the site's
        app.router.add_route("*", "/{path:.*}", self._handle, expect_handler=self._expected)
        app.on_response_prepare.append(_name_us)
        self._runner = Runner(app, self._refused, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S,
                              handler_cancellation=True, keepalive_timeout=KEEP_ALIVE_S)
        self._listening: web.BaseSite | None = None

    async def start(self) -> str:
        sock, address = listen(self._address)
        await self._runner.setup()
        self._listening = web.SockSite(self._runner, sock, ssl_context=self._tls.context() if self._tls else None,
                                       backlog=BACKLOG)
        await self._listening.start()
        return address

    async def behind(self) -> Callable[[], asyncio.Protocol]:
        """Instead of ``start``: does not listen, and makes a protocol for each connection that somebody else took."""
        await self._runner.setup()
        assert self._runner.server is not None
        return self._runner.server

    async def loaded(self) -> None:
        """Readiness is asked of the plane itself."""

    async def drain(self) -> None:
        """``Connection: close`` is asked of the plane itself, answer by answer."""

    async def stop(self, grace_s: float) -> None:
        if self._listening is not None:
            await self._listening.stop()
            self._listening = None
        end = asyncio.get_running_loop().time() + grace_s
        while self._plane.metrics.in_flight and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 - counted
            await asyncio.sleep(0.02)
        await self._runner.cleanup()

    def _refused(self, status: int, why: str) -> web.Response:
        response = respond(self._site.unread(status, why))
        response.headers["Server"] = SERVER
        return response

    async def _expected(self, request: web.Request) -> web.StreamResponse | None:
        """None: the caller waited for a word, and has it."""
        if (expected := request.headers["Expect"]).lower() != "100-continue":
            return self._refused(417, f"nothing is known of 'Expect: {expected}'; leave it out, or send 100-continue")
        if request.version == (1, 1):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        return None

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except ModelyardError as exc:
            response = respond(self._site.failed(exc, request.headers))
            if isinstance(exc, TooSlow):
                response.force_close()
        except web.HTTPException as exc:
            response = respond(refusal(exc.status))
        if self._plane.draining:
            response.force_close()
        return response

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        return respond(await self._reply(request))

    async def _reply(self, request: web.Request) -> Reply:
        found = self._site.find(request.method, request.rel_url.raw_path)
        if found.work is not None:
            return await found.work()
        if found.ask is None:
            return self._site.tell(found, request.headers, request.rel_url.raw_query_string)
        call = found.ask(found, request.headers, await self._body(request))
        return self._site.answered((await self._plane.handle((call,)))[0])

    async def _body(self, request: web.Request) -> bytes:
        limit = self._plane.limits.max_message_bytes
        packed = request.headers.get("content-encoding", "").strip().lower()
        if packed not in ("", "identity", *ENCODINGS):
            raise UnknownEncoding(packed, ENCODINGS)
        if request.content_length is not None and request.content_length > limit:
            raise too_large(limit, request.content_length)
        try:
            return await self._all_of(request, limit)
        except TimeoutError as exc:
            raise TooSlow(f"nothing more of the body came for {self._patience_s:g} s") from exc
        except web.RequestPayloadError as exc:
            raise Invalid(f"the body cannot be read: {_said(exc)}") from exc

    async def _all_of(self, request: web.Request, limit: int) -> bytes:
        """Raises TooLarge, and TimeoutError when nothing comes for as long as a call may take."""
        parts: list[bytes] = []
        size = 0
        while True:
            async with asyncio.timeout(self._patience_s):
                part = await request.content.readany()
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > limit:
                raise too_large(limit)


def _said(exc: Exception) -> str:
    """What aiohttp's parser says, without its drawing of the place."""
    return str(exc).partition("message:")[2].strip().partition("\n")[0].rstrip(":") or "it ends too soon"


def respond(reply: Reply) -> web.Response:
    """A reply as aiohttp's response."""
    lines = (line.split(": ", 1) for line in reply.head.split("\r\n") if line)
    return web.Response(body=reply.body, status=reply.status, headers=dict(lines))


async def _name_us(request: web.Request, response: web.StreamResponse) -> None:
    """In the place of aiohttp's own name."""
    response.headers["Server"] = SERVER
