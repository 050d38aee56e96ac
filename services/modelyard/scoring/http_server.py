"""aiohttp's server, but for what it cannot read: that is the caller's fault, so it gets a reply of ours, and the log no
traceback."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from aiohttp import http_exceptions, web
from aiohttp.web_protocol import RequestHandler

Refuse = Callable[[int, str], web.Response]
"""A status and what is wrong → the reply."""
HEAD_TOO_LARGE = "the request's head is too large: a line has at most 8,190 bytes, and there are at most 128"
"""aiohttp's limits."""
PACKED = "bodies in this content encoding are not taken; send gzip or deflate, or the plain bytes"
UNREAD = (http_exceptions.HttpProcessingError, web.RequestPayloadError)


class Runner(web.AppRunner):
    """``refuse`` answers for requests that never become one of the application's."""

    __slots__ = ("_refuse",)

    def __init__(self, app: web.Application, refuse: Refuse, **how: Any) -> None:
        super().__init__(app, **how)
        self._refuse = refuse

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(self._refuse, made)


class _Server(web.Server):
    """Like ``made``."""

    def __init__(self, refuse: Refuse, made: web.Server) -> None:
        super().__init__(made.request_handler, request_factory=made.request_factory,
                         handler_cancellation=made.handler_cancellation, loop=made._loop, **made._kwargs)
        self.refuse = refuse

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    __slots__ = ("_refuse",)

    def __init__(self, server: _Server, **how: Any) -> None:
        super().__init__(server, **how)
        self._refuse = server.refuse

    def handle_error(self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None,
                     message: str | None = None) -> web.StreamResponse:
        if isinstance(exc, http_exceptions.HttpProcessingError):
            reply = self._refuse(*_judged(exc))
        else:
            self.log_exception("a request from %s failed", request.remote, exc_info=exc)
            reply = self._refuse(status, HTTPStatus(status).phrase)
        if request.writer.output_size > 0:
            raise ConnectionError("a part of another answer has left already")
        reply.force_close()
        return reply

    def log_exception(self, *args: Any, **how: Any) -> None:
        if not isinstance(how.get("exc_info"), UNREAD):
            super().log_exception(*args, **how)


def _judged(exc: http_exceptions.HttpProcessingError) -> tuple[int, str]:
    """The status that a request deserves which the parser has refused, and why, on one line."""
    if isinstance(exc, http_exceptions.LineTooLong) or exc.message.startswith("Too many headers"):
        return 431, HEAD_TOO_LARGE
    if isinstance(exc, http_exceptions.ContentEncodingError):
        return 415, PACKED
    said = exc.message.partition("\n\n")[0].replace(":\n ", ":").rstrip(":")  # without the drawing of the place
    return 400, f"the request cannot be read: {said}"
