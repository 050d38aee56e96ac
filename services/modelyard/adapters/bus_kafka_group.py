"""A member of a consumer group on Kafka: takes records, hands them out, commits exactly what is finished.

Four tasks: one fetches (and so stays inside the poll limit whatever the handlers do), one commits, one watches for the
silence that the driver does not tell of, and the driver's own keeps the membership. A failure of any of them reaches
whoever iterates, as Unavailable; joining anew is the cure for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition, errors
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from ..core.errors import Unavailable
from ..ports.bus import Delivery
from .bus_kafka_ends import leave
from .bus_kafka_lane import Lane
from .bus_kafka_link import FAILURES, Link

log = logging.getLogger(__name__)
LANE_WINDOW, WINDOW = 128, 1024
"""Records of one partition, and of all, that may be taken and unfinished; a full partition is paused, not left."""
COMMIT_EVERY_S = 0.15
COMMIT_S = 5.0
LET_GO_S = 3.0
"""Before partitions are given up: so long is waited for what is in the handlers' hands."""
LOOK_EVERY_S, LOOK_S = 2.0, 4.0
AWAY_S = 6.0
SILENT_S, STUCK_S = 12.0, 45.0
POLL_S = 300.0
REBALANCE_S = 20.0
RESTLESS, RESTLESS_S = 6, 60.0
"""So many deals in so many seconds, where members are static, are two that fight for one name."""
LOST = (errors.CommitFailedError, errors.IllegalStateError)
"""A commit for partitions that are another's by now."""


@dataclass(frozen=True)
class Membership:
    """How a group is joined. ``instance``: a static member keeps its partitions over a restart within the session."""

    link: Link
    group: str
    topics: dict[str, str]
    """Name in Kafka → plain name."""
    session_s: float
    instance: str | None = None

    def consumer(self) -> AIOKafkaConsumer:
        """Nothing is left to the driver's defaults: each of them loses or repeats events (C1)."""
        return AIOKafkaConsumer(
            **self.link.client(REBALANCE_S + 10), group_id=self.group, group_instance_id=self.instance,
            enable_auto_commit=False, auto_offset_reset="earliest", isolation_level="read_committed",
            session_timeout_ms=int(self.session_s * 1000), heartbeat_interval_ms=int(self.session_s * 200),
            rebalance_timeout_ms=int(REBALANCE_S * 1000), max_poll_interval_ms=int(POLL_S * 1000),
            partition_assignment_strategy=(RoundRobinPartitionAssignor,), fetch_max_wait_ms=250,
            fetch_max_bytes=8 * 1024 * 1024, max_partition_fetch_bytes=256 * 1024, check_crcs=True)


class Member(AsyncIterator[Delivery]):
    """Joins, takes, commits, leaves. All of it in one event loop, so its state needs no lock."""

    def __init__(self, how: Membership) -> None:
        self._how = how
        self._consumer = how.consumer()
        self._lanes: dict[TopicPartition, Lane] = {}
        self._queue: asyncio.Queue[tuple[Lane, int, Delivery] | Exception] = asyncio.Queue()
        self._acked, self._dirty = asyncio.Event(), asyncio.Event()
        self._taken, self._full, self._leaving = 0, False, False
        self._seen: dict[TopicPartition, tuple[int, float]] = {}
        self._given_up: float | None = None
        self._deals: deque[float] = deque(maxlen=RESTLESS)
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self) -> None:
        """The member has its partitions when this returns. Raises Unavailable."""
        how = self._how
        try:
            self._consumer.subscribe(list(how.topics), listener=_Listener(self))
            async with asyncio.timeout(REBALANCE_S + how.session_s + 10):
                await self._consumer.start()
        except BaseException as exc:
            self._leaving = True
            await leave(self._consumer)
            if isinstance(exc, FAILURES):
                raise await how.link.why(exc, f"the group {how.group} cannot be joined") from exc
            raise
        for work in (self._fetch, self._commit, self._watch):
            self._tasks.append(asyncio.create_task(self._told(work), name=f"kafka member of {how.group}"))

    async def leave(self) -> None:
        """Commits what is finished and gives everything back; leaves no task."""
        self._leaving = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(*FAILURES):
            await self._store(self._lanes)
        self._drop(self._lanes)
        await leave(self._consumer)

    def __aiter__(self) -> Member:
        return self

    async def __anext__(self) -> Delivery:
        """The next delivery. A wait that is cancelled takes nothing, and may be followed by another."""
        while True:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            lane, offset, delivery = item
            if not lane.gone and not lane.closing:
                lane.hand(offset)
                return delivery

    async def _told(self, work: Callable[[], Awaitable[None]]) -> None:
        """Whoever iterates gets what ends this work; silence would look like no events."""
        try:
            await work()
        except FAILURES as exc:
            self._queue.put_nowait(self._how.link.ours(exc, f"the group {self._how.group} gets no events"))
        except Exception as exc:  # noqa: BLE001 - told, not swallowed
            self._queue.put_nowait(exc)

    # Fetching ----------------------------------------------------------------------------------------------------

    async def _fetch(self) -> None:
        """Never waits for a handler, so a slow one costs no membership (C3): a full partition is paused instead."""
        while True:
            batches = await self._consumer.getmany(timeout_ms=1000)
            for partition, records in batches.items():
                lane = self._lanes.get(partition)
                if lane is not None:
                    self._take(lane, records)
                    if lane.waiting() >= LANE_WINDOW:
                        self._pause(partition)
            if self._taken >= WINDOW:
                self._pause(*self._lanes)

    def _pause(self, *partitions: TopicPartition) -> None:
        self._full = True
        self._consumer.pause(*partitions)

    def _resume(self) -> None:
        paused = self._consumer.paused()
        free = [p for p in paused if p not in self._lanes or self._lanes[p].waiting() <= LANE_WINDOW // 2]
        self._consumer.resume(*free)
        self._full = len(free) < len(paused)

    def _take(self, lane: Lane, records: Iterable[ConsumerRecord]) -> None:
        for record in records:
            if lane.take(record.offset):
                self._taken += 1
                self._queue.put_nowait((lane, record.offset, Delivery(
                    topic=lane.topic, key=(record.key or b"").decode(errors="replace"), raw=record.value or b"",
                    origin=f"{lane.topic}[{lane.partition}]@{record.offset}", ack=_Ack(self, lane, record.offset))))

    def acked(self, lane: Lane, offset: int) -> None:
        if not lane.finish(offset):
            return
        self._taken -= 1
        self._acked.set()
        self._dirty.set()
        if self._full and self._taken <= WINDOW * 3 // 4:
            self._resume()

    # Committing --------------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        """Written down soon after it is finished; a crash before that delivers it again."""
        while True:
            await self._dirty.wait()
            await asyncio.sleep(COMMIT_EVERY_S)
            self._dirty.clear()
            try:
                await self._store(self._lanes)
            except FAILURES:
                self._dirty.set()  # the watch says so when it lasts

    async def _store(self, lanes: dict[TopicPartition, Lane]) -> None:
        due = {p: (lane, upto) for p, lane in lanes.items() if not lane.gone and (upto := lane.due()) is not None}
        if not due:
            return
        async with asyncio.timeout(COMMIT_S):
            with contextlib.suppress(*LOST):  # delivered again, to whoever has the partitions now
                await self._consumer.commit({p: upto for p, (_, upto) in due.items()})
                for lane, upto in due.values():
                    lane.stored = upto

    # Assignments -------------------------------------------------------------------------------------------------

    async def give_up(self) -> None:
        """Partitions are about to be dealt anew: nothing more is handed out, what is in hand may yet be finished."""
        lanes, self._lanes = self._lanes, {}
        self._given_up = time.monotonic()
        for lane in lanes.values():
            lane.closing = True
        end = time.monotonic() + LET_GO_S
        while not self._leaving and any(lane.handed for lane in lanes.values()):
            self._acked.clear()
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    await self._acked.wait()
            except TimeoutError:
                break
        with contextlib.suppress(*FAILURES):
            await self._store(lanes)
        self._drop(lanes)

    def deal(self, partitions: Iterable[TopicPartition]) -> None:
        """These are mine from now on; the driver fetches them from what is committed."""
        self._drop(self._lanes)
        self._lanes = {p: Lane(self._how.topics.get(p.topic, p.topic), p.partition) for p in partitions}
        self._seen.clear()
        self._given_up = None
        self._deals.append(time.monotonic())
        if self._how.instance and len(self._deals) == RESTLESS and self._deals[-1] - self._deals[0] < RESTLESS_S:
            self._deals.clear()
            log.warning("the partitions of the group %s are dealt anew all the time; does each process have an "
                        "instance= of its own in bus=? this one is %s", self._how.group, self._how.instance)

    def _drop(self, lanes: dict[TopicPartition, Lane]) -> None:
        for lane in lanes.values():
            if not lane.gone:
                self._taken -= lane.waiting()
                lane.drop()

    # Watching ----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Ends when no broker has answered for ``AWAY_S``, a partition lags and stands still for ``SILENT_S``, or none
        were dealt for ``STUCK_S``: after a restart of the broker or a rebalance the driver may fetch no more and never
        say so (aiokafka #1154)."""
        answered = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            mine = list(self._lanes)
            if self._given_up is not None and time.monotonic() - self._given_up > STUCK_S:
                raise Unavailable(f"the group {self._how.group} has dealt nothing for {STUCK_S:.0f} s; it is joined "
                                  "anew", code="silent")
            if not mine:
                continue
            try:
                async with asyncio.timeout(LOOK_S):
                    ends = await self._consumer.end_offsets(mine)
                    places = {p: await self._consumer.position(p) for p in mine}
            except LOST:
                continue  # dealt anew meanwhile
            except FAILURES:
                if time.monotonic() - answered > AWAY_S:
                    raise
                continue
            answered = time.monotonic()
            if silent := self._still({p: at for p, at in places.items() if at < ends[p]}):
                raise Unavailable(f"the consumer of {self._how.group} has fetched nothing of {silent} for "
                                  f"{SILENT_S:.0f} s though there is more; it is built anew", code="silent")

    def _still(self, behind: dict[TopicPartition, int]) -> str:
        """The first partition that lags, is not paused, and has stood at one place too long."""
        now, paused = time.monotonic(), self._consumer.paused()
        self._seen = {p: self._seen[p] if self._seen.get(p, (-1, 0.0))[0] == at else (at, now)
                      for p, at in behind.items() if p not in paused}
        return next((f"{p.topic}[{p.partition}]" for p, (_, since) in self._seen.items() if now - since > SILENT_S), "")


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """The driver tells of assignments; it waits for the answer."""

    def __init__(self, member: Member) -> None:
        self._member = member

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._member.give_up()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self._member.deal(assigned)


@dataclass(frozen=True)
class _Ack:
    """Marks a delivery done."""

    member: Member
    lane: Lane
    offset: int

    async def __call__(self) -> None:
        self.member.acked(self.lane, self.offset)
