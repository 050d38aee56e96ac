"""Other services: ``Peers`` calls them, ``Forwarder`` streams on what callers meant for them.

There is one HTTP API, all-in-one and apart: in one process the peers are reached over loopback at its own port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json as jsonlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
from aiohttp import web
from yarl import URL

from ..core.errors import Unavailable
from .call import CHUNK, Call, cut
from .observe import current_traceparent, fields
from .problems import error_from

log = logging.getLogger(__name__)
SERVICE_TOKEN = "x-modelyard-service-token"
WORKSPACE = "x-modelyard-workspace"
FORWARDED = "x-modelyard-forwarded"
HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "trailers", "transfer-encoding", "upgrade",
})
CALL_TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=3)
STREAM_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=3)
DOWN = (aiohttp.ClientError, TimeoutError, OSError)


class Peers:
    """The HTTP client to the other services: ``urls`` is service name → base URL. Sends the service token and the
    workspace, so a peer believes who asks for whom. Built without I/O; ``close`` when done."""

    def __init__(self, urls: Mapping[str, str], token: str) -> None:
        self.urls = dict(urls)
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                auto_decompress=False, trust_env=False, cookie_jar=aiohttp.DummyCookieJar(),
                connector=aiohttp.TCPConnector(limit=0), skip_auto_headers=("Accept-Encoding", "User-Agent"))
        return self._session

    async def close(self) -> None:
        """Closes every connection. Closing twice is fine."""
        if self._session is not None:
            await self._session.close()

    def url(self, service: str) -> str:
        """The base URL of a service. Unavailable when the settings name none."""
        if service not in self.urls:
            raise Unavailable(f"no URL is set for the service '{service}'; add it to `services`", service=service)
        return self.urls[service].rstrip("/")

    def headers(self, workspace: str, request_id: str | None = None) -> dict[str, str]:
        """What makes a peer believe us, and what ties its logs to ours."""
        out = {SERVICE_TOKEN: self._token, WORKSPACE: workspace}
        if request_id:
            out["x-request-id"] = request_id
        if parent := current_traceparent():
            out["traceparent"] = parent
        return out

    def down(self, service: str, exc: BaseException) -> Unavailable:
        """What to say when a service does not answer."""
        return Unavailable(f"the service '{service}' does not answer at {self.url(service)}: "
                           f"{str(exc) or type(exc).__name__}", service=service, url=self.url(service), retry_after=2)

    async def call(self, service: str, method: str, path: str, json: Any = None,
                   workspace: str = "default") -> dict[str, Any] | None:
        """One request to ``service``; its JSON answer (``{}`` when it has none), or None for 404.

        ``path`` begins with ``/v1`` or ``/internal/v1`` and is quoted by the caller (``Peers.quote``). Another
        error becomes ours by the problem's code, with its detail; no connection or no answer: Unavailable.
        """
        url = self.url(service) + path
        headers = self.headers(workspace)
        body = None if json is None else orjson.dumps(json)
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            async with self._open().request(method, _exact(url), data=body, headers=headers, allow_redirects=False,
                                            timeout=CALL_TIMEOUT) as response:
                raw = await response.read()
        except DOWN as exc:
            raise self.down(service, exc) from exc
        answer = _answer(response.status, raw, service, may_miss=True)
        return None if response.status == 404 else answer

    async def stream(self, service: str, path: str, workspace: str = "default") -> AsyncIterator[bytes]:
        """The bytes of a GET as they come. Raises NotFound and the rest of the tree before the first chunk."""
        try:
            async with self._open().get(_exact(self.url(service) + path), headers=self.headers(workspace),
                                        allow_redirects=False, timeout=STREAM_TIMEOUT) as response:
                if response.status >= 300:
                    _answer(response.status, await response.read(), service)
                async for chunk in response.content.iter_chunked(CHUNK):
                    yield chunk
        except DOWN as exc:
            raise self.down(service, exc) from exc

    @staticmethod
    def quote(part: str) -> str:
        """One path segment, escaped: ``iris:4`` stays ``iris:4``."""
        return quote(part, safe=":@!$&'()*+,;=~")

    async def forward(self, service: str, call: Call) -> web.StreamResponse:
        """Streams a caller's request to ``service`` and the answer back, without hop-by-hop headers."""
        request = call.request
        if FORWARDED in request.headers:
            raise Unavailable(f"a request for '{service}' was sent here, but this server does not run it",
                              code="misrouted", service=service)
        headers = {**_end_to_end(request.headers), **self.headers(call.workspace, call.request_id), FORWARDED: "1"}
        data = call.chunks() if request.can_read_body else None
        sending = asyncio.ensure_future(self._open().request(
            request.method, _exact(self.url(service) + request.raw_path), headers=headers, data=data,
            allow_redirects=False, timeout=STREAM_TIMEOUT))
        try:
            upstream = await _until(sending, call.closing if "wait" in request.query else None)
        except DOWN as exc:
            raise self.down(service, exc) from exc
        try:
            return await _pass_back(call, upstream)
        finally:
            upstream.close()


async def _until(sending: asyncio.Future[aiohttp.ClientResponse],
                 closing: asyncio.Event | None) -> aiohttp.ClientResponse:
    """The answer's head; Unavailable when this server stops before a long poll is over."""
    stop = asyncio.ensure_future(closing.wait()) if closing else None
    try:
        waited: set[asyncio.Future[Any]] = {sending, stop} if stop else {sending}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            raise Unavailable("this server is stopping; ask again")
        return sending.result()
    finally:
        for task in (sending, stop):
            if task is not None and not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, *DOWN):
                    await task


def _exact(url: str) -> Any:
    return URL(url, encoded=True)


def _answer(status: int, raw: bytes, service: str, may_miss: bool = False) -> dict[str, Any]:
    try:
        body = jsonlib.loads(raw) if raw else {}
    except ValueError:
        body = {}
    if status == 404 and isinstance(body, dict) and body.get("code") == "no-such-route":
        raise Unavailable(f"the server at the URL of '{service}' does not run it", code="misrouted", service=service)
    if status >= 300 and (status != 404 or not may_miss):
        raise error_from(status, body, f"the service '{service}'")
    return body if isinstance(body, dict) else {"items": body}


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers of a request that may travel on: no hop-by-hop ones, none that only we may set, no credentials
    (this server has checked them; the peer believes the service token)."""
    drop = set(HOP_BY_HOP) | {"host", "authorization", "origin", "expect", "x-request-id", "traceparent"}
    drop |= {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return {k: v for k, v in headers.items() if k.lower() not in drop and not k.lower().startswith("x-modelyard-")}


def _endless(call: Call, upstream: aiohttp.ClientResponse) -> bool:
    return upstream.content_type == "text/event-stream" or call.request.query.get("follow", "") in ("true", "1")


async def _pass_back(call: Call, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    drop = HOP_BY_HOP | {name.strip().lower() for name in upstream.headers.get("Connection", "").split(",")}
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
    for name, value in upstream.headers.items():
        if name.lower() not in drop | {"date", "server", "x-request-id", "traceparent"}:
            response.headers.add(name, value)
    await response.prepare(call.request)
    source = aiter(upstream.content.iter_any())
    try:
        follow = _endless(call, upstream)
        while call.request.method != "HEAD" and (chunk := await call.next(source, follow)) is not None:
            await response.write(chunk)
        await response.write_eof()
    except aiohttp.ClientError as exc:
        log.warning("an answer was cut: %s", exc, extra=fields(request_id=call.request_id, url=str(upstream.url)))
        raise cut(call.request) from exc
    return response
