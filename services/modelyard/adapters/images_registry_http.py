"""Calls to a registry: connection, authentication, time limits, repetition, and its errors as ours."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from ..core.errors import Denied, Invalid, ModelyardError, NotFound, Unavailable
from ..core.version import __version__
from .images_registry_login import HUB, Login, config_file, login

TRIES = 5
FIRST_S, LONGEST_S = 0.2, 5.0
CONNECT_S = 10.0
EARLY_S = 10.0
"""A token is renewed so long before it lapses."""
SAID = 4096
LARGEST = 8 << 20
"""Bytes of an answer that is no blob: twice what a manifest may have."""
CHALLENGE = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
BROKEN = (aiohttp.ClientError, TimeoutError, ConnectionError, OSError, ssl.SSLError)
"""What a cut or silent connection raises here."""
HUB_API = "registry-1.docker.io"


@dataclass(frozen=True)
class Reply:
    """An answer that was read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: URL


class Door:
    """One registry. ``host`` is ``HOST[:PORT]``. Every call is bounded: ``timeout_s`` to the first byte of an answer
    and from each to the next, and at most ``TRIES`` tries where a repetition does no harm."""

    def __init__(self, host: str, tls: bool, timeout_s: float) -> None:
        self.host = host
        self.origin = URL(f"{'https' if tls else 'http'}://{HUB_API if host == HUB else host}")
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._allowed: dict[str, tuple[str, float]] = {}

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(self, method: str, path: str | URL, *, about: str, ok: Collection[int] = (200,), repo: str = "",
                  headers: Mapping[str, str] | None = None, data: bytes | None = None, tries: int = TRIES) -> Reply:
        """A call with a small answer. ``ok`` are the statuses that the caller deals with; any other is an error that
        begins with ``about``."""
        for attempt in range(1, tries + 1):
            try:
                async with asyncio.timeout(self._timeout_s), \
                        self.opened(method, path, repo=repo, headers=headers, data=data) as answer:
                    reply = Reply(answer.status, answer.headers, await self._whole(answer, about), answer.url)
            except BROKEN as exc:
                if attempt == tries:
                    raise self.broken(about, exc) from exc
                await pause(attempt)
                continue
            if reply.status in ok:
                return reply
            error = self.error(about, reply.status, reply.headers, reply.body)
            if not isinstance(error, Unavailable) or attempt == tries:
                raise error
            await pause(attempt, float(error.detail.get("retry_after", 0)))
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def opened(self, method: str, path: str | URL, *, repo: str = "", headers: Mapping[str, str] | None = None,
                     data: bytes | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """One try, authenticated; the body is the caller's to read. Raises what the connection raises (``BROKEN``)."""
        url = self.origin.join(URL(path)) if isinstance(path, str) else path
        session = await self._opened_session()
        for last in (False, True):
            known = self._known(repo) if url.origin() == self.origin else ""
            sent = {**(headers or {}), **({"Authorization": known} if known else {})}
            async with session.request(method, url, headers=sent, data=data) as answer:
                if answer.status == 401 and not last and url.origin() == self.origin:
                    fresh = await self._login(answer, repo)
                    if fresh and fresh != known:
                        continue
                yield answer
                return

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
        return asked.join(URL(given))

    def broken(self, about: str, exc: BaseException) -> ModelyardError:
        """The error of a connection that failed."""
        if isinstance(exc, aiohttp.ClientConnectorCertificateError):
            return Unavailable(f"{about}: the certificate of {self.host} is not trusted here; add its authority by "
                               "SSL_CERT_FILE")
        if isinstance(exc, aiohttp.ClientSSLError | ssl.SSLError):
            return Unavailable(f"{about}: {self.host} does not speak TLS as we do; if it speaks none, add ?tls=off to "
                               "its URL")
        if isinstance(exc, TimeoutError):
            return Unavailable(f"{about}: the registry {self.host} does not answer within {self._timeout_s:g} s")
        return Unavailable(f"{about}: the registry {self.host} does not answer ({exc or type(exc).__name__}); check "
                           "the address and that it runs")

    def error(self, about: str, status: int, headers: Mapping[str, str], body: bytes) -> ModelyardError:
        """The error of an answer that nobody wanted."""
        said = _said(body)
        if status == 401:
            return Denied(f"{about}: the registry {self.host} wants other credentials; run docker login {self.host} as "
                          f"the user that Modelyard runs as (they are read from {config_file()})")
        if status == 403:
            return Denied(f"{about}: the registry {self.host} forbids it{said}; ask its owner for the right, or log in "
                          f"as somebody who has it: docker login {self.host}")
        if status == 404:
            return NotFound(f"{about}: the registry {self.host} does not know it{said}")
        if status == 429:
            wait = headers.get("Retry-After", "")
            return Unavailable(f"{about}: the registry {self.host} takes no more calls for now{said}",
                               retry_after=min(int(wait), 60) if wait.isascii() and wait.isdigit() else 1)
        if status >= 500:
            return Unavailable(f"{about}: the registry {self.host} failed with {status}{said}; its log says why")
        return Invalid(f"{about}: the registry {self.host} refused it with {status}{said}")

    async def _opened_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = await asyncio.to_thread(ssl.create_default_context) if self.origin.scheme == "https" else True
            if self._session is None:
                self._session = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=32, ssl=context), auto_decompress=False,
                    headers={"User-Agent": f"modelyard/{__version__}"}, cookie_jar=aiohttp.DummyCookieJar(),
                    skip_auto_headers={"Accept-Encoding"},  # bytes are taken as they are: nobody may squeeze them
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._timeout_s))
        return self._session

    # -- authentication -----------------------------------------------------------------------------------------------

    def _known(self, repo: str) -> str:
        value, until = self._allowed.get(repo, ("", 0.0))
        return value if time.monotonic() < until else ""

    async def _login(self, answer: aiohttp.ClientResponse, repo: str) -> str:
        """The Authorization that the registry asks for; "" when we have none."""
        await answer.read()
        scheme, _, rest = answer.headers.get("WWW-Authenticate", "").partition(" ")
        given = dict(CHALLENGE.findall(rest))
        known = await login(self.host)
        if scheme.lower() == "basic":
            if known is None or not known.user:
                return ""
            value, lasts = known.basic, 3600.0
        elif scheme.lower() == "bearer" and "realm" in given:
            value, lasts = await self._token(given, known)
        else:
            return ""
        self._allowed[repo] = value, time.monotonic() + lasts
        return value

    async def _token(self, given: Mapping[str, str], known: Login | None) -> tuple[str, float]:
        """A token of the server that the registry names, and for how many seconds it is good."""
        realm = URL(given["realm"])
        if realm.scheme != "https" and self.origin.scheme == "https":
            raise Denied(f"the registry {self.host} names a token server without TLS ({realm.host}): it gets no "
                         "credentials of ours")
        scopes = given.get("scope", "").split()
        session = await self._opened_session()
        if known is not None and known.identity:
            form = {"grant_type": "refresh_token", "service": given.get("service", ""), "scope": " ".join(scopes),
                    "client_id": "modelyard", "refresh_token": known.identity}
            call = session.post(realm, data=form)
        else:
            query = [("service", given["service"])] if "service" in given else []
            headers = {"Authorization": known.basic} if known is not None else {}
            call = session.get(realm.extend_query(query + [("scope", s) for s in scopes]), headers=headers)
        async with call as answer:
            body = await answer.content.read(1 << 20)
            if answer.status != 200:
                raise self.error(f"the token server {realm.host}", answer.status, answer.headers, body)
        try:
            found = json.loads(body)
            token = str(found.get("token") or found["access_token"])
            return f"Bearer {token}", max(float(found.get("expires_in") or 60) - EARLY_S, 1.0)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise Unavailable(f"the token server {realm.host} of {self.host} gave no token") from exc


async def pause(attempt: int, wanted: float = 0.0) -> None:
    """Before the next try: longer each time, and never in step with others."""
    wait = min(FIRST_S * 2 ** (attempt - 1), LONGEST_S) * random.uniform(0.7, 1.3)
    await asyncio.sleep(max(wait, min(wanted, 2 * LONGEST_S)))


def loopback(host: str) -> bool:
    """Whether ``HOST[:PORT]`` is this machine: there no TLS is expected."""
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _said(body: bytes) -> str:
    """What a registry's error says, in brackets."""
    try:
        first: Any = json.loads(body[:SAID])["errors"][0]
        text = f"{first.get('code', '')}: {first.get('message', '')}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""
    return f" ({' '.join(text.split())[:200]})"
