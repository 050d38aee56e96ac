"""Documents in memory. A ``Shelf`` is what survives a crash; a ``MemoryStore`` is one process's door to it."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

import orjson

from modelyard.adapters.store_readable import Row, readable, restored
from modelyard.adapters.store_search import Query, entries, plan
from modelyard.core.documents import INDEXED_ALWAYS, Document
from modelyard.core.errors import AlreadyApplied, Conflict
from modelyard.core.events import Envelope
from modelyard.ports.store import DocumentStore, Pending

CAUSES, SERVICE = 256, "simulated"
Key = tuple[str, str, str]


class Bell:
    """Whoever waits is woken by the next ring."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def ring(self) -> None:
        self.event.set()
        self.event = asyncio.Event()

    async def wait(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.event.wait()
        except TimeoutError:
            return False
        return True


@dataclass
class Record:
    body: bytes
    revision: int
    deleted: bool
    keys: dict[str, Any]
    entries: set[tuple[str, Any]]
    outbox: list[Envelope] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    waiting: int = 0


class Shelf:
    """One service's documents. ``committed`` is every event that was ever committed, in order."""

    def __init__(self) -> None:
        self.records: dict[Key, Record] = {}
        self.committed: list[Envelope] = []
        self.bell = Bell()
        self.clock = itertools.count(1)


class MemoryStore(DocumentStore):
    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    async def check(self) -> None:
        return

    async def close(self) -> None:
        return

    async def get(self, type_: Any, id: str, *, workspace: str = "default", tombstone: bool = False) -> Any:
        record = self.shelf.records.get((workspace, type_.kind, id))
        if record is None or (record.deleted and not tombstone):
            return None
        return restored(type_, Row(id, workspace, id, record.body), SERVICE)

    async def find(self, type_: Any, where: Any = None, *, workspace: str | None = "default", order: str = "id",
                   after: Any = None, limit: int = 100, tombstones: bool = False) -> list[Any]:
        query = plan(type_, where, order, after, limit, tombstones)

        async def ask(query: Query) -> list[Row]:
            found = [Row(record.keys[query.order], key[0], key[2], record.body)
                     for key, record in self.shelf.records.items()
                     if key[1] == type_.kind and workspace in (None, key[0]) and _matches(record, query)]
            found.sort(key=lambda row: (row.value, row.id), reverse=query.descending)
            if (place := query.after) is not None:
                found = [row for row in found if (
                    (row.value, row.id) < place if query.descending else (row.value, row.id) > place)]
            return found[:query.limit]

        return await readable(type_, query, SERVICE, ask)

    async def commit(self, doc: Any, events: Any = (), cause: str | None = None) -> Any:
        key = (doc.workspace, doc.kind, doc.id)
        old = self.shelf.records.get(key)
        if cause is not None and old is not None and cause in old.causes:
            raise AlreadyApplied(f"{doc.kind} '{doc.id}' has handled {cause}")
        if doc.revision != (old.revision if old else 0):
            raise Conflict(f"{doc.kind} '{doc.id}' was changed meanwhile")
        stored = doc.evolve(revision=doc.revision + 1)
        record = _record(stored)
        if old is not None:
            record.outbox, record.causes, record.waiting = old.outbox, old.causes, old.waiting
        record.causes = (record.causes + ([cause] if cause else []))[-CAUSES:]
        if events:
            record.waiting = record.waiting if record.outbox else next(self.shelf.clock)
            record.outbox = [*record.outbox, *events]
            self.shelf.committed += events
        self.shelf.records[key] = record
        if events:
            self.shelf.bell.ring()
        return stored

    async def pending(self, limit: int, wait: float = 0.0) -> list[Pending]:
        if not (found := self._waiting(limit)) and wait > 0:
            await self.shelf.bell.wait(wait)
            found = self._waiting(limit)
        return found

    def _waiting(self, limit: int) -> list[Pending]:
        found = [(record.waiting, key, record) for key, record in self.shelf.records.items() if record.outbox]
        found.sort(key=lambda hit: hit[:2])
        return [Pending(*key, tuple(record.outbox)) for _, key, record in found[:limit]]

    async def sent(self, pending: Pending) -> None:
        record = self.shelf.records.get((pending.workspace, pending.kind, pending.id))
        if record is not None:
            gone = {event.id for event in pending.events}
            record.outbox = [event for event in record.outbox if event.id not in gone]
            record.waiting = next(self.shelf.clock)


def _record(doc: Document) -> Record:
    body = doc.model_dump_json().encode()
    values = orjson.loads(body)
    keys = {name: values[name] for name in {*type(doc).indexed, *INDEXED_ALWAYS} if values[name] is not None}
    return Record(body, doc.revision, doc.deleted, keys, entries(keys))


def _matches(record: Record, query: Query) -> bool:
    if query.deleted is not None and record.deleted != query.deleted:
        return False
    if query.order not in record.keys or not record.entries.issuperset(query.equal):
        return False
    if query.ranged is None:
        return True
    name, low, high = query.ranged
    value = record.keys.get(name)
    return value is not None and (low is None or value >= low) and (high is None or value < high)
