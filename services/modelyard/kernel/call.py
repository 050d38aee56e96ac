"""One request as a handler sees it, and the two ways to answer: ``reply`` a document, ``Call.stream`` bytes."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from aiohttp import ClientPayloadError, web
from pydantic import BaseModel, ValidationError

from ..core.documents import Document, Where
from ..core.errors import Conflict, Invalid, ModelyardError, NotFound, TooLarge
from . import bodies, paging
from .observe import fields

if TYPE_CHECKING:
    from .service import Context

log = logging.getLogger(__name__)
S = TypeVar("S", bound=BaseModel)
D = TypeVar("D", bound=Document)
T = TypeVar("T")
DOCUMENT_LIMIT = 1024 * 1024
MAX_WAIT_S = 60.0
LOOK_S = 0.25
"""So often a long poll looks by itself: another process may have committed."""
GONE_S = 5.0
"""So often is it seen whether a silent stream's caller is still there."""
CHUNK = 64 * 1024
CLOSING: web.AppKey[asyncio.Event] = web.AppKey("closing", asyncio.Event)
_ETAG = re.compile(r'^"?([0-9]{1,19})"?$')


class Query(Mapping[str, str]):
    """Query parameters, the last value of each. Remembers which were asked for, so that a list can refuse the rest."""

    def __init__(self, given: Any) -> None:
        self._given = given
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return str(self._given.getall(name)[-1])

    def __iter__(self) -> Iterator[str]:
        self.asked.update(self._given)
        return iter(dict.fromkeys(self._given))

    def __len__(self) -> int:
        return len(set(self._given))

    def all(self, name: str) -> list[str]:
        """Every value of a parameter, in order."""
        self.asked.add(name)
        return [str(value) for value in self._given.getall(name, [])]

    def unknown(self, known: Any = ()) -> list[str]:
        """Parameters that were given, are not in ``known`` and that nobody asked for."""
        return sorted(set(self._given) - self.asked - set(known))


def refuse_unknown(query: Query, known: Mapping[str, str]) -> None:
    """Invalid naming every query parameter that the route does not know."""
    if unknown := query.unknown(known):
        raise Invalid(
            "unknown query parameter: " + ", ".join(unknown),
            errors=[{"field": name, "message": f"not a parameter here; these are: {', '.join(sorted(known))}"}
                    for name in unknown])


class Call:
    """One request. ``params`` are the path's, ``query`` the last value of each query parameter (``all`` gives
    every one), ``idempotency_key`` is what to put into ``made_by`` of what is created (None: no key given)."""

    def __init__(self, request: web.Request, *, workspace: str, request_id: str) -> None:
        self.request = request
        self.workspace = workspace
        self.request_id = request_id
        self.params: Mapping[str, str] = request.match_info
        self.query = Query(request.query)
        self.idempotency_key: str | None = None
        self._raw: bytes | None = None

    def all(self, name: str) -> list[str]:
        """Every value of a query parameter, in order: ``?tag=a&tag=b`` → ``["a", "b"]``."""
        return self.query.all(name)

    @property
    def closing(self) -> asyncio.Event:
        """Set when the server stops: whoever waits or follows ends now."""
        return self.request.app[CLOSING]

    # -- the body ---------------------------------------------------------------------------------------------

    async def read(self, limit: int = DOCUMENT_LIMIT) -> bytes:
        """The whole body, kept. TooLarge beyond ``limit`` bytes."""
        if self._raw is None:
            if (self.request.content_length or 0) > limit:
                raise TooLarge(f"the body has {self.request.content_length} bytes; at most {limit} are read here")
            parts, size = [], 0
            async for chunk in self.chunks():
                size += len(chunk)
                if size > limit:
                    raise TooLarge(f"the body has more than {limit} bytes, which are read here at most")
                parts.append(chunk)
            self._raw = b"".join(parts)
        return self._raw

    async def chunks(self) -> AsyncIterator[bytes]:
        """The raw body as it arrives, in pieces of at most 64 KiB. Invalid (``cut``) when it ends too early."""
        if self._raw is not None:
            for at in range(0, len(self._raw), CHUNK):
                yield self._raw[at:at + CHUNK]
            return
        try:
            async for chunk in self.request.content.iter_chunked(CHUNK):
                yield chunk
        except (ConnectionError, ClientPayloadError, web.RequestPayloadError) as exc:
            raise Invalid("the body ended before its end", code="cut") from exc

    async def value(self) -> Any:
        """The JSON or YAML body as plain values. Invalid: 415, 400."""
        raw = await self.read()
        kind = self.request.content_type if "Content-Type" in self.request.headers else ""
        if len(raw) > CHUNK:
            return await asyncio.to_thread(bodies.parse, raw, kind)
        return bodies.parse(raw, kind)

    async def body(self, type_: type[S]) -> S:
        """The body as ``type_``. Invalid: 415, 400 malformed, 422 with every problem at once in ``errors``."""
        return check(type_, await self.value())

    async def merged(self, type_: type[S], current: Mapping[str, Any]) -> S:
        """``current`` (a document's view, or its spec fields) with the body applied as a JSON Merge Patch."""
        patch = await self.value()
        if not isinstance(patch, dict):
            raise Invalid("a merge patch is an object", errors=[{"field": "", "message": "an object is needed"}])
        base = {name: value for name, value in current.items() if name in type_.model_fields}
        return check(type_, merge(base, patch))

    # -- preconditions and waiting ------------------------------------------------------------------------------

    def if_match(self) -> int | None:
        """The generation in If-Match; None when absent or ``*``. An ETag that is not ours matches nothing: -1."""
        wanted = self._wanted()
        return None if wanted is None else max(wanted)

    def check_match(self, doc: Document) -> None:
        """Conflict ``stale`` (412) unless the document's generation is what If-Match asks for."""
        wanted = self._wanted()
        if wanted is not None and doc.generation not in wanted:
            raise Conflict(f"{doc.kind} '{doc.id}' is at generation {doc.generation}, not "
                           f"{self.request.headers['If-Match']}", code="stale", generation=doc.generation)

    def _wanted(self) -> set[int] | None:
        text = ",".join(self.request.headers.getall("If-Match", [])).strip()
        if text in ("", "*"):
            return None
        tags = [_ETAG.match(part.strip()) for part in text.split(",")]
        return {int(tag[1]) if tag else -1 for tag in tags}

    @property
    def wait_s(self) -> float:
        """``?wait=30``: seconds to wait for a change, at most 60; 0 when absent."""
        text = self.query.get("wait", "0")
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
            raise Invalid(f"'wait' is a number of seconds, not '{text}'", field="wait")
        return min(float(text), MAX_WAIT_S)

    async def wait_for(self, ctx: Context, type_: type[D], id: str, until: Callable[[D], bool]) -> D:
        """The document as soon as ``until`` holds, or as it is after ``?wait=`` seconds. NotFound when it is gone."""
        clock = asyncio.get_running_loop()
        end = clock.time() + self.wait_s
        while True:
            changed = ctx.changes.listen(type_.kind, self.workspace, id)
            doc = await ctx.store.get(type_, id, workspace=self.workspace)
            if doc is None:
                raise NotFound(f"there is no {type_.kind} '{id}'", kind=type_.kind, id=id)
            left = end - clock.time()
            if left <= 0 or self.closing.is_set() or until(doc) or self._gone():
                return doc
            with suppress(TimeoutError):
                async with asyncio.timeout(min(LOOK_S, left)):
                    await changed.wait()

    def _gone(self) -> bool:
        """The caller has hung up."""
        return self.request.transport is None or self.request.transport.is_closing()

    # -- answers --------------------------------------------------------------------------------------------------

    async def page(self, ctx: Context, type_: type[D], where: Where, order: str = "-created",
                   view: Callable[[D], Any] = Document.view) -> web.Response:
        """Answers ``{"items", "next"}`` by ``limit``, ``after`` and ``order``. Parameters that neither the handler
        asked for nor a page knows are refused (422), so read the filters before."""
        refuse_unknown(self.query, paging.PARAMETERS | dict.fromkeys(self.query.asked, ""))
        found, after = await paging.page(ctx.store, type_, where, self.query, workspace=self.workspace, order=order)
        return reply({"items": [view(doc) for doc in found], "next": after})

    async def stream(self, chunks: AsyncIterable[bytes], content_type: str = "application/octet-stream",
                     headers: Mapping[str, str] | None = None, *, follow: bool = False, length: int | None = None,
                     status: int = 200) -> web.StreamResponse:
        """Streams ``chunks``. An error before the first chunk is answered as a problem; a later one cuts the
        connection, so that the caller sees it. ``follow``: endless, ended when the server stops."""
        source = aiter(chunks)
        try:
            first = await self.next(source, follow)
            response = web.StreamResponse(status=status, headers=headers)
            response.content_type = content_type
            response.content_length = length
            await response.prepare(self.request)
        except BaseException:
            await _end(source)
            raise
        try:
            while first is not None and self.request.method != "HEAD":
                await response.write(first)
                first = await self.next(source, follow)
            await response.write_eof()
            return response
        except ModelyardError as exc:
            log.warning("an answer was cut: %s", exc, extra=fields(request_id=self.request_id))
            raise cut(self.request) from exc
        finally:
            await _end(source)

    async def next(self, source: AsyncIterator[T], follow: bool = True) -> T | None:
        """The next item; None at the end, and (``follow``) when the server stops. A caller who left meanwhile ends the
        request (ConnectionError), so that nobody follows for nobody."""
        if not follow:
            return await anext(source, None)
        item = asyncio.ensure_future(anext(source, None))
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            waited: set[asyncio.Future[Any]] = {item, closing}
            while not (await asyncio.wait(waited, timeout=GONE_S, return_when=asyncio.FIRST_COMPLETED))[0]:
                if self._gone():
                    raise ConnectionResetError("the caller is gone")
            return item.result() if item.done() else None
        finally:
            for task in (item, closing):
                task.cancel()
            await asyncio.gather(item, closing, return_exceptions=True)


async def _end(source: AsyncIterator[Any]) -> None:
    if (close := getattr(source, "aclose", None)) is not None:
        await close()


def cut(request: web.Request) -> ConnectionError:
    """Ends a connection whose answer cannot be finished, so that the caller does not take half of it for all."""
    if request.transport is not None:
        request.transport.abort()
    return ConnectionResetError("the answer could not be finished")


def check(type_: type[S], value: Any) -> S:
    """A plain value as ``type_``: JSON's types are kept apart (``"2"`` is no number). Invalid lists every problem."""
    try:
        return type_.model_validate_json(orjson.dumps(value), strict=True, extra="forbid")
    except ValidationError as exc:
        errors = [{"field": _path(e["loc"]), "message": e["msg"].removeprefix("Value error, ")} for e in exc.errors()]
        told = "; ".join(f"{e['field']}: {e['message']}" if e["field"] else e["message"] for e in errors[:5])
        raise Invalid(told + (f"; and {len(errors) - 5} more" if len(errors) > 5 else ""), errors=errors) from exc


def _path(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc if part != "[key]")


def merge(base: Any, patch: Any) -> Any:
    """JSON Merge Patch (RFC 7396): null removes, objects merge, anything else replaces."""
    if not isinstance(patch, dict):
        return patch
    out = dict(base) if isinstance(base, dict) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merge(out.get(key), value)
    return out


def reply(what: Document | BaseModel | Mapping[str, Any] | list[Any] | None, status: int = 200,
          headers: Mapping[str, str] | None = None) -> web.Response:
    """An answer in JSON. A document is answered as its view, with its generation as ETag; None has no body (204)."""
    extra = dict(headers or {})
    if what is None:
        return web.Response(status=204 if status == 200 else status, headers=extra)
    if isinstance(what, Document):
        extra.setdefault("ETag", f'"{what.generation}"')
        what = what.view()
    elif isinstance(what, BaseModel):
        what = what.model_dump(mode="json")
    body = orjson.dumps(what, option=orjson.OPT_NON_STR_KEYS)
    return web.Response(status=status, body=body, content_type="application/json", headers=extra)
