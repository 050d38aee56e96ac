"""The kernel under SIGKILL: a producer and two consumers over one SQLite file, killed again and again.

At the end every event had its effect once, in order for its topic and key, and none is lost.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest

from modelyard.adapters.urls import open_bus, open_store
from modelyard.core.documents import Range
from modelyard.ports.store import DocumentStore
from tests.integration.kernel_worker import CONSUMER, TOPICS, Plant, Tally, bed

WORKER = Path(__file__).with_name("kernel_worker.py")
COUNT, SUBJECTS, KILLS = 3000, 30, 10
pytestmark = pytest.mark.slow


class Crew:
    """Processes that are replaced when they are killed."""

    def __init__(self, url: str) -> None:
        self.roles = [("produce", url, str(COUNT), str(SUBJECTS), "400"), ("consume", url), ("consume", url)]
        self.crew: list[asyncio.subprocess.Process] = []

    async def start(self, role: tuple[str, ...]) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(sys.executable, str(WORKER), *role,
                                                       stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"ready\n"
        return process

    async def __aenter__(self) -> Crew:
        self.crew = [await self.start(role) for role in self.roles]
        return self

    async def kill(self, who: int) -> None:
        self.crew[who].kill()
        await self.crew[who].wait()
        self.crew[who] = await self.start(self.roles[who])

    async def __aexit__(self, *exc: object) -> None:
        for process in self.crew:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def counted(consumer: DocumentStore) -> int:
    """Effects in the documents that are written last."""
    beds = await consumer.find(Tally, {"id": Range("bed-", "bed.")})
    return sum(len(lane) for doc in beds for lane in doc.seen.values())


async def test_every_event_has_its_effect_once_under_sigkill(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/yard.db"
    consumer, producer = await open_store(url, CONSUMER.name), await open_store(url, "registry")
    try:
        async with asyncio.timeout(150), Crew(url) as crew:
            for kill in range(KILLS):
                await asyncio.sleep(random.uniform(0.2, 1.0))
                await crew.kill(kill % 3)
            while await counted(consumer) < COUNT:
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.5)  # a repeat would show
        each = COUNT // SUBJECTS
        assert await counted(consumer) == COUNT
        for number in range(SUBJECTS):
            doc, plant = await consumer.get(Tally, f"p{number}"), await producer.get(Plant, f"p{number}")
            assert doc is not None and plant is not None
            assert (plant.number, plant.sequence) == (each, each)
            assert sorted(n for lane in doc.seen.values() for n in lane) == list(range(1, each + 1))
            assert set(doc.seen) == set(TOPICS)
            assert all(lane == sorted(lane) for lane in doc.seen.values())
            shared = await consumer.get(Tally, bed(f"p{number}"))
            assert shared is not None and sorted(shared.seen[f"p{number}"]) == list(range(1, each + 1))
        assert await producer.pending(1) == []
    finally:
        await consumer.close()
        await producer.close()
    bus = await open_bus(url)
    lanes: dict[str, list[int]] = {}
    place = "beginning"
    while True:
        records, place = await bus.read([], place, limit=1000)
        if not records:
            break
        for _, envelope in records:
            lanes.setdefault(envelope.subject, []).append(int(envelope.sequence))
    await bus.close()
    assert len(lanes) == SUBJECTS
    for lane in lanes.values():
        assert list(dict.fromkeys(lane)) == list(range(1, each + 1))  # repeats may be, gaps and inversions not
