"""EventBus on SQLite: a log with consumer groups, shared by several processes of one machine.

Records lie in ``bus_log`` in the order of their commits. A topic has ``PARTITIONS`` partitions by key; the members of a
group lease them (``bus_sqlite_group``). Who waits is woken at once by a publisher of the same process, and by others
as soon as the kernel tells of their write (or within ``sqlite_file.POLL_S``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

from ..core.errors import Invalid, Unavailable
from ..core.events import Envelope
from ..ports.bus import Delivery, EventBus
from .bus_sqlite_group import Member, head_of
from .sqlite_file import Schema, SqliteFile

log = logging.getLogger(__name__)
PARTITIONS = 8
PRUNE_EVERY_S = 3600.0
PRUNE_ROWS = 500
SCHEMA = Schema("bus", 1, (
    """CREATE TABLE IF NOT EXISTS bus_log(
        offset INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT NOT NULL, partition INTEGER NOT NULL, key TEXT NOT NULL,
        at INTEGER NOT NULL, raw BLOB NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS bus_log_lanes ON bus_log(topic, partition, offset)",
    """CREATE TABLE IF NOT EXISTS bus_members(
        name TEXT NOT NULL, member TEXT NOT NULL, topics TEXT NOT NULL, expires INTEGER NOT NULL,
        PRIMARY KEY(name, member)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS bus_lanes(
        name TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL, done INTEGER NOT NULL, member TEXT,
        PRIMARY KEY(name, topic, partition)) WITHOUT ROWID""",
))


def partition_of(key: str) -> int:
    """The same in every process and version."""
    return zlib.crc32(key.encode()) % PARTITIONS


class SqliteBus(EventBus):
    """Opened by ``SqliteBus.open``. ``retention_days``: older records are removed, read or not."""

    def __init__(self, file: SqliteFile, retention_days: float, lease_s: float) -> None:
        self._file, self._retention_days, self._lease_s = file, retention_days, lease_s
        self._alarms: set[asyncio.Event] = set()
        self._pruner = asyncio.create_task(self._prune(), name="bus retention")

    @classmethod
    async def open(cls, path: str | Path, *, sync: str = "normal", busy_s: float = 10.0, retention_days: float = 14.0,
                   lease_s: float = 10.0) -> SqliteBus:
        """Opens or creates the file. Raises Unavailable or Invalid, saying what to do."""
        return cls(await SqliteFile.open(Path(path), SCHEMA, sync=sync, busy_s=busy_s), retention_days, lease_s)

    async def check(self) -> None:
        await self._file.check()

    async def close(self) -> None:
        self._pruner.cancel()
        await asyncio.gather(self._pruner, return_exceptions=True)
        await self._file.close()

    async def publish(self, envelope: Envelope) -> None:
        row = (envelope.topic, partition_of(envelope.partitionkey), envelope.partitionkey, int(time.time() * 1000),
               envelope.encode())
        await self._file.write(lambda db: db.execute(
            "INSERT INTO bus_log(topic, partition, key, at, raw) VALUES (?, ?, ?, ?, ?)", row).rowcount)
        self.ring()

    def subscribe(self, group: str, topics: Sequence[str]) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self._subscribed(group, tuple(dict.fromkeys(topics)))

    @contextlib.asynccontextmanager
    async def _subscribed(self, group: str, topics: tuple[str, ...]) -> AsyncIterator[AsyncIterator[Delivery]]:
        with self.alarm() as alarm:
            member = Member(self._file, group, topics, PARTITIONS, self._lease_s, alarm, self.ring)
            await member.join()
            try:
                yield member
            finally:
                await member.leave()

    async def read(self, topics: Sequence[str], after: str = "end", limit: int = 100,
                   wait: float = 0.0) -> tuple[list[tuple[str, Envelope]], str]:
        if limit < 1:
            raise Invalid("limit must be at least 1", field="limit")
        place = await self._place(after)
        end = time.monotonic() + wait
        with self.alarm() if wait > 0 else contextlib.nullcontext(asyncio.Event()) as alarm:
            while True:
                alarm.clear()
                rows, place = await self._file.read(partial(_behind, topics=topics, after=place, limit=limit))
                found = [(str(offset), event) for offset, raw in rows if (event := _decoded(raw)) is not None]
                left = end - time.monotonic()
                if found or (left <= 0 and len(rows) < limit):
                    return found, str(place)
                if len(rows) < limit:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(left):
                            await alarm.wait()

    async def _place(self, after: str) -> int:
        if after == "beginning":
            return 0
        if after == "end":
            return await self._file.read(head_of)
        if after.isascii() and after.isdigit() and len(after) < 19:
            return int(after)
        raise Invalid(f"'{after[:40]}' is not a place in the event log; use beginning, end or a cursor from an "
                      "earlier read", field="after")

    @contextlib.contextmanager
    def alarm(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever the log or a group may have changed; looking for others' writes only while
        somebody has one."""
        event = asyncio.Event()
        self._alarms.add(event)
        if len(self._alarms) == 1:
            self._file.listen(self.ring)
        try:
            yield event
        finally:
            self._alarms.discard(event)
            if not self._alarms:
                self._file.listen(None)

    def ring(self) -> None:
        for event in self._alarms:
            event.set()

    async def _prune(self) -> None:
        """Removes old records, a few at a time, so that nobody waits for it."""
        wait = 60.0
        while True:
            await asyncio.sleep(wait)
            wait = PRUNE_EVERY_S
            try:
                while await self.prune():  # noqa: ASYNC110 - a pause for others, not a wait for a condition
                    await asyncio.sleep(0.05)
            except Unavailable as exc:
                log.warning("old events were not removed: %s", exc)

    async def prune(self) -> bool:
        """Removes up to ``PRUNE_ROWS`` records older than the retention. True when there may be more."""
        before = int((time.time() - self._retention_days * 86400) * 1000)

        def remove(db: sqlite3.Connection) -> int:
            return db.execute("DELETE FROM bus_log WHERE at < ? AND offset IN "
                              "(SELECT offset FROM bus_log ORDER BY offset LIMIT ?)", (before, PRUNE_ROWS)).rowcount

        return await self._file.write(remove) == PRUNE_ROWS


def _behind(db: sqlite3.Connection, topics: Sequence[str], after: int,
            limit: int) -> tuple[list[tuple[int, bytes]], int]:
    """Records behind ``after`` and the place to go on from: the last record's, or the end of the log.

    The ``+`` keeps SQLite on the walk by offset; by topic it would read and sort all there is of it.
    """
    where = f"AND +topic IN ({','.join('?' * len(topics))})" if topics else ""
    rows = db.execute(f"SELECT offset, raw FROM bus_log WHERE offset > ? {where} ORDER BY offset LIMIT ?",
                      (after, *topics, limit)).fetchall()
    return rows, rows[-1][0] if len(rows) == limit else max(after, head_of(db))


def _decoded(raw: bytes) -> Envelope | None:
    try:
        return Envelope.decode(raw)
    except Invalid:
        return None
