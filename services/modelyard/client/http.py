"""One HTTP session to a yard: addresses, credentials, retries that are safe, and errors of our own tree."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from ..core.errors import Conflict, Invalid, ModelyardError, Unavailable
from .problems import from_problem

Params = Mapping[str, "str | int | bool | Sequence[str] | None"]
Chunks = Callable[[], AsyncIterator[bytes]]
"""Makes the body anew for each attempt."""
BACKOFF_S = (0.1, 0.3, 1.0, 3.0)
JSON = "application/json"


@dataclass(frozen=True)
class Reply:
    """Status, headers and the whole body of an answer that was not an error."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; None when it is empty."""
        return orjson.loads(self.body) if self.body else None


def _query(params: Params | None) -> list[tuple[str, str]]:
    """``{"tag": ["a=1", "b=2"], "latest": True, "run": None}`` -> repeated keys, booleans as text, None left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in (params or {}).items():
        if value is None:
            continue
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        pairs += [(key, str(v).lower() if isinstance(v, bool) else str(v)) for v in values]
    return pairs


def path(*parts: str) -> str:
    """``path("models", "iris:4", "content")`` -> ``/v1/models/iris:4/content``; a part never becomes two."""
    return "/v1/" + "/".join(quote(part, safe=":@") for part in parts)


def parse_url(url: str) -> URL:
    """The base URL, checked. Raises Invalid for anything but http(s)://host[:port]."""
    try:
        base = URL(url.strip().rstrip("/"))
    except ValueError as exc:
        raise Invalid(f"'{url}' is not a URL; write http://127.0.0.1:8700") from exc
    if base.scheme not in ("http", "https") or not base.host:
        raise Invalid(f"'{url}' is not the URL of a yard; write http://127.0.0.1:8700")
    return base


class Http:
    """Requests to one yard. Retries what is safe to repeat: every method but a POST without a key.

    A POST is made safe by its ``Idempotency-Key``: the server replays its first answer. A refused connection is
    not retried: nothing listens there, and the caller should hear so at once.
    """

    def __init__(
        self, url: str, token: str | None, timeout_s: float, hint: str = "start it with: modelyard serve",
    ) -> None:
        self.base = parse_url(url)
        self._hint = hint
        self._token = token
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            self._session = aiohttp.ClientSession(headers=headers, timeout=self._timeout)
        return self._session

    async def close(self) -> None:
        """Closes the connections; the next request would open new ones."""
        if self._session is not None:
            await self._session.close()

    async def send(
        self, method: str, path: str, *, params: Params | None = None, json: Any = None, raw: bytes | None = None,
        chunks: Chunks | None = None, headers: Mapping[str, str] | None = None, repeat: bool = True,
    ) -> Reply:
        """One request, repeated while that is safe and may help. Raises the tree in ``core.errors``."""
        head = dict(headers or {})
        if method == "POST" and repeat:
            head.setdefault("Idempotency-Key", uuid.uuid4().hex)
        body = raw if json is None else orjson.dumps(json)
        if json is not None:
            head.setdefault("Content-Type", JSON)
        for wait in (*BACKOFF_S, None):
            try:
                async with self._answer(method, path, params, chunks() if chunks else body, head) as answer:
                    return Reply(answer.status, answer.headers, await answer.read())
            except (Unavailable, Conflict) as exc:
                if wait is None or not repeat or not _worth_repeating(exc):
                    raise
                await asyncio.sleep(max(wait, min(float(exc.detail.get("retry_after", 0)), 10.0)))
        raise AssertionError("the last attempt returns or raises")

    async def json(self, method: str, path: str, **how: Any) -> Any:
        """``send``, and the answer's JSON."""
        return (await self.send(method, path, **how)).json()

    @asynccontextmanager
    async def stream(
        self, path: str, *, params: Params | None = None, headers: Mapping[str, str] | None = None,
        endless: bool = False,
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """A GET whose body is read piece by piece. ``endless``: silence is no error."""
        async with self._answer("GET", path, params, None, headers or {}, endless) as answer:
            yield answer.content

    @asynccontextmanager
    async def lines(
        self, path: str, *, params: Params | None = None, headers: Mapping[str, str] | None = None,
        endless: bool = False,
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """``stream``, line by line, however long a line is, without its end."""
        async with self.stream(path, params=params, headers=headers, endless=endless) as body:
            yield _lines(body)

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, params: Params | None, data: Any, headers: Mapping[str, str],
        endless: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10) if endless else self._timeout
        url = URL(f"{self.base}{path}", encoded=True)
        try:
            async with self._open().request(
                method, url.extend_query(_query(params)), data=data, headers=headers, timeout=timeout,
                expect100=isinstance(data, AsyncIterator),
            ) as answer:
                if answer.status >= 400:
                    raise from_problem(answer.status, await _problem(answer), answer.headers.get("Retry-After"))
                yield answer
        except aiohttp.ClientConnectorError as exc:
            raise Unavailable(
                f"nothing answers at {self.base}; {self._hint}", refused=True) from exc
        except TimeoutError as exc:
            raise Unavailable(f"{self.base} did not answer in time ({method} {path})") from exc
        except aiohttp.ClientError as exc:
            reason = str(exc) or type(exc).__name__
            raise Unavailable(
                f"the connection to {self.base} was lost ({method} {path}: {reason})",
                unanswered=isinstance(exc, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError))) from exc


async def _lines(body: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    rest = bytearray()
    async for block in body.iter_any():
        rest += block
        if b"\n" in block:
            whole, _, tail = bytes(rest).rpartition(b"\n")
            rest = bytearray(tail)
            for line in whole.split(b"\n"):
                yield line.removesuffix(b"\r")
    if rest:
        yield bytes(rest)


def _worth_repeating(exc: ModelyardError) -> bool:
    if isinstance(exc, Conflict):
        return exc.code == "in-flight"
    return not exc.detail.get("refused")


async def _problem(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    raw = await answer.read()
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        body = None
    if isinstance(body, dict):
        return body
    text = raw[:500].decode(errors="replace").strip()
    return {"detail": f"the server answered {answer.status} {answer.reason}{': ' + text if text else ''}"}
