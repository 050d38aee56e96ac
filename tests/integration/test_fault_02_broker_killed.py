"""Fault 2: the broker is killed five times while 5,000 registrations go through; nobody restarts anything else.

The registry is the real program. A recorder on the bus keeps one document for each event, whose create makes a second
effect a Conflict: nothing is lost, nothing has its effect twice, the registry answers throughout.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from typing import ClassVar

import aiohttp
import pytest

from infra.stack.kafka import Kafka
from modelyard.core.documents import Document
from modelyard.core.errors import AlreadyApplied, Conflict
from modelyard.core.events import Envelope
from modelyard.kernel.service import Context, Service
from tests.backends import need
from tests.e2e.yard import Yard
from tests.integration.hosting import hosted

pytestmark = [pytest.mark.slow, pytest.mark.fault]
COUNT, RATE, KILLS = 5000, 70.0, 5
ARTIFACT = b"weights"


class Effect(Document):
    """One for each event."""

    kind: ClassVar[str] = "effect"


class Recorder:
    """What arrived: subject of the event → how often it had an effect; and when events of which age came."""

    def __init__(self) -> None:
        self.effects: dict[str, int] = {}
        self.arrived: list[tuple[float, float]] = []

    async def on_registered(self, ctx: Context, event: Envelope) -> None:
        try:
            await ctx.commit(Effect(id=event.id), cause=event.id)
        except (AlreadyApplied, Conflict):
            return
        self.effects[event.subject] = self.effects.get(event.subject, 0) + 1
        self.arrived.append((time.time(), event.time.timestamp()))


class Load:
    """Registrations at an even pace, whatever becomes of the others."""

    def __init__(self, url: str) -> None:
        self.url, self.digest = url, f"sha256:{hashlib.sha256(ARTIFACT).hexdigest()}"
        self.acknowledged: set[str] = set()
        self.failed: list[str] = []
        self.latencies: list[float] = []

    async def run(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            async with http.put(f"{self.url}/v1/artifacts/{self.digest}", data=ARTIFACT) as answer:
                assert answer.status < 300
            async with asyncio.TaskGroup() as group:
                began = time.monotonic()
                for n in range(COUNT):
                    await asyncio.sleep(max(0.0, began + n / RATE - time.monotonic()))
                    group.create_task(self._one(http, n))

    async def _one(self, http: aiohttp.ClientSession, n: int) -> None:
        began = time.monotonic()
        async with http.post(f"{self.url}/v1/models", json={"name": f"m{n % 50}", "artifact": self.digest}) as answer:
            body = await answer.json()
            self.latencies.append(time.monotonic() - began)
            if answer.status == 201:
                self.acknowledged.add(body["id"])
            else:
                self.failed.append(str(body))


async def kills(kafka: Kafka, recorder: Recorder) -> list[float]:
    """Kills and starts the broker; for each kill the seconds until an event committed after it had its effect."""
    recovered = []
    for _ in range(KILLS):
        await asyncio.sleep(3.0)
        killed = time.time()
        await asyncio.to_thread(kafka.kill)
        await asyncio.to_thread(kafka.start)
        async with asyncio.timeout(60):
            while not any(committed > killed for _, committed in reversed(recorder.arrived)):
                await asyncio.sleep(0.05)
        recovered.append(time.time() - killed)
    return recovered


async def test_nothing_is_lost_and_the_registry_answers(tmp_path: Path) -> None:
    need("kafka")
    recorder = Recorder()
    service = Service("recorder", (Effect,), (), lambda ctx: (), {"model.registered": recorder.on_registered})
    with Kafka(tmp_path / "kafka") as kafka:
        bus = f"{kafka.url}/yard"
        yard = await asyncio.to_thread(Yard.start, "apart", tmp_path / "data", ("registry",), MODELYARD_BUS=bus)
        try:
            async with hosted(service, tmp_path / "recorder", bus=bus):
                pid, load = yard.processes["registry"].pid, Load(yard.url("registry"))
                async with asyncio.timeout(240), asyncio.TaskGroup() as group:
                    group.create_task(load.run())
                    killing = group.create_task(kills(kafka, recorder))
                async with asyncio.timeout(30):
                    while len(recorder.effects) < COUNT:
                        await asyncio.sleep(0.1)
                assert yard.processes["registry"].poll() is None and yard.processes["registry"].pid == pid
        finally:
            await asyncio.to_thread(yard.stop)
    slowest, p99 = max(killing.result()), sorted(load.latencies)[int(COUNT * 0.99)]
    print(f"recoveries {[round(s, 1) for s in killing.result()]} s, POST p99 {1000 * p99:.0f} ms")
    assert not load.failed and len(load.acknowledged) == COUNT
    assert set(recorder.effects) == load.acknowledged, "lost or invented"
    assert set(recorder.effects.values()) == {1}
    assert slowest <= 30.0
    assert p99 <= 0.250
