"""What the stream worker needs of Kafka beside Faust: topics made before it starts, and how far behind it is.

It has connections of its own, so that it tells the truth about a worker whose own have gone silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition, errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.partitioner import DefaultPartitioner

from ..core.errors import Invalid, NotFound
from .bus_kafka_link import Link
from .bus_kafka_topics import BROKERS_CHOICE, Topics

CHANGELOG = {"cleanup.policy": "compact", "segment.ms": "600000", "min.cleanable.dirty.ratio": "0.1",
             "max.message.bytes": str(8 * 1024 * 1024)}
"""Compacted only: a changelog whose last records are deleted by age can stall Faust's recovery."""
SILENT_S = 45.0
Place = tuple[str, int]
"""Topic and partition, as Kafka has them."""


@dataclass(frozen=True)
class StreamKafka:
    """Where Kafka is, and the topics of the bus. ``session_s``: how long a member may be silent."""

    link: Link
    topics: Topics
    session_s: float

    @classmethod
    async def open(cls, url: str, *, partitions: int = 6, replication: int = 0, retention_days: float = 14.0,
                   session_s: float = 10.0, instance: str | None = None, security_protocol: str | None = None,
                   sasl_mechanism: str | None = None, cafile: str | None = None) -> StreamKafka:
        """Takes the options of the bus (``instance`` is not used: this group's members come and go). No I/O but
        reading ``cafile``."""
        link = await Link.of(url, security_protocol, sasl_mechanism, cafile)
        return cls(link, Topics(link, partitions, replication, retention_days), session_s)

    async def prepare(self, sources: Sequence[str], changelog: str) -> None:
        """Makes what is not there: the bus's topics, and the changelog (its whole name) with as many partitions.
        Raises Unavailable, or Invalid when one is there with another number: the worker would never start."""
        await self.topics.declare(sources)
        async with self.topics.admin("declaring the changelog") as admin:
            had = await _count(admin, changelog) or await self._make(admin, changelog)
        if had != self.topics.partitions:
            raise Invalid(f"the changelog {changelog} has {had} partitions, its sources have {self.topics.partitions}; "
                          "delete it (live windows fill up again by themselves)", code="partitions")

    async def _make(self, admin: AIOKafkaAdminClient, name: str) -> int:
        topic = NewTopic(name, self.topics.partitions, 1, topic_configs=CHANGELOG)
        topic.replication_factor = self.topics.replication or BROKERS_CHOICE
        answer = await admin.create_topics([topic], timeout_ms=10_000)
        for _, code, message in answer.topic_errors:
            error = errors.for_code(code)
            if error not in (errors.NoError, errors.TopicAlreadyExistsError):
                raise error(f"{name}: {message}")
        return await _count(admin, name) or self.topics.partitions

    async def behind(self, group: str, sources: Sequence[str],
                     changelog: str | None = None) -> dict[Place, tuple[int, int]]:
        """Partition → (offset that the group has finished, offset of what comes next). Raises Unavailable, or
        NotFound when somebody deleted the changelog: Faust would go on without its partitions, and say nothing."""
        async with self.topics.admin("asking how far the stream worker is") as admin:
            if changelog is not None and not await _count(admin, changelog):
                raise NotFound(f"the changelog {changelog} is gone", kind="topic", id=changelog)
            done = await admin.list_consumer_group_offsets(group)
            reader: Any = AIOKafkaConsumer(**self.link.client(), enable_auto_commit=False)
            await reader.start()
            try:
                places = [TopicPartition(self.link.name(topic), n)
                          for topic in sources for n in range(self.topics.partitions)]
                begins, ends = await reader.beginning_offsets(places), await reader.end_offsets(places)
            finally:
                await reader.stop()
        return {(tp.topic, tp.partition): (max(done[tp].offset if tp in done else 0, begins[tp]), ends[tp])
                for tp in places}


class Watchdog:
    """Sees with its own connection that work is there and is not done: a consumer may live on and be silent. Work
    of others is theirs for three times as long; then it is nobody's, and joining anew shares it out again."""

    def __init__(self, patience_s: float = SILENT_S, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._patience = now, patience_s
        self._stuck: dict[Place, tuple[int, float]] = {}

    def silent(self, behind: dict[Place, tuple[int, int]], mine: set[Place]) -> list[Place]:
        """Partitions with work, where nothing was finished for too long."""
        now, stuck = self._now(), {}
        for place, (done, end) in behind.items():
            if done < end:
                before, since = self._stuck.get(place, (done, now))
                stuck[place] = (done, since if before == done else now)
        self._stuck = stuck
        return sorted(place for place, (_, since) in stuck.items()
                      if now - since > self._patience * (1 if place in mine else 3))

    def rest(self) -> None:
        """Kafka is away: nobody can be blamed meanwhile."""
        self._stuck = {}


def partition_of(key: str, partitions: int) -> int:
    """Where every client of Kafka puts a key by default."""
    numbers = list(range(partitions))
    return int(DefaultPartitioner()(key.encode(), numbers, numbers))


async def _count(admin: AIOKafkaAdminClient, topic: str) -> int:
    """Partitions of a topic; 0: it is not there."""
    (about,) = await admin.describe_topics([topic])
    return len(about["partitions"]) if about["error_code"] == 0 else 0
