"""Reading Kafka without a group: a cursor says how far each partition was read; consumers are kept."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from ..core.errors import Invalid
from ..core.events import Envelope
from .bus_kafka_ends import leave
from .bus_kafka_link import CONNECT_S, FAILURES, Link

IDLE = 4
"""Consumers that are kept open between reads."""
ANSWER_S = 10.0
STEP_S = 1.0
MARK = "k1"
CURSOR = re.compile(rf"{MARK}(~[A-Za-z0-9.-]+(_[0-9]{{1,18}})+)*")


@dataclass
class Place:
    """How far each topic was read: the offsets to go on from, by plain name. A topic that is not named: its beginning.

    As text, ``k1~image.built_0_12~…``: only characters that a URL leaves as they are.
    """

    offsets: dict[str, list[int]]

    @classmethod
    def parse(cls, text: str) -> Place:
        """Raises Invalid."""
        if not CURSOR.fullmatch(text):
            raise Invalid(f"'{text[:40]}' is not a place in the event log; use beginning, end or a cursor from an "
                          "earlier read", field="after")
        parts = (part.split("_") for part in text.split("~")[1:])
        return cls({name: [int(n) for n in numbers] for name, *numbers in parts})

    def of(self, topic: str, partitions: int) -> list[int]:
        known = self.offsets.get(topic, [])[:partitions]
        return known + [0] * (partitions - len(known))


def _part(name: str, offsets: Sequence[int]) -> str:
    """What was never read or written is left out."""
    return f"~{name}_{'_'.join(map(str, offsets))}" if any(offsets) else ""


class Reader:
    """Reads for any number of callers at once, each with a consumer of its own while it reads."""

    def __init__(self, link: Link, partitions: int) -> None:
        self._link, self._partitions = link, partitions
        self._idle: list[tuple[AIOKafkaConsumer, dict[TopicPartition, int]]] = []
        self._closed = False

    async def close(self) -> None:
        self._closed = True
        idle, self._idle = self._idle, []
        await asyncio.gather(*(leave(consumer) for consumer, _ in idle))

    async def read(self, topics: Sequence[str], known: Sequence[str], after: str, limit: int,
                   wait: float) -> tuple[list[tuple[str, Envelope]], str]:
        """As ``EventBus.read`` promises; ``known`` are all topics that a cursor from the end must speak of."""
        place = None if after == "end" else Place({}) if after == "beginning" else Place.parse(after)
        consumer, at = await self._take()
        try:
            with self._link.door("events cannot be read"):
                if place is None:
                    async with asyncio.timeout(ANSWER_S):
                        place = await self._end(consumer, known)
                wanted = {p: offset for topic in topics
                          for p, offset in zip(self._of(topic), place.of(topic, self._partitions), strict=True)}
                _aim(consumer, wanted, at)
                log = _Log(place, wanted, {self._link.name(topic): topic for topic in topics})
                await self._collect(consumer, log, limit, wait)
        except BaseException:
            await leave(consumer)
            raise
        await self._keep(consumer, log.at)
        return log.found, log.cursor()

    def _of(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(self._link.name(topic), n) for n in range(self._partitions)]

    async def _end(self, consumer: AIOKafkaConsumer, topics: Sequence[str]) -> Place:
        ends = await consumer.end_offsets([p for topic in topics for p in self._of(topic)])
        return Place({topic: [ends[p] for p in self._of(topic)] for topic in topics})

    async def _take(self) -> tuple[AIOKafkaConsumer, dict[TopicPartition, int]]:
        """A consumer, and where it stands."""
        if self._idle:
            return self._idle.pop()
        consumer = AIOKafkaConsumer(
            **self._link.client(), group_id=None, enable_auto_commit=False, auto_offset_reset="earliest",
            isolation_level="read_committed", fetch_max_wait_ms=250, fetch_max_bytes=4 * 1024 * 1024,
            max_partition_fetch_bytes=256 * 1024, check_crcs=True)
        try:
            async with asyncio.timeout(CONNECT_S):
                await consumer.start()
        except BaseException as exc:
            await leave(consumer)
            if isinstance(exc, FAILURES):
                raise await self._link.why(exc, "events cannot be read") from exc
            raise
        return consumer, {}

    async def _keep(self, consumer: AIOKafkaConsumer, at: dict[TopicPartition, int]) -> None:
        if len(self._idle) < IDLE and not self._closed:
            self._idle.append((consumer, at))
        else:
            await leave(consumer)

    async def _collect(self, consumer: AIOKafkaConsumer, log: _Log, limit: int, wait: float) -> None:
        """Records until there are some, or nothing more is there and the time is over."""
        end = time.monotonic() + wait
        async with asyncio.timeout(ANSWER_S):
            ends = await consumer.end_offsets(list(log.at))
        while True:
            behind = [p for p, at in log.at.items() if at < ends[p]]
            left = end - time.monotonic()
            if not behind and left <= 0:
                return
            async with asyncio.timeout(ANSWER_S if behind else None):
                batches = await _some(consumer, behind, limit, left)
                if not batches:  # older ones may be gone: then it stands at the oldest that is left
                    for p in behind:
                        log.at[p] = max(log.at[p], await consumer.position(p))
            for partition, records in batches.items():
                for record in records:
                    log.add(partition, record.offset, record.value or b"")
            if log.found:
                return


async def _some(consumer: AIOKafkaConsumer, behind: list[TopicPartition], limit: int,
                left: float) -> dict[TopicPartition, list[ConsumerRecord]]:
    step = STEP_S if behind else min(STEP_S, max(left, 0.0))
    found: dict[TopicPartition, list[ConsumerRecord]] = await consumer.getmany(
        timeout_ms=int(step * 1000) + 1, max_records=limit)
    return found


def _aim(consumer: AIOKafkaConsumer, wanted: dict[TopicPartition, int], at: dict[TopicPartition, int]) -> None:
    """Goes on where it stands, or from the given places."""
    if wanted == at:
        return
    if wanted.keys() != at.keys():
        consumer.assign(list(wanted))
    for partition, offset in wanted.items():
        consumer.seek(partition, offset)


class _Log:
    """What was read, and the cursor behind each record."""

    def __init__(self, place: Place, wanted: dict[TopicPartition, int], plain: dict[str, str]) -> None:
        self.found: list[tuple[str, Envelope]] = []
        self.at = wanted
        self._plain = plain
        self._offsets = {**place.offsets, **{name: [] for name in plain.values()}}
        for partition, offset in wanted.items():
            self._offsets[plain[partition.topic]].append(offset)
        self._parts = {name: _part(name, numbers) for name, numbers in sorted(self._offsets.items())}

    def add(self, partition: TopicPartition, offset: int, raw: bytes) -> None:
        """A record; one that is no event only moves the cursor."""
        self.at[partition] = offset + 1
        name = self._plain[partition.topic]
        self._offsets[name][partition.partition] = offset + 1
        self._parts[name] = _part(name, self._offsets[name])
        try:
            event = Envelope.decode(raw)
        except Invalid:
            return
        self.found.append((self.cursor(), event))

    def cursor(self) -> str:
        return MARK + "".join(self._parts.values())
