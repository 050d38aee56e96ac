"""A member of a consumer group on the SQLite bus.

A lane is one partition of one topic. Every live member computes the same owner for every lane; a lane is given up by
its holder when its deliveries are acknowledged (or after ``LET_GO_S``), and taken by its new owner when it is free.
What a group has finished in a lane is one number, the offset below which everything is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import Unavailable
from ..ports.bus import Delivery
from .sqlite_file import SqliteFile
from .sqlite_identity import dead, identity

WINDOW = 256
"""Deliveries of one member that may be un-acknowledged at once."""
FLUSH_S = 0.02
LET_GO_S = 5.0
LaneKey = tuple[str, int]
Row = tuple[int, str, int, str, bytes]


@dataclass
class Lane:
    """What this member holds of one partition of one topic. ``fetched`` None: as far as the member has read."""

    topic: str
    partition: int
    done: int
    fetched: int | None
    stored: int = 0
    open: deque[int] = field(default_factory=deque)
    finished: set[int] = field(default_factory=set)
    handed: set[int] = field(default_factory=set)
    leave_by: float | None = None
    gone: bool = False

    def finish(self, offset: int) -> None:
        """Moves ``done`` up to the lowest unfinished record."""
        self.handed.discard(offset)
        self.finished.add(offset)
        while self.open and self.open[0] in self.finished:
            self.done = self.open.popleft()
            self.finished.discard(self.done)


class Member(AsyncIterator[Delivery]):
    """Joins, keeps its lease, fetches, and leaves. One task does all of it, so its state needs no lock."""

    def __init__(self, file: SqliteFile, group: str, topics: Sequence[str], partitions: int, lease_s: float,
                 alarm: asyncio.Event, ring: Callable[[], None]) -> None:
        self._file, self._group, self._topics, self._partitions = file, group, tuple(topics), partitions
        self._lease_s, self._alarm, self._ring = lease_s, alarm, ring
        self._name = ""
        self._lanes: dict[LaneKey, Lane] = {}
        self._queue: asyncio.Queue[tuple[Lane, int, Delivery] | Exception] = asyncio.Queue()
        self._head = 0
        self._members: tuple[str, ...] = ()
        self._in_flight = 0
        self._full = False
        self._tend_at = 0.0
        self._flusher: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """The first lanes are held when this returns. Raises Unavailable."""
        self._name, self._head = await self._file.read(lambda db: (identity(), head_of(db)))
        await self._tend()
        self._task = asyncio.create_task(self._keep(), name=f"bus member of {self._group}")

    async def leave(self) -> None:
        """Gives everything back; what was not acknowledged is another member's at once. Leaves no task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._flusher is not None:
            self._flusher.cancel()

        def go(db: sqlite3.Connection) -> None:
            self._write_down(db, self._lanes.values())
            db.execute("UPDATE bus_lanes SET member=NULL WHERE name=? AND member=?", (self._group, self._name))
            db.execute("DELETE FROM bus_members WHERE name=? AND member=?", (self._group, self._name))

        for lane in self._lanes.values():
            self._drop(lane)
        with contextlib.suppress(Unavailable):  # the lease lapses by itself
            await self._file.write(go)
        self._ring()

    def __aiter__(self) -> Member:
        return self

    async def __anext__(self) -> Delivery:
        """The next delivery. A wait that is cancelled takes nothing, and may be followed by another."""
        while True:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            lane, offset, delivery = item
            if not lane.gone and lane.leave_by is None:
                lane.handed.add(offset)
                return delivery
            self._in_flight -= 1

    # The one task ------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        try:
            while True:
                self._alarm.clear()
                if time.monotonic() >= self._tend_at or any(lane.leave_by for lane in self._lanes.values()):
                    await self._tend()
                await self._flush()
                if await self._fetch():
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, self._tend_at - time.monotonic())):
                        await self._alarm.wait()
        except Exception as exc:  # noqa: BLE001 - whoever iterates gets it; silence would look like no events
            self._queue.put_nowait(exc)

    async def _tend(self) -> None:
        """Renews the lease, counts the members, takes what is mine and free, lets go what is another's."""
        before, now = self._members, time.monotonic()
        leaving = [lane for lane in self._lanes.values()
                   if lane.leave_by is not None and (not lane.handed or now > lane.leave_by)]
        for lane in leaving:
            self._drop(lane)
        held, wanted, self._members = await self._file.write(lambda db: self._roll_call(db, leaving))
        for key in [k for k in self._lanes if k not in held]:
            self._drop(self._lanes.pop(key))
        for key, done in held.items():
            lane = self._lanes.setdefault(key, Lane(*key, done=done, fetched=done, stored=done))
            if key not in wanted and lane.leave_by is None:
                lane.leave_by = now + LET_GO_S
        self._tend_at = now + (0.1 if any(lane.leave_by for lane in self._lanes.values()) else self._lease_s / 4)
        if leaving or self._members != before:
            self._ring()

    def _roll_call(self, db: sqlite3.Connection,
                   leaving: Iterable[Lane]) -> tuple[dict[LaneKey, int], set[LaneKey], tuple[str, ...]]:
        """In one transaction → (lanes I hold and how far they are done, lanes that should be mine, members)."""
        me, group, now = self._name, self._group, int(time.time() * 1000)
        db.execute("INSERT OR REPLACE INTO bus_members VALUES (?, ?, ?, ?)",
                   (group, me, json.dumps(self._topics), now + int(self._lease_s * 1000)))
        rows = db.execute("SELECT member, topics, expires FROM bus_members WHERE name=?", (group,)).fetchall()
        alive = {m: json.loads(topics) for m, topics, expires in rows if expires > now and not dead(m)}
        for member in [m for m, _, _ in rows if m not in alive]:
            db.execute("DELETE FROM bus_members WHERE name=? AND member=?", (group, member))
        self._write_down(db, leaving)
        for lane in leaving:
            db.execute("UPDATE bus_lanes SET member=NULL WHERE name=? AND topic=? AND partition=? AND member=?",
                       (group, lane.topic, lane.partition, me))
        if not self._members:
            db.executemany("INSERT OR IGNORE INTO bus_lanes VALUES (?, ?, ?, 0, NULL)",
                           [(group, topic, p) for topic in self._topics for p in range(self._partitions)])
        wanted = self._share(alive)
        held: dict[LaneKey, int] = {}
        for topic, p, done, owner in db.execute("SELECT topic, partition, done, member FROM bus_lanes WHERE name=?",
                                                (group,)).fetchall():
            if owner == me:
                held[topic, p] = done
            elif (topic, p) in wanted and owner not in alive:
                db.execute("UPDATE bus_lanes SET member=? WHERE name=? AND topic=? AND partition=?",
                           (me, group, topic, p))
                held[topic, p] = done
        return held, wanted, tuple(sorted(alive))

    def _share(self, alive: dict[str, list[str]]) -> set[LaneKey]:
        """The lanes that every member agrees are mine."""
        mine: set[LaneKey] = set()
        for topic in self._topics:
            takers = sorted(m for m, topics in alive.items() if topic in topics)
            turn = zlib.crc32(topic.encode())
            mine.update((topic, p) for p in range(self._partitions) if takers[(p + turn) % len(takers)] == self._name)
        return mine

    async def _flush(self) -> None:
        """Writes down how far the lanes are done, all that moved in one transaction."""
        if self._flusher is not None and self._flusher.when() > asyncio.get_running_loop().time():
            return
        self._flusher = None
        moved = [lane for lane in self._lanes.values() if lane.done > lane.stored]
        if moved:
            await self._file.write(lambda db: self._write_down(db, moved))

    def _write_down(self, db: sqlite3.Connection, lanes: Iterable[Lane]) -> None:
        moved = [(lane, lane.done) for lane in lanes if lane.done > lane.stored]
        db.executemany("UPDATE bus_lanes SET done=? WHERE name=? AND topic=? AND partition=? AND member=?",
                       [(done, self._group, lane.topic, lane.partition, self._name) for lane, done in moved])
        for lane, done in moved:
            lane.stored = done

    async def _fetch(self) -> bool:
        """Queues what is new, as far as the window allows. True when there is more to fetch at once."""
        room = WINDOW - self._in_flight
        lanes = {k: lane for k, lane in self._lanes.items() if lane.leave_by is None}
        if room <= 0 or not lanes:
            return False
        behind = [(lane, lane.fetched) for lane in lanes.values() if lane.fetched is not None]
        found = await self._file.read(lambda db: self._look(db, behind, room))
        for lane, upto, rows in found.behind:
            lane.fetched = upto
            self._take(lanes, rows)
        self._take({k: lane for k, lane in lanes.items() if lane.fetched is None}, found.tail)
        self._head = found.head
        self._full = self._in_flight >= WINDOW
        if found.members != self._members:
            self._tend_at = 0.0
            return True
        return found.more and not self._full

    def _look(self, db: sqlite3.Connection, behind: list[tuple[Lane, int]], room: int) -> _Found:
        """In one snapshot: lanes that lag, each by its index, up to where the member has read; then the tail."""
        found = _Found(self._head)
        columns = "SELECT offset, topic, partition, key, raw FROM bus_log WHERE"
        for lane, after in behind:
            if room <= 0:
                found.more = True
                break
            rows = db.execute(f"{columns} topic=? AND partition=? AND offset>? AND offset<=? ORDER BY offset LIMIT ?",
                              (lane.topic, lane.partition, after, self._head, room)).fetchall()
            found.behind.append((lane, rows[-1][0] if len(rows) == room else None, rows))
            room -= len(rows)
        if room > 0 and not found.more:
            marks = ",".join("?" * len(self._topics))
            found.tail = db.execute(f"{columns} offset>? AND +topic IN ({marks}) ORDER BY offset LIMIT ?",
                                    (self._head, *self._topics, room)).fetchall()
            found.more = len(found.tail) == room
            found.head = found.tail[-1][0] if found.more else max(self._head, head_of(db))
        found.members = tuple(m for (m,) in db.execute(
            "SELECT member FROM bus_members WHERE name=? ORDER BY member", (self._group,)))
        return found

    def _take(self, lanes: dict[LaneKey, Lane], rows: Iterable[Row]) -> None:
        for offset, topic, partition, key, raw in rows:
            lane = lanes.get((topic, partition))
            if lane is None or offset <= lane.done:
                continue
            lane.open.append(offset)
            self._in_flight += 1
            self._queue.put_nowait((lane, offset, Delivery(
                topic=topic, key=key, raw=raw, origin=f"{topic}[{partition}]@{offset}", ack=_Ack(self, lane, offset))))

    def _drop(self, lane: Lane) -> None:
        """No longer mine: what was handed out counts no more, what waits in the queue is passed over."""
        if not lane.gone:
            lane.gone = True
            self._in_flight -= len(lane.handed)
            lane.handed.clear()

    def acked(self, lane: Lane, offset: int) -> None:
        if lane.gone or offset not in lane.handed:
            return
        lane.finish(offset)
        self._in_flight -= 1
        if (self._full and self._in_flight <= WINDOW // 2) or (lane.leave_by is not None and not lane.handed):
            self._alarm.set()
        if self._flusher is None:
            self._flusher = asyncio.get_running_loop().call_later(FLUSH_S, self._alarm.set)


@dataclass
class _Found:
    head: int
    behind: list[tuple[Lane, int | None, list[Row]]] = field(default_factory=list)
    tail: list[Row] = field(default_factory=list)
    members: tuple[str, ...] = ()
    more: bool = False


@dataclass(frozen=True)
class _Ack:
    """Marks a delivery done. It is written down within ``FLUSH_S``; a crash before that delivers it again."""

    member: Member
    lane: Lane
    offset: int

    async def __call__(self) -> None:
        self.member.acked(self.lane, self.offset)


def head_of(db: sqlite3.Connection) -> int:
    """The offset of the newest record there ever was; 0 before the first."""
    row: Any = db.execute("SELECT seq FROM sqlite_sequence WHERE name='bus_log'").fetchone()
    return row[0] if row else 0
