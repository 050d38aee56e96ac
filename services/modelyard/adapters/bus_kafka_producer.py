"""What writes to Kafka: acknowledged by all replicas, idempotent, and built anew after any failure."""

from __future__ import annotations

import asyncio

from aiokafka import AIOKafkaProducer, errors

from ..core.errors import TooLarge
from .bus_kafka_ends import abandon
from .bus_kafka_link import CONNECT_S, FAILURES, Attempt, Link
from .bus_kafka_topics import RECORD_BYTES

DELIVERY_S = 15.0
"""So long an idempotent producer may go on trying before its caller hears "may or may not"."""


class Producer:
    """One producer at a time, opened when it is first needed.

    A producer that failed once is not used again: with idempotence a batch that was given up has used a sequence
    number, so every later one of its partition is refused for good (aiokafka #1017). Consumers drop
    repeats.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._producer: AIOKafkaProducer | None = None
        self._attempt = Attempt()
        self._leaving: set[asyncio.Task[None]] = set()

    async def send(self, topic: str, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        """Stored by all replicas when it returns. Raises Unavailable when it may or may not be; TooLarge."""
        producer = await self._ready()
        try:
            async with asyncio.timeout(DELIVERY_S):
                await producer.send_and_wait(topic, value, key, headers=headers)
        except errors.MessageSizeTooLargeError as exc:
            raise TooLarge(f"an event of {len(value):,} bytes is more than the bus takes ({RECORD_BYTES:,})") from exc
        except FAILURES as exc:
            self._discard(producer)
            raise self._link.ours(exc, "an event may or may not have been published") from exc

    async def close(self) -> None:
        if self._producer is not None:
            self._discard(self._producer)
        await asyncio.gather(*self._leaving, return_exceptions=True)

    async def _ready(self) -> AIOKafkaProducer:
        if self._producer is not None:
            return self._producer
        async with self._attempt.alone():
            if self._producer is None:
                self._producer = await self._open()
            return self._producer

    async def _open(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            **self._link.client(), acks="all", enable_idempotence=True, linger_ms=0, max_batch_size=64 * 1024,
            max_request_size=RECORD_BYTES, compression_type=None)
        try:
            async with asyncio.timeout(CONNECT_S):
                await producer.start()
        except BaseException as exc:
            await abandon(producer)
            if not isinstance(exc, FAILURES):
                raise
            raise await self._link.why(exc, "events are not published") from exc
        return producer

    def _discard(self, producer: AIOKafkaProducer) -> None:
        """The next send builds another; this one's other senders hear of it at once."""
        if self._producer is not producer:
            return
        self._producer = None
        task = asyncio.create_task(abandon(producer), name="kafka producer that failed")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
