"""What lies between a process and everything else: delay, outage before or after the work, conflict, and death.

A dead process does nothing any more: whatever its tasks still try while they are being cancelled ends there.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from modelyard.core.errors import Conflict, Unavailable
from modelyard.ports.bus import Delivery

from .bus import Log, Member, MemoryBus


@dataclass
class Weather:
    """How bad it is: chances for each call, and what is wholly away now (``bus``, ``store`` …)."""

    dice: random.Random
    fail: float = 0.0
    after: float = 0.0
    conflict: float = 0.0
    twice: float = 0.0
    stall: float = 0.0
    slow_s: float = 0.01
    away: set[str] = field(default_factory=set)

    def heal(self) -> None:
        self.fail = self.after = self.conflict = self.twice = self.stall = 0.0
        self.away.clear()

    def delay(self) -> float:
        if self.stall and self.dice.random() < self.stall:
            return self.dice.uniform(5.0, 40.0)  # long enough for every lease to lapse
        return self.dice.uniform(0.0, self.slow_s)


class Trace:
    """What happened, in order: the last lines to read, all of it as a hash."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=400)
        self.hash = hashlib.sha256()
        self.steps = 0

    def note(self, text: str) -> None:
        line = f"{asyncio.get_running_loop().time():10.4f} {text}"
        self.lines.append(line)
        self.hash.update(line.encode())
        self.steps += 1


@dataclass(eq=False)
class Process:
    """One life of one instance. ``dead`` is final: the next life is another Process."""

    name: str
    weather: Weather
    trace: Trace
    dead: bool = False
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    members: list[Member] = field(default_factory=list)

    def alive(self) -> None:
        if self.dead:
            raise asyncio.CancelledError(f"{self.name} is dead")

    async def around(self, what: str, port: str, work: Any) -> Any:
        """``work()`` (a coroutine function) with the weather in front of it and behind."""
        self.alive()
        await asyncio.sleep(self.weather.delay())
        self.alive()
        if port in self.weather.away or self.weather.dice.random() < self.weather.fail:
            self.trace.note(f"{self.name} {what} is away")
            raise Unavailable(f"the {port} is away")
        try:
            result = await work()
        except Exception as exc:
            self.trace.note(f"{self.name} {what} {type(exc).__name__}")
            raise
        self.alive()
        self.trace.note(f"{self.name} {what}")
        await asyncio.sleep(self.weather.delay())
        self.alive()
        if self.weather.dice.random() < self.weather.after:
            self.trace.note(f"{self.name} {what} was done and nobody is told")
            raise Unavailable(f"the {port} went away")
        return result


class Shaken:
    """Any port of one process: what is awaited meets the weather, what is iterated passes as it is."""

    def __init__(self, port: Any, name: str, process: Process) -> None:
        self._port, self._name, self._process = port, name, process

    def __getattr__(self, method: str) -> Any:
        found = getattr(self._port, method)
        if not inspect.iscoroutinefunction(found):
            return found

        async def call(*args: Any, **kwargs: Any) -> Any:
            if method == "pending":  # it waits, and is the relay's heartbeat
                self._process.alive()
                return await found(*args, **kwargs)
            if method == "commit" and self._process.weather.dice.random() < self._process.weather.conflict:
                raise Conflict("somebody was faster")
            return await self._process.around(f"{self._name}.{method} {_about(args)}", self._name,
                                              lambda: found(*args, **kwargs))

        return call


class ShakenBus(Shaken):
    """Publishes twice now and then; a death is not a goodbye."""

    _port: MemoryBus

    def __init__(self, log: Log, process: Process) -> None:
        super().__init__(MemoryBus(log), "bus", process)
        self._log = log
        self._port.left = self._left  # type: ignore[method-assign]

    def _left(self, member: Member) -> None:
        if not self._process.dead:
            self._log.leave(member)

    async def publish(self, envelope: Any) -> None:
        async def work() -> None:
            await self._port.publish(envelope)
            if self._process.weather.dice.random() < self._process.weather.twice:
                await self._port.publish(envelope)

        await self._process.around(f"bus.publish {envelope.type} {envelope.subject}", "bus", work)

    @asynccontextmanager
    async def subscribe(self, group: str, topics: Any) -> AsyncIterator[AsyncIterator[Delivery]]:
        self._process.alive()
        if "bus" in self._process.weather.away:
            raise Unavailable("the bus is away")
        async with self._port.subscribe(group, topics) as deliveries:
            self._process.members = self._port.members
            yield self._passed(deliveries)

    async def _passed(self, deliveries: AsyncIterator[Delivery]) -> AsyncIterator[Delivery]:
        async for d in deliveries:
            self._process.alive()
            if "bus" in self._process.weather.away:
                raise Unavailable("the bus went away")
            self._process.trace.note(f"{self._process.name} gets {d.origin}")
            yield Delivery(d.topic, d.key, d.raw, d.origin, self._acking(d))

    def _acking(self, d: Delivery) -> Any:
        async def ack() -> None:
            await self._process.around(f"bus.ack {d.origin}", "bus", d.ack)

        return ack


def _about(args: tuple[Any, ...]) -> str:
    words = []
    for arg in args[:2]:
        if hasattr(arg, "kind") and hasattr(arg, "id"):
            words.append(f"{arg.kind} {arg.id} r{getattr(arg, 'revision', '')}")
        elif isinstance(arg, str):
            words.append(arg)
        elif isinstance(arg, type):
            words.append(getattr(arg, "kind", arg.__name__))
    return " ".join(words)
