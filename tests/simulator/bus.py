"""A log in memory. A ``Log`` is the broker, which lives on; a ``MemoryBus`` is one process's connection to it."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from modelyard.core.errors import Invalid
from modelyard.core.events import Envelope
from modelyard.ports.bus import Delivery, EventBus

from .store import Bell

Lane = tuple[str, str]


@dataclass(frozen=True)
class Record:
    topic: str
    key: str
    raw: bytes
    origin: str


@dataclass
class Place:
    """How far a group is in one lane: ``done`` are acknowledged without a gap, ``next`` is handed out next."""

    owner: Member | None = None
    next: int = 0
    done: int = 0
    acked: set[int] = field(default_factory=set)

    def again(self) -> None:
        self.owner, self.next = None, self.done


@dataclass(eq=False)
class Member:
    group: Group
    topics: frozenset[str]


@dataclass
class Group:
    members: list[Member] = field(default_factory=list)
    places: dict[Lane, Place] = field(default_factory=lambda: defaultdict(Place))

    def owner(self, lane: Lane) -> Member | None:
        able = [m for m in self.members if lane[0] in m.topics]
        return able[zlib.crc32("/".join(lane).encode()) % len(able)] if able else None


class Log:
    """Topics, lanes (one for each topic and key) and the places of groups in them."""

    def __init__(self, dice: random.Random | None = None) -> None:
        self.dice = dice or random.Random(0)
        self.records: list[Record] = []
        self.lanes: dict[Lane, list[Record]] = defaultdict(list)
        self.groups: dict[str, Group] = defaultdict(Group)
        self.bell = Bell()

    def append(self, topic: str, key: str, raw: bytes) -> None:
        record = Record(topic, key, raw, f"{topic}[0]@{len(self.records)}")
        self.records.append(record)
        self.lanes[topic, key].append(record)
        self.bell.ring()

    def rebalance(self, name: str) -> None:
        """Everything that is open comes again, though its handlers may still be at it."""
        for place in self.groups[name].places.values():
            place.again()
        self.bell.ring()

    def leave(self, member: Member) -> None:
        if member in member.group.members:
            member.group.members.remove(member)
            for place in member.group.places.values():
                if place.owner is member:
                    place.again()
            self.bell.ring()


class MemoryBus(EventBus):
    def __init__(self, log: Log) -> None:
        self.log = log
        self.members: list[Member] = []

    async def check(self) -> None:
        return

    async def close(self) -> None:
        for member in self.members:
            self.log.leave(member)

    async def publish(self, envelope: Envelope) -> None:
        self.log.append(envelope.topic, envelope.partitionkey, envelope.encode())

    @asynccontextmanager
    async def subscribe(self, group: str, topics: Sequence[str]) -> AsyncIterator[AsyncIterator[Delivery]]:
        member = Member(self.log.groups[group], frozenset(topics))
        member.group.members.append(member)
        self.members.append(member)
        self.log.bell.ring()
        try:
            yield _Deliveries(self, member)
        finally:
            self.left(member)

    def left(self, member: Member) -> None:
        """A clean goodbye; of a process that died the broker hears later, by itself."""
        self.log.leave(member)

    async def next(self, member: Member) -> Delivery:
        """Waits for it; a wait that is given up takes nothing."""
        while (delivery := self._ready(member)) is None:
            await self.log.bell.event.wait()
        return delivery

    def _ready(self, member: Member) -> Delivery | None:
        lanes = [lane for lane in self.log.lanes if lane[0] in member.topics]
        self.log.dice.shuffle(lanes)
        for lane in lanes:
            place = member.group.places[lane]
            if place.owner is member and member.group.owner(lane) is not member and place.next == place.done:
                place.owner = None
                self.log.bell.ring()
            if place.owner is None and member.group.owner(lane) is member:
                place.again()
                place.owner = member
            if place.owner is member and place.next < len(self.log.lanes[lane]):
                place.next += 1
                return self._delivery(member, place, lane, place.next - 1)
        return None

    def _delivery(self, member: Member, place: Place, lane: Lane, at: int) -> Delivery:
        record = self.log.lanes[lane][at]

        async def ack() -> None:
            if place.owner is member:
                place.acked.add(at)
                while place.done in place.acked:
                    place.done += 1

        return Delivery(record.topic, record.key, record.raw, record.origin, ack)

    async def read(self, topics: Sequence[str], after: str = "end", limit: int = 100,
                   wait: float = 0.0) -> tuple[list[tuple[str, Envelope]], str]:
        at, end = self._cursor(after), asyncio.get_running_loop().time() + wait
        while True:
            found: list[tuple[str, Envelope]] = []
            while at < len(self.log.records) and len(found) < limit:
                record, at = self.log.records[at], at + 1
                if not topics or record.topic in topics:
                    try:
                        found.append((f"m{at}", Envelope.decode(record.raw)))
                    except Invalid:
                        continue
            rest = end - asyncio.get_running_loop().time()
            if found or rest <= 0:
                return found, f"m{at}"
            await self.log.bell.wait(rest)

    def _cursor(self, text: str) -> int:
        if text in ("beginning", "end"):
            return 0 if text == "beginning" else len(self.log.records)
        number = text[1:] if text[:1] == "m" and text[1:].isascii() and text[1:].isdigit() else ""
        if not number or int(number) > len(self.log.records):
            raise Invalid(f"'{text}' is not a cursor", field="after")
        return int(number)


class _Deliveries(AsyncIterator[Delivery]):
    def __init__(self, bus: MemoryBus, member: Member) -> None:
        self._bus, self._member = bus, member

    async def __anext__(self) -> Delivery:
        return await self._bus.next(self._member)
