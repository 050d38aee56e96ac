"""DocumentStore on MongoDB: a collection for each service, a record for each document, one write for each commit."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from ..core.documents import INDEXED_ALWAYS, Document, Where
from ..core.errors import AlreadyApplied, Conflict
from ..core.events import Envelope
from ..ports.store import DocumentStore, Pending
from . import store_mongo_find as finding
from .store_mongo_gather import Gather
from .store_mongo_link import Feed, Link, taken
from .store_readable import Row, readable, restored
from .store_search import Query, plan

D = TypeVar("D", bound=Document)
CAUSES, TOKENS = 256, 16
POLL_S, WATCHED_POLL_S = 0.2, 1.0
"""How often a waiting ``pending`` looks by itself: without and with a change stream that lives."""
LEAVE_S, ALL_S = 0.2, 5.0
"""What another store of this service committed is left to its own relay for so long; and looked at anyway so often."""
Record = dict[str, Any]
Id = tuple[str, str, str]


class MongoStore(DocumentStore):
    """Opened by ``MongoStore.open``."""

    def __init__(self, link: Link) -> None:
        self._link, self._docs = link, link.documents
        self._me = random.getrandbits(62)
        self._indexed: dict[str, asyncio.Lock | None] = {}
        self._fresh = asyncio.Event()
        self._own = _Own()
        self._reads, self._sents = Gather(self._read), Gather(link.update_each)
        self._scan_at = self._all_at = 0.0
        others = {"$nin": [None, self._me]}
        where = ("fullDocument.q.p", "updateDescription.updatedFields.q.p")
        self._feed = Feed(link, {"$or": [{path: others} for path in where]}, self._notice_others)

    @classmethod
    async def open(cls, url: str, service: str, **options: Any) -> MongoStore:
        """The documents of ``service`` in the database that the URL's path names (default ``modelyard``). Options:
        ``replicaSet``, ``authSource``, ``authMechanism``, ``tls``, ``tlsCAFile`` as MongoDB's own URLs have them;
        ``timeout_s`` (5) bounds the retries of one call; ``pool`` (32) the connections. Raises Invalid or
        Unavailable, saying what to do."""
        link = await Link.open(url, service, **options)
        store = cls(link)
        try:
            await link.index(finding.base_indexes())
        except BaseException:
            await link.close()
            raise
        return store

    async def check(self) -> None:
        await self._link.check()

    async def close(self) -> None:
        await self._feed.stop()
        await self._reads.close()
        await self._sents.close()
        await self._link.close()

    async def get(self, type_: type[D], id: str, *, workspace: str = "default", tombstone: bool = False) -> D | None:
        found = await self._reads((workspace, type_.kind, id))
        if found is None or (found["d"] and not tombstone):
            return None
        return restored(type_, Row(id, workspace, id, found["b"]), self._link.service)

    async def _read(self, asked: Sequence[Id]) -> list[Record | None]:
        """By id, in the order that was asked."""
        keys = [{"k": kind, "w": workspace, "i": id} for workspace, kind, id in dict.fromkeys(asked)]
        if len(keys) == 1:
            one = await self._link.steady(lambda: self._docs.find_one({"_id": keys[0]}, {"b": 1, "d": 1}))
            return [one] * len(asked)
        records = await self._link.steady(
            lambda: self._docs.find({"_id": {"$in": keys}}, {"b": 1, "d": 1}).to_list(len(keys)))
        found = {_id(record): record for record in records}
        return [found.get(id) for id in asked]

    async def find(self, type_: type[D], where: Where | None = None, *, workspace: str | None = "default",
                   order: str = "id", after: tuple[str | int | float, str] | None = None, limit: int = 100,
                   tombstones: bool = False) -> list[D]:
        query = plan(type_, where, order, after, limit, tombstones)
        await self._index(type_)
        spaces = [workspace] if workspace is not None else None if query.order == "due" else await self._spaces(type_)
        if spaces == []:
            return []
        shown = finding.found(query)

        async def ask(query: Query) -> list[Row]:
            filter_, sort = finding.compose(type_.kind, spaces, query)
            found = await self._link.steady(
                lambda: self._docs.find(filter_, shown, sort=sort, limit=query.limit).to_list(query.limit))
            return [finding.row(record, query) for record in found]

        return await readable(type_, query, self._link.service, ask)

    async def _spaces(self, type_: type[Document]) -> list[str]:
        """The workspaces that have such documents: with them a search over all is a merge of walks."""
        found: list[str] = await self._link.steady(lambda: self._docs.distinct(finding.SPACE, {
            finding.KIND: type_.kind, finding.DELETED: {"$in": [False, True]}}))
        return found

    async def _index(self, type_: type[Document]) -> None:
        """Makes the type's indexes before it is used for the first time."""
        lock = self._indexed.setdefault(type_.kind, asyncio.Lock())
        if lock is None:
            return
        async with lock:
            if self._indexed[type_.kind] is not None:
                await self._link.index(finding.indexes(type_))
                self._indexed[type_.kind] = None

    async def commit(self, doc: D, events: Sequence[Envelope] = (), cause: str | None = None) -> D:
        await self._index(type(doc))
        stored = doc.evolve(revision=doc.revision + 1)
        token = random.getrandbits(62)
        keys = stored.model_dump(mode="json", include=set(doc.indexed | INDEXED_ALWAYS) - {"deleted", "id"})
        state = {"r": stored.revision, "d": stored.deleted, "b": stored.model_dump_json(), "f": finding.fields(keys)}
        outbox = [{"i": event.id, "e": event.encode().decode()} for event in events]
        key = {"k": doc.kind, "w": doc.workspace, "i": doc.id}
        waiting = {"t": time.time_ns(), "p": self._me} if outbox else None
        if doc.revision == 0:
            first = {"_id": key, **state, "c": [cause] if cause else [], "n": [token]}
            await self._write(doc, key, cause, token, first | ({"o": outbox, "q": waiting} if outbox else {}), None)
        else:
            await self._write(doc, key, cause, token, *_change(doc.revision, key, state, outbox, waiting, cause, token))
        if outbox:
            self._own.add((doc.workspace, doc.kind, doc.id))
            self._notice()
        return stored

    async def _write(self, doc: Document, key: Record, cause: str | None, token: int, what: Record,
                     update: Record | None) -> None:
        """One write, asked again while an election or a lost connection is between. An answer that was lost leaves
        open whether it was done: then the record is asked, whose tokens name the last commits."""

        async def ask() -> bool:
            if update is not None:
                return (await self._docs.update_one(what, update)).matched_count == 1
            try:
                await self._docs.insert_one(what)
            except Exception as exc:
                if taken(exc):
                    return False
                raise
            return True

        if not await self._link.steady(ask):
            await self._explain(doc, key, cause, token)

    async def _explain(self, doc: Document, key: Record, cause: str | None, token: int) -> None:
        """Why a write met no record: returns when it was our own, else raises. It is read as it stands now, once that
        is sure: what is told here outlasts a crash, and whoever reads again after a Conflict meets what was in his
        way."""
        told = await self._link.steady(lambda: self._link.newest.find_one({"_id": key}, {"r": 1, "c": 1, "n": 1}))
        if told is not None and token in told["n"]:
            return
        if told is not None and cause is not None and cause in told["c"]:
            raise AlreadyApplied(f"{doc.kind} '{doc.id}' has handled {cause} before")
        raise Conflict(f"{doc.kind} '{doc.id}' was changed meanwhile; read it again" if doc.revision
                       else f"{doc.kind} '{doc.id}' exists already", kind=doc.kind, id=doc.id)

    async def pending(self, limit: int, wait: float = 0.0) -> list[Pending]:
        if not wait:
            return await self._scan({"q.t": {"$gt": 0}}, limit)
        self._feed.start()
        end = time.monotonic() + wait
        while True:
            fresh = self._fresh
            found = await self._look(limit)
            now = time.monotonic()
            if found or now >= end:
                return found
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(end, self._scan_at) - now):
                    await fresh.wait()

    async def _look(self, limit: int) -> list[Pending]:
        """What this store committed it knows by id; now and then it looks for what others left, and for everything."""
        if self._own.ids and (found := await self._known(limit)):
            return found
        now = time.monotonic()
        if now < self._scan_at:
            return []
        self._scan_at = now + (WATCHED_POLL_S if self._feed.live else POLL_S)
        if now - self._all_at > ALL_S:  # clocks of others may be wrong
            self._all_at = now
            return await self._scan({"q.t": {"$gt": 0}}, limit)
        left = time.time_ns() - int(LEAVE_S * 1e9)
        return await self._scan({"q.t": {"$gt": 0}, "$or": [{"q.p": self._me}, {"q.t": {"$lt": left}}]}, limit)

    async def _known(self, limit: int) -> list[Pending]:
        """Looked up by id: an index of what waits would be walked over all that waited a moment ago."""
        asked = self._own.ask(limit)
        keys = [{"k": kind, "w": workspace, "i": id} for workspace, kind, id in asked]
        records = await self._link.steady(
            lambda: self._docs.find({"_id": {"$in": keys}}, {"o": 1}).to_list(len(keys)))
        found = {(p.workspace, p.kind, p.id): p for p in map(_waiting, records) if p.events}
        self._own.told(asked, found)
        return [found[id] for id in asked if id in found]

    async def _scan(self, which: Record, limit: int) -> list[Pending]:
        records = await self._link.steady(
            lambda: self._docs.find(which, {"o": 1}, sort=[("q.t", 1)], limit=limit).to_list(limit))
        return [_waiting(record) for record in records]

    def _notice(self) -> None:
        """Wakes whoever waits for pending events."""
        self._fresh.set()
        self._fresh = asyncio.Event()

    def _notice_others(self) -> None:
        def now() -> None:
            self._scan_at = 0.0
            self._notice()

        asyncio.get_running_loop().call_later(LEAVE_S, now)

    async def sent(self, pending: Pending) -> None:
        gone = [event.id for event in pending.events]
        key = {"k": pending.kind, "w": pending.workspace, "i": pending.id}
        rest = {"$filter": {"input": "$o", "cond": {"$not": [{"$in": ["$$this.i", gone]}]}}}
        steps: list[Record] = [{"$set": {"o": rest}}, {"$set": {
            name: {"$cond": [{"$eq": ["$o", []]}, "$$REMOVE", f"${name}"]} for name in ("o", "q")}}]
        await self._sents(({"_id": key, "q.t": {"$gt": 0}}, steps))
        self._own.sent((pending.workspace, pending.kind, pending.id))


class _Own:
    """Which documents' events this store committed and has not seen go: (workspace, kind, id) → number of commits. It
    may forget: what is not here is found by a look at what waits."""

    MOST = 10_000

    def __init__(self) -> None:
        self.ids: dict[Id, int] = {}
        self._asked: dict[Id, int] = {}

    def add(self, id: Id) -> None:
        if len(self.ids) >= self.MOST:
            self.ids.clear()
        self.ids[id] = self.ids.get(id, 0) + 1

    def ask(self, limit: int) -> dict[Id, int]:
        """The first of them, as they are known before the record is read."""
        return dict(itertools.islice(self.ids.items(), limit))

    def told(self, asked: dict[Id, int], found: Collection[Id]) -> None:
        """Nothing waits at those that were not found, unless they were committed meanwhile."""
        self._asked = asked
        for id in asked:
            if id not in found:
                self.sent(id)

    def sent(self, id: Id) -> None:
        if id in self._asked and self.ids.get(id) == self._asked[id]:
            del self.ids[id]


def _id(record: Record) -> Id:
    return record["_id"]["w"], record["_id"]["k"], record["_id"]["i"]


def _waiting(record: Record) -> Pending:
    events = tuple(Envelope.decode(event["e"].encode()) for event in record.get("o", ()))
    return Pending(*_id(record), events)


def _change(revision: int, key: Record, state: Record, outbox: list[Record], waiting: Record | None,
            cause: str | None, token: int) -> tuple[Record, Record]:
    """The filter and the update of a commit that is not the first."""
    filter_: Record = {"_id": key, "r": revision}
    push: Record = {"n": {"$each": [token], "$slice": -TOKENS}}
    update: Record = {"$set": state, "$push": push}
    if cause is not None:
        filter_["c"] = {"$ne": cause}
        push["c"] = {"$each": [cause], "$slice": -CAUSES}
    if outbox:
        push["o"] = {"$each": outbox}
        update["$min"] = {"q": waiting}  # the first of those that wait counts
    return filter_, update
