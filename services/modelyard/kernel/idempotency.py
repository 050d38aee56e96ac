"""Idempotency-Key on every POST: a request that is repeated with its key is done once and answered alike.

A ``Request`` document goes before the handler and takes its answer afterwards, for 24 hours. What the handler creates
carries ``made_by = call.idempotency_key``: the token of that Request, not the caller's text, so a key used again after
its day is a new request. A process that dies in between leaves the Request in flight; when its lease lapses, a retry
runs the handler again with the same token, and the handler looks for ``made_by`` first.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import re
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar

from aiohttp import web

from ..core.documents import Document, Time
from ..core.errors import Conflict, Invalid, ModelyardError, Unavailable
from ..core.events import event_id
from . import problems
from .call import DOCUMENT_LIMIT, Call
from .observe import fields
from .service import Change, Context, Loop

log = logging.getLogger(__name__)
HEADER, REPLAYED = "Idempotency-Key", "Idempotency-Replayed"
KEPT = timedelta(hours=24)
LEASE = timedelta(seconds=15)
RENEW_S = 4.0
RAW_LIMIT = 8 * 1024 * 1024
ANSWER_LIMIT = 1024 * 1024
KEEP_HEADERS = ("Content-Type", "Content-Location", "ETag", "Location")
_KEY = re.compile(r"^[\x21-\x7e]{1,255}$")


class Request(Document):
    """One POST under a key. ``token`` is what handlers put into ``made_by``; ``status`` 0: not answered yet,
    in flight until ``until`` at ``holder``. ``body`` is the answer in base64."""

    kind: ClassVar[str] = "request"

    token: str
    fingerprint: str
    until: Time
    holder: str
    status: int = 0
    headers: dict[str, str] = {}
    body: str = ""


async def once(ctx: Context, call: Call, handle: Callable[[], Awaitable[web.StreamResponse]], *,
               raw: bool = False) -> web.StreamResponse:
    """Runs the handler, or answers as it answered before. Conflict ``in-flight``; Invalid for another request."""
    given = call.request.headers.getall(HEADER, [])
    if not given:
        return await handle()
    if len(given) > 1 or not _KEY.match(given[0]):
        raise Invalid("an Idempotency-Key is 1-255 visible ASCII characters, given once", field=HEADER)
    body = await call.read(RAW_LIMIT if raw else DOCUMENT_LIMIT)
    record = await _reserve(ctx, call, given[0], _fingerprint(call, body))
    if record.status:
        return web.Response(status=record.status, body=base64.b64decode(record.body),
                            headers={**record.headers, REPLAYED: "true"})
    call.idempotency_key = record.token
    return await _held(ctx, call, record, handle)


def _fingerprint(call: Call, body: bytes) -> str:
    url = call.request.rel_url.without_query_params("wait")
    return hashlib.sha256(f"{call.request.method} {url}\n".encode() + body).hexdigest()


async def _reserve(ctx: Context, call: Call, key: str, fingerprint: str) -> Request:
    """The Request of this key: answered, or now ours. Raises Conflict ``in-flight``, Invalid for another body."""
    id_, now = hashlib.sha256(key.encode()).hexdigest(), ctx.now()
    old = await ctx.store.get(Request, id_, workspace=call.workspace, tombstone=True)
    fresh = Request(id=id_, workspace=call.workspace, token=event_id(), fingerprint=fingerprint, created=now,
                    updated=now, until=now + LEASE, due=now + KEPT, holder=ME)
    if old is None:
        wanted = fresh
    elif old.deleted or old.created + KEPT <= now:
        wanted = fresh.evolve(revision=old.revision)
    elif old.fingerprint != fingerprint:
        raise Invalid("this Idempotency-Key was used for a different request", code="idempotency-key-reused",
                      field=HEADER)
    elif old.status:
        return old
    elif old.until > now and not await _dead(old.holder):
        raise _in_flight(old.until - now)
    else:
        wanted = old.evolve(until=now + LEASE, holder=ME)
    try:
        return await ctx.store.commit(wanted)
    except Conflict as exc:
        raise _in_flight(LEASE) from exc


def _place() -> str:
    """This machine's boot and this process's view of pids: within it, a pid and its start time name one process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/" + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: str) -> str:
    """When a process started, in the kernel's ticks; "" when there is none (or a dead one not yet collected)."""
    try:
        fields_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields_[0] in "ZX" else fields_[19]


PLACE = _place()
ME = f"{PLACE} {os.getpid()} {_started(str(os.getpid()))}"


async def _dead(holder: str) -> bool:
    """True only when the holder was a process of this machine and is certainly gone: its lease need not lapse."""
    place, _, process = holder.partition(" ")
    pid, _, started = process.partition(" ")
    return bool(PLACE) and place == PLACE and await asyncio.to_thread(_started, pid) != started


def _in_flight(left: timedelta) -> Conflict:
    return Conflict("a request with this Idempotency-Key is still in flight", code="in-flight",
                    retry_after=min(left.total_seconds(), 2))


async def _held(ctx: Context, call: Call, record: Request,
                handle: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    work = asyncio.ensure_future(_outcome(call, handle))
    try:
        while not (await asyncio.wait({work}, timeout=RENEW_S))[0]:
            record = await _store(ctx, record.evolve(until=ctx.now() + LEASE))
        response = work.result()
    except BaseException:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await _store(ctx, record.evolve(until=ctx.now()))
        raise
    await _store(ctx, _answered(record, response, ctx.now()))
    return response


async def _outcome(call: Call, handle: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    try:
        return await handle()
    except ModelyardError as exc:
        return problems.answer(exc, call.request_id)


def _answered(record: Request, response: web.StreamResponse, now: datetime) -> Request:
    """With the answer; or lapsed at once where it must not or cannot be kept, so that a retry runs again. An answer
    that says when to come again is none yet."""
    if response.status >= 500 or "Retry-After" in response.headers or not _keepable(response):
        return record.evolve(until=now)
    body = response.body if isinstance(response, web.Response) else None
    assert isinstance(body, bytes | bytearray | None)
    headers = {name: response.headers[name] for name in KEEP_HEADERS if name in response.headers}
    return record.evolve(status=response.status, headers=headers, body=base64.b64encode(body or b"").decode(),
                         updated=now)


def _keepable(response: web.StreamResponse) -> bool:
    return isinstance(response, web.Response) and not response.prepared \
        and isinstance(response.body, bytes | bytearray | None) and len(response.body or b"") <= ANSWER_LIMIT


async def _store(ctx: Context, record: Request) -> Request:
    """Best effort: the caller's answer does not depend on it, and a lapsed Request is safe to run again."""
    try:
        return await ctx.store.commit(record)
    except (Conflict, Unavailable) as exc:
        log.warning("the state of an idempotent request was not kept: %s", exc, extra=fields(request=record.id))
        return record


async def _forget(ctx: Context, record: Request) -> Change[Request]:
    def gone(doc: Request) -> tuple[Request, tuple[()]] | None:
        if doc.created + KEPT > ctx.now():
            return None
        return doc.evolve(deleted=True, status=0, headers={}, body=""), ()

    return gone


FORGET = Loop("forget", of=Request, step=_forget, parallel=2, every_s=30.0)
"""Takes Requests away after their day. Runs beside the loops of every service."""
