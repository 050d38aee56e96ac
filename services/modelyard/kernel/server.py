"""One server: the services of one process behind one port, and the way to those that run elsewhere."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import http_exceptions, web
from aiohttp.web_protocol import RequestHandler

from ..core.errors import Invalid
from ..core.events import event_id
from ..ports import Port
from ..ports.bus import EventBus
from . import feed, health, letters, openapi
from .forward import Peers
from .guard import Guard
from .problems import answer
from .service import Context, Service
from .web import Route, application, count_unread, forward_to, mount

GRACE_S = 20.0
BACKLOG = 1024
"""Connections that may wait until they are accepted. One more is not refused but dropped, and comes again after 1 s,
3 s and 7 s: with 128, a moment in which the machine was busy became seconds."""


@dataclass(frozen=True)
class Hosted:
    """A service that runs in this process."""

    service: Service
    context: Context


def build(hosted: Sequence[Hosted], all_services: Sequence[Service], *, bus: EventBus, peers: Peers, guard: Guard,
          needed: Mapping[str, Port], wanted: Mapping[str, Port] | None = None) -> web.Application:
    """The application of one process: its own services' routes, the kernel's, and the others' forwarded.

    ``all_services`` are the services of the house; ``needed`` the ports that decide readiness, ``wanted`` those that,
    like the bus, only degrade.
    """
    app = application(guard)
    here = [h.service.name for h in hosted]
    for h in hosted:
        mount(app, h.service.routes(h.context), h.context)
        mount(app, letters.internal_routes(h.service), h.context, owner="kernel")
    kernel: list[Route] = [
        *feed.routes(bus), *letters.routes([s.name for s in all_services], peers),
        *health.routes(needed, {"bus": bus, **(wanted or {})}, here),
    ]
    mount(app, [*kernel, *openapi.routes(all_services, kernel)], hosted[0].context, owner="kernel")
    for service in all_services:
        if service.name not in here:
            forward_to(app, service.name, service.owns, peers.forward)
    return app


class Server:
    """An application on a port. ``stop`` ends streams and long polls, answers what is in flight, within 20 s."""

    def __init__(self, app: web.Application) -> None:
        self._runner = _Runner(app, access_log=None, shutdown_timeout=GRACE_S, keepalive_timeout=75,
                               handler_cancellation=False, auto_decompress=False)

    async def start(self, host: str, port: int) -> int:
        """Listens, and gives the port (of use when ``port`` is 0). Invalid names a port or host that cannot be had."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port, backlog=BACKLOG).start()
        except OSError as exc:
            await self.stop()
            raise _refused(host, port, exc) from exc
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Stopping twice is fine."""
        await self._runner.cleanup()


class _Runner(web.AppRunner):
    """aiohttp's, but for what its parser cannot read: that is a problem like any other, and no traceback."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Listening(made.request_handler, request_factory=made.request_factory,
                          handler_cancellation=made.handler_cancellation, loop=made._loop, **made._kwargs)


class _Listening(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    __slots__ = ()

    def handle_error(self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None,
                     message: str | None = None) -> web.StreamResponse:
        if not isinstance(exc, http_exceptions.HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        if isinstance(exc, http_exceptions.LineTooLong) or exc.message.startswith("Too many headers"):
            error = Invalid("the request's head is too large: a line has at most 8,190 bytes, and there are at most "
                            "128", code="head-too-large")
        else:
            said = exc.message.partition("\n\n")[0].replace(":\n ", ":").rstrip(":")  # not the drawing of the place
            error = Invalid(f"the request cannot be read: {said}", code="malformed")
        told = answer(error, event_id())
        count_unread(told.status)
        told.force_close()
        return told

    def log_exception(self, *args: Any, **how: Any) -> None:
        if not isinstance(how.get("exc_info"), (http_exceptions.HttpProcessingError, web.RequestPayloadError)):
            super().log_exception(*args, **how)


def _refused(host: str, port: int, exc: OSError) -> Invalid:
    if exc.errno == errno.EADDRINUSE:
        return Invalid(f"port {port} on {host} is in use by another program; stop it, or choose another port "
                       "with --port", code="port-in-use", port=port)
    if exc.errno == errno.EACCES:
        return Invalid(f"port {port} on {host} is not open to this user; choose one above 1023 with --port",
                       code="port-refused", port=port)
    return Invalid(f"cannot listen on {host} port {port}: {exc.strerror or exc}; --host names an address of this "
                   "machine", code="host-refused", port=port)
