"""Calls to a registry: connection, authentication, time limits, repetition, and its errors as ours."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from yarl import URL

from ..core.errors import Denied, Invalid, ModelyardError, Unavailable
from ..core.version import __version__
from ..kernel.proxies import through
from .images_registry_errors_http import BROKEN, broken, pause, refused, said
from .images_registry_login import HUB
from .images_registry_tokens_http import Allowed

TRIES = 5
CONNECT_S = 10.0
SLOWEST = 32_000
"""Bytes a second that a line must carry: a call with a body gets so much longer."""
LARGEST = 8 << 20
"""Bytes of an answer that is no blob: twice what a manifest may have."""
HOPS = 5
LOGINS = 2
"""Times that a call is made again after a 401: what another call was given in between may not be enough."""
READS, SENDS = (301, 302, 303, 307, 308), (307, 308)
"""Redirects that are followed: what is sent may only be sent again as it is."""
HUB_API = "registry-1.docker.io"
Body = bytes | Callable[[], AsyncIterator[bytes]]
"""What is sent: bytes, or a stream that is made anew for each try."""


@dataclass(frozen=True)
class Reply:
    """An answer that was read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: URL


class Door:
    """One registry. ``host`` is ``HOST[:PORT]``, ``proxy`` as in ``through``. Every call is bounded: ``timeout_s`` to
    the first byte of an answer and from each to the next, and ``TRIES`` tries at most, where a repetition does no
    harm."""

    def __init__(self, host: str, tls: bool, timeout_s: float, proxy: str = "") -> None:
        self.host, self._proxy = host, proxy
        self.origin = URL(f"{'https' if tls else 'http'}://{HUB_API if host == HUB else host}")
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._allowed = Allowed(host, self.origin, self._opened_session, proxy)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(self, method: str, path: str | URL, *, about: str, ok: Collection[int] = (200,), repo: str = "",
                  headers: Mapping[str, str] | None = None, data: Body | None = None, tries: int = TRIES) -> Reply:
        """A call with a small answer. ``ok`` are the statuses that the caller deals with; any other is an error that
        begins with ``about``. A stream is bounded from each of its pieces to the next."""
        def paced() -> Body | None:
            return (lambda: _paced(data(), clock, self._timeout_s)) if callable(data) else data

        bound = self._timeout_s + (0 if data is None or callable(data) else len(data) / SLOWEST)
        for attempt in range(1, tries + 1):
            try:
                async with asyncio.timeout(bound) as clock, \
                        self.opened(method, path, repo=repo, headers=headers, data=paced()) as answer:
                    reply = Reply(answer.status, answer.headers, await self._whole(answer, about), answer.url)
                if reply.status in ok:
                    return reply
                raise self.error(about, reply.status, reply.headers, reply.body)
            except BROKEN as exc:
                error: ModelyardError = self.broken(about, exc)
            except Unavailable as exc:
                error = exc
            if attempt == tries or not error.retryable:
                raise error
            await pause(attempt, error)
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def opened(self, method: str, path: str | URL, *, repo: str = "", headers: Mapping[str, str] | None = None,
                     data: Body | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """One try, authenticated and redirected; the body is the caller's to read. Credentials go to the registry
        alone, wherever it sends us. Raises what the connection raises (``BROKEN``)."""
        url = self.origin.join(URL(path)) if isinstance(path, str) else path
        session, logins, hops = await self._opened_session(), 0, 0
        while True:
            home = url.origin() == self.origin
            known = self._allowed.header(repo) if home else ""
            sent = {**(headers or {}), **({"Authorization": known} if known else {})}
            async with session.request(method, url, headers=sent, allow_redirects=False,
                                       data=data() if callable(data) else data,
                                       proxy=through(url, self._proxy)) as answer:
                if answer.status == 401 and home and logins < LOGINS:
                    logins += 1
                    await self._whole(answer, "what it asks for")
                    asks = answer.headers.getall("WWW-Authenticate", [])
                    if await self._allowed.renew(repo, known, asks) not in ("", known):
                        continue
                elif answer.status in (READS if method in ("GET", "HEAD") else SENDS):
                    hops += 1
                    url = self._moved(url, answer.headers.get("Location", ""), hops)
                    continue
                elif answer.status in (401, 403) and not home:
                    raise Unavailable(f"the registry {self.host} sends us on to {url.host}, which refuses us with "
                                      f"{answer.status}")
                yield answer
                return

    def _moved(self, asked: URL, to: str, hops: int) -> URL:
        """Where a redirect leads. Raises for one that must not be followed."""
        if hops > HOPS:
            raise Invalid(f"the registry {self.host} sends us in circles: more than {HOPS} redirects")
        try:
            url = asked.join(URL(to))
            url.origin()
        except ValueError:
            raise Invalid(f"the registry {self.host} sends us on to what is no address") from None
        if self.origin.scheme == "https" and url.scheme != "https":
            raise Denied(f"the registry {self.host} sends us on to {url.host} without TLS; that is not followed")
        return url

    async def _whole(self, answer: aiohttp.ClientResponse, about: str) -> bytes:
        body = b""
        async for chunk in answer.content.iter_any():
            body += chunk
            if len(body) > LARGEST:
                raise Invalid(f"{about}: the registry {self.host} answers with more than {LARGEST} bytes")
        return body

    def location(self, answer: Mapping[str, str], asked: URL) -> URL:
        """Where an upload goes on. Unavailable when the registry does not say."""
        given = answer.get("Location", "")
        if not given:
            raise Unavailable(f"the registry {self.host} does not say where the upload goes on")
        at = asked.join(URL(given))
        if self.origin.scheme == "https" and at.scheme == "http" and at.host == self.origin.host:
            return self.origin.join(at.relative())  # it does not know that there is TLS before it
        return at

    def broken(self, about: str, exc: BaseException) -> ModelyardError:
        """The error of a connection that failed."""
        return broken(self.host, about, exc, self._timeout_s)

    def error(self, about: str, status: int, headers: Mapping[str, str], body: bytes) -> ModelyardError:
        """The error of an answer that nobody wanted; no credential is in it, whatever the registry says."""
        return refused(self.host, about, status, headers, self._allowed.hide(said(body)))

    async def _opened_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = await asyncio.to_thread(ssl.create_default_context) if self.origin.scheme == "https" else True
            if self._session is None:
                self._session = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=32, ssl=context), auto_decompress=False,
                    headers={"User-Agent": f"modelyard/{__version__}"}, cookie_jar=aiohttp.DummyCookieJar(),
                    # bytes are taken as they are: nobody may squeeze them; and what says nothing is not sent
                    skip_auto_headers={"Accept-Encoding", "Accept"},
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._timeout_s))
        return self._session


async def _paced(pieces: AsyncIterator[bytes], clock: asyncio.Timeout, silent_s: float) -> AsyncIterator[bytes]:
    """The pieces; the clock begins again with each that the line takes."""
    now = asyncio.get_running_loop().time
    async for piece in pieces:
        clock.reschedule(now() + silent_s + len(piece) / SLOWEST)
        yield piece
    clock.reschedule(now() + silent_s)
