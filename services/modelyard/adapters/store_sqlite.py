"""DocumentStore on SQLite: one file, shared by several services and several processes.

A document is one row (body, revision, outbox, causes); its index entries are written in the same transaction, and
only those that changed. The file holds the documents of all services, each store sees its own service's.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import orjson

from ..core.documents import INDEXED_ALWAYS, Document, Where
from ..core.errors import AlreadyApplied, Conflict
from ..core.events import Envelope
from ..ports.store import DocumentStore, Pending
from . import store_sqlite_find as finding
from .sqlite_file import Schema, SqliteFile
from .store_readable import Row, readable, restored
from .store_search import Query

D = TypeVar("D", bound=Document)
CAUSES = 256
POLL_S = 0.2
"""How often a waiting ``pending`` looks for what another store of the service committed. The file could tell of every
write, and all services would look after each of any: only their own matter, and those wake at once."""
SCHEMA = Schema("documents", 1, (
    """CREATE TABLE IF NOT EXISTS spaces(
        space INTEGER PRIMARY KEY, service TEXT NOT NULL, kind TEXT NOT NULL, workspace TEXT NOT NULL,
        UNIQUE(service, kind, workspace))""",
    """CREATE TABLE IF NOT EXISTS documents(
        doc INTEGER PRIMARY KEY, space INTEGER NOT NULL, id TEXT NOT NULL, revision INTEGER NOT NULL,
        deleted INTEGER NOT NULL, service TEXT NOT NULL, waiting INTEGER, keys TEXT NOT NULL, outbox BLOB,
        body BLOB NOT NULL, causes TEXT NOT NULL, UNIQUE(space, id))""",
    "CREATE INDEX IF NOT EXISTS documents_waiting ON documents(service, waiting) WHERE waiting IS NOT NULL",
    """CREATE TABLE IF NOT EXISTS entries(
        shelf INTEGER NOT NULL, field TEXT NOT NULL, value NOT NULL, id TEXT NOT NULL, doc INTEGER NOT NULL,
        created TEXT NOT NULL, PRIMARY KEY(shelf, field, value, id)) WITHOUT ROWID""",
))


class SqliteStore(DocumentStore):
    """Opened by ``SqliteStore.open``."""

    def __init__(self, file: SqliteFile, service: str) -> None:
        self._file, self._service = file, service
        self._spaces: dict[tuple[str, str], int] = {}
        self._fresh = asyncio.Event()

    @classmethod
    async def open(cls, path: str | Path, service: str, *, sync: str = "normal", busy_s: float = 10.0) -> SqliteStore:
        """Opens or creates the file for one service. Raises Unavailable or Invalid, saying what to do."""
        return cls(await SqliteFile.open(Path(path), SCHEMA, sync=sync, busy_s=busy_s), service)

    async def check(self) -> None:
        await self._file.check()

    async def close(self) -> None:
        await self._file.close()

    async def get(self, type_: type[D], id: str, *, workspace: str = "default", tombstone: bool = False) -> D | None:
        def look(db: sqlite3.Connection) -> tuple[bytes, int] | None:
            row: tuple[bytes, int] | None = db.execute(
                "SELECT d.body, d.deleted FROM spaces s CROSS JOIN documents d ON d.space=s.space AND d.id=? "
                "WHERE s.service=? AND s.kind=? AND s.workspace=?",
                (id, self._service, type_.kind, workspace)).fetchone()
            return row

        row = await self._file.read(look)
        if row is None or (row[1] and not tombstone):
            return None
        return restored(type_, Row(id, workspace, id, row[0]), self._service)

    async def find(self, type_: type[D], where: Where | None = None, *, workspace: str | None = "default",
                   order: str = "id", after: tuple[str | int | float, str] | None = None, limit: int = 100,
                   tombstones: bool = False) -> list[D]:
        query = finding.plan(type_, where, order, after, limit, tombstones)
        halves = (0, 1) if query.deleted is None else (int(query.deleted),)

        async def ask(query: Query) -> list[Row]:
            def look(db: sqlite3.Connection) -> list[Row]:
                rows = [Row(value, space, id, body) for number, space in self._find_spaces(db, type_.kind, workspace)
                        for half in halves for value, id, body in finding.run(db, number * 2 + half, query)]
                return finding.merged(rows, query)

            return await self._file.read(look)

        return await readable(type_, query, self._service, ask)

    def _find_spaces(self, db: sqlite3.Connection, kind: str, workspace: str | None) -> list[tuple[int, str]]:
        sql, args = "SELECT space, workspace FROM spaces WHERE service=? AND kind=?", [self._service, kind]
        if workspace is not None:
            sql, args = f"{sql} AND workspace=?", [*args, workspace]
        return db.execute(sql, args).fetchall()

    async def commit(self, doc: D, events: Sequence[Envelope] = (), cause: str | None = None) -> D:
        space = await self._space(doc.kind, doc.workspace)
        stored = doc.evolve(revision=doc.revision + 1)
        keys = stored.model_dump(mode="json", include=set(doc.indexed | INDEXED_ALWAYS) - {"deleted"})
        row = _Row(stored, space, stored.model_dump_json().encode(), keys, [e.encode() for e in events], cause)
        await self._file.write(lambda db: row.write(db, self._service))
        if events:
            self._fresh.set()
            self._fresh = asyncio.Event()
        return stored

    async def _space(self, kind: str, workspace: str) -> int:
        """The number of (kind, workspace), given once and for good; remembered only when it is on disk."""
        known = self._spaces.get((kind, workspace))
        if known is not None:
            return known
        key = (self._service, kind, workspace)

        def allot(db: sqlite3.Connection) -> int:
            db.execute("INSERT OR IGNORE INTO spaces(service, kind, workspace) VALUES (?, ?, ?)", key)
            space: int = db.execute("SELECT space FROM spaces WHERE service=? AND kind=? AND workspace=?",
                                    key).fetchone()[0]
            return space

        space = self._spaces[kind, workspace] = await self._file.write(allot)
        return space

    async def pending(self, limit: int, wait: float = 0.0) -> list[Pending]:
        end = time.monotonic() + wait
        while True:
            fresh = self._fresh
            found = await self._pending(limit)
            rest = end - time.monotonic()
            if found or rest <= 0:
                return found
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(rest, POLL_S)):
                    await fresh.wait()

    async def _pending(self, limit: int) -> list[Pending]:
        def look(db: sqlite3.Connection) -> list[tuple[str, str, str, bytes]]:
            return db.execute(
                "SELECT s.workspace, s.kind, d.id, d.outbox FROM documents d CROSS JOIN spaces s ON s.space=d.space "
                "WHERE d.service=? AND d.waiting IS NOT NULL ORDER BY d.waiting LIMIT ?",
                (self._service, limit)).fetchall()

        return [
            Pending(workspace, kind, id, tuple(Envelope.model_validate(e) for e in orjson.loads(outbox)))
            for workspace, kind, id, outbox in await self._file.read(look)
        ]

    async def sent(self, pending: Pending) -> None:
        space = await self._space(pending.kind, pending.workspace)
        gone = {event.id for event in pending.events}

        def take(db: sqlite3.Connection) -> None:
            row = db.execute("SELECT doc, outbox, waiting FROM documents WHERE space=? AND id=?",
                             (space, pending.id)).fetchone()
            if row is None or row[1] is None:
                return
            rest = [event for event in orjson.loads(row[1]) if event["id"] not in gone]
            db.execute("UPDATE documents SET outbox=?, waiting=? WHERE doc=?",
                       (orjson.dumps(rest) if rest else None, row[2] if rest else None, row[0]))

        await self._file.write(take)


class _Row:
    """One commit on its way to the file."""

    def __init__(self, doc: Document, space: int, body: bytes, keys: dict[str, Any], events: list[bytes],
                 cause: str | None) -> None:
        self.doc, self.space, self.body, self.keys, self.events, self.cause = doc, space, body, keys, events, cause

    def write(self, db: sqlite3.Connection, service: str) -> None:
        doc = self.doc
        old = db.execute("SELECT doc, revision, deleted, keys, outbox, causes, waiting FROM documents "
                         "WHERE space=? AND id=?", (self.space, doc.id)).fetchone()
        number, revision, deleted, keys, outbox, causes, waiting = old or (None, 0, False, None, None, "", None)
        if self.cause is not None and self.cause in causes.split():
            raise AlreadyApplied(f"{doc.kind} '{doc.id}' has handled {self.cause} before")
        if revision != doc.revision - 1:
            raise Conflict(f"{doc.kind} '{doc.id}' was changed meanwhile; read it again" if doc.revision > 1
                           else f"{doc.kind} '{doc.id}' exists already", kind=doc.kind, id=doc.id)
        if self.cause is not None:
            causes = " ".join([*causes.split()[1 - CAUSES:], self.cause])
        if self.events:
            outbox = b"[" + b",".join([*([outbox[1:-1]] if outbox else []), *self.events]) + b"]"
            waiting = waiting or time.time_ns()
        values = (doc.revision, doc.deleted, waiting, orjson.dumps(self.keys).decode(), outbox, self.body, causes)
        if number is None:
            number = db.execute(
                "INSERT INTO documents(revision, deleted, waiting, keys, outbox, body, causes, space, id, service) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, self.space, doc.id, service)).lastrowid
        else:
            db.execute("UPDATE documents SET revision=?, deleted=?, waiting=?, keys=?, outbox=?, body=?, causes=? "
                       "WHERE doc=?", (*values, number))
        self._index(db, number, bool(deleted), orjson.loads(keys) if keys else {})

    def _index(self, db: sqlite3.Connection, number: int | None, was_deleted: bool, old_keys: dict[str, Any]) -> None:
        """Writes the entries that changed; all of them when it moves to the other shelf or to another time."""
        old, new = finding.entries(old_keys), finding.entries(self.keys)
        created = self.keys["created"]
        moved = was_deleted != self.doc.deleted or old_keys.get("created") != created
        before, after = self.space * 2 + was_deleted, self.space * 2 + self.doc.deleted
        gone, come = (old, new) if moved else (old - new, new - old)
        if gone:
            db.executemany("DELETE FROM entries WHERE shelf=? AND field=? AND value=? AND id=?",
                           [(before, field, value, self.doc.id) for field, value in gone])
        if come:
            db.execute("INSERT INTO entries(shelf, field, value, id, doc, created) "
                       "SELECT ?, value->>0, value->>1, ?, ?, ? FROM json_each(?)",
                       (after, self.doc.id, number, created, orjson.dumps(list(come)).decode()))
