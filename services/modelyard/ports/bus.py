"""EventBus: a log, not a queue."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from ..core.events import Envelope
from . import Port


@dataclass(frozen=True)
class Delivery:
    """One record handed to one member of a group. ``raw`` is undecoded: a poisoned record is delivered too.

    ``origin`` says where it lay (``topic[partition]@offset``), for the dead letter.
    """

    topic: str
    key: str
    raw: bytes
    origin: str
    ack: Callable[[], Awaitable[None]]


class EventBus(Port):
    """At-least-once publish and subscribe. Order holds per (topic, key) and nowhere else."""

    @abstractmethod
    async def publish(self, envelope: Envelope) -> None:
        """Durable when it returns. Raises Unavailable when it may or may not have been stored: publish again."""

    @abstractmethod
    def subscribe(self, group: str, topics: Sequence[str]) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Joins ``group``; the iterator waits for records and never ends by itself.

        A new group starts at the beginning of what is retained. Members share the work: a record goes to one
        of them. Several deliveries may be un-acked at once, of different keys; the next record of a
        (topic, key) may be handed out before the last is acked, and always after it. What was not acked when
        a member leaves or dies is delivered again, in order, to whoever takes over.
        Leaving the context leaves no task behind.
        """

    @abstractmethod
    async def read(
        self, topics: Sequence[str], after: str = "end", limit: int = 100, wait: float = 0.0
    ) -> tuple[list[tuple[str, Envelope]], str]:
        """Records behind the cursor ``after``, each with its own cursor, and the cursor to go on from.

        ``after`` is ``beginning``, ``end`` or a cursor from an earlier read of any topics (opaque text).
        No topics = all. Waits up to ``wait`` seconds for the first record. No group, no ack. Undecodable
        records are passed over. Raises Invalid for text that is not a cursor.
        """
