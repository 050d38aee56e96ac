"""EventBus on Kafka: a topic for each event type, a consumer group and a dead-letter topic for each service.

Records are structured CloudEvents JSON (``content-type: application/cloudevents+json``) with the partition key as key.
At least once: writes are acknowledged by all replicas, and what was finished is committed, never what was only
fetched. No Kafka transactions: an event's effect is once because the store remembers its cause.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

from ..core.errors import Invalid, Unavailable
from ..core.events import CONTENT_TYPE, TOPICS, Envelope
from ..ports.bus import Delivery, EventBus
from .bus_kafka_group import Member, Membership
from .bus_kafka_link import Link
from .bus_kafka_producer import Producer
from .bus_kafka_read import Reader
from .bus_kafka_topics import Topics

HEADERS = [("content-type", CONTENT_TYPE.encode())]


class KafkaBus(EventBus):
    """Opened by ``KafkaBus.open``. Nothing is connected before it is needed: a service starts with Kafka away."""

    def __init__(self, link: Link, topics: Topics, session_s: float, instance: str | None) -> None:
        self._link, self._topics, self._session_s, self._instance = link, topics, session_s, instance
        self._producer = Producer(link)
        self._reader = Reader(link, topics.partitions)

    @classmethod
    async def open(cls, url: str, *, partitions: int = 6, replication: int = 0, retention_days: float = 14.0,
                   session_s: float = 10.0, instance: str | None = None, security_protocol: str | None = None,
                   sasl_mechanism: str | None = None, cafile: str | None = None) -> KafkaBus:
        """``kafka://[USER:PASSWORD@]HOST:PORT[,HOST:PORT…][/PREFIX]``. Raises Invalid, saying what to do.

        ``partitions`` bounds how many members of a group work, and must be the same in all services. ``replication``:
        copies of each topic, the brokers' default unless given. A member that dies is succeeded after ``session_s``;
        with ``instance``, a name of its own for each process, a restart within that time moves nothing.
        """
        link = await Link.of(url, security_protocol, sasl_mechanism, cafile)
        if instance is not None:
            link.name(instance)
        return cls(link, Topics(link, partitions, replication, retention_days), session_s, instance)

    async def check(self) -> None:
        try:
            await self._topics.check(TOPICS, sorted(set(TOPICS.values())))
        except Invalid as exc:
            raise Unavailable(exc.message, code=exc.code) from exc

    async def close(self) -> None:
        await self._producer.close()
        await self._reader.close()

    async def publish(self, envelope: Envelope) -> None:
        await self._topics.declare((envelope.topic,))
        try:
            await self._producer.send(self._link.name(envelope.topic), envelope.partitionkey.encode(),
                                      envelope.encode(), HEADERS)
        except Unavailable:
            self._topics.forget()
            raise

    def subscribe(self, group: str, topics: Sequence[str]) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self._subscribed(group, tuple(dict.fromkeys(topics)))

    @contextlib.asynccontextmanager
    async def _subscribed(self, group: str, topics: tuple[str, ...]) -> AsyncIterator[AsyncIterator[Delivery]]:
        self._topics.forget()
        await self._topics.declare((*topics, f"dead.{group}"))
        member = Member(Membership(self._link, self._link.name(group), {self._link.name(t): t for t in topics},
                                   self._session_s, self._instance))
        await member.join()
        try:
            yield member
        finally:
            await member.leave()

    async def read(self, topics: Sequence[str], after: str = "end", limit: int = 100,
                   wait: float = 0.0) -> tuple[list[tuple[str, Envelope]], str]:
        if limit < 1:
            raise Invalid("limit must be at least 1", field="limit")
        known = tuple(dict.fromkeys((*TOPICS, *topics)))
        await self._topics.declare(known)
        return await self._reader.read(tuple(dict.fromkeys(topics)) or known, known, after, limit, wait)
