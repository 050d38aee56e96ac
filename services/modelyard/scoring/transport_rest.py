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
from .http_server import Refuse, Runner
from .rest import Reply, Site, refusal
from .transport import BACKLOG, Tls, Transport, listen

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
KEEP_ALIVE_S = 75
SHUTDOWN_S = 2.0
ENCODINGS = ("gzip", "deflate")
"""Of bodies; aiohttp takes them off, what others it may know besides is chance."""


class HttpSite:
    """An aiohttp application on ``host:port`` or ``unix:PATH``; port 0 gives a free one. ``refuse`` answers what cannot
    be read."""

    def __init__(self, address: str, app: web.Application, shutdown_s: float = SHUTDOWN_S,
                 tls: Tls | None = None, refuse: Refuse | None = None) -> None:
        self.address, self.tls = address, tls
        self.runner = Runner(app, refuse or (lambda status, why: respond(refusal(status, why))), access_log=None,
                             handle_signals=False, shutdown_timeout=shutdown_s, handler_cancellation=True,
                             keepalive_timeout=KEEP_ALIVE_S)
        self._site: web.BaseSite | None = None

    async def start(self) -> str:
        """Listens; gives back the address with the port it got. Raises OSError."""
        sock, address = listen(self.address)
        await self.runner.setup()
        self._site = web.SockSite(self.runner, sock, ssl_context=self.tls.context() if self.tls else None,
                                  backlog=BACKLOG)
        await self._site.start()
        return address

    async def stop_listening(self) -> None:
        """No new connection; open ones go on."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    async def close(self) -> None:
        """Ends every connection, after what it is answering or the shutdown time."""
        await self.runner.cleanup()


class RestTransport(Transport):
    """One aiohttp server over the plane."""

    name = "http"
    library = "aiohttp"

    def __init__(self, address: str, plane: DataPlane, tls: Tls | None = None) -> None:
        self._plane, self._site = plane, Site(plane)
        self._patience_s = plane.limits.timeout_ms / 1000
        app = web.Application(client_max_size=plane.limits.max_message_bytes, middlewares=[self._around])
        # the routes are the site's
        app.router.add_route("*", "/{path:.*}", self._handle, expect_handler=self._expected)
        self._http = HttpSite(address, app, tls=tls, refuse=self._refused)

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

    def _refused(self, status: int, why: str) -> web.Response:
        return respond(self._site.unread(status, why))

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
