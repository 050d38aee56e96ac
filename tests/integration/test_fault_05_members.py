"""Fault 5: three members of a group on Kafka, one killed or added every five seconds for a minute, 3,000 events.

Every event has its effect once, in order for each topic and key, whoever had its partition.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from infra.stack.kafka import Kafka
from modelyard.adapters.urls import open_store
from modelyard.core.documents import Range
from modelyard.ports.store import DocumentStore
from tests.backends import need
from tests.integration.kernel_worker import CONSUMER, TOPICS, Tally, bed

pytestmark = [pytest.mark.slow, pytest.mark.fault]
WORKER = Path(__file__).with_name("kernel_worker.py")
COUNT, SUBJECTS, RATE = 3000, 30, "55"
EVERY_S, FOR_S = 5.0, 60.0


class Crew:
    """Processes; members come and go."""

    def __init__(self, store: str, bus: str) -> None:
        self.store, self.env = store, {**os.environ, "MODELYARD_BUS": bus}
        self.members: list[asyncio.subprocess.Process] = []
        self.all: list[asyncio.subprocess.Process] = []

    async def start(self, *role: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(sys.executable, str(WORKER), role[0], self.store, *role[1:],
                                                       stdout=asyncio.subprocess.PIPE, env=self.env)
        self.all.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"ready\n"
        return process

    async def add(self) -> None:
        self.members.append(await self.start("consume"))

    async def kill(self) -> None:
        """The oldest."""
        oldest = self.members.pop(0)
        oldest.kill()
        await oldest.wait()

    async def end(self) -> None:
        for process in self.all:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def counted(store: DocumentStore) -> int:
    """Effects in the documents that are written last."""
    beds = await store.find(Tally, {"id": Range("bed-", "bed.")})
    return sum(len(lane) for doc in beds for lane in doc.seen.values())


async def test_members_come_and_go_and_every_effect_is_there_once_in_order(tmp_path: Path) -> None:
    need("kafka")
    store_url = f"sqlite://{tmp_path}/yard.db"
    with Kafka(tmp_path / "kafka") as kafka:
        store = await open_store(store_url, CONSUMER.name)
        crew = Crew(store_url, f"{kafka.url}/yard?session_s=6")
        try:
            async with asyncio.timeout(200):
                for _ in range(3):
                    await crew.add()
                await crew.start("produce", str(COUNT), str(SUBJECTS), RATE)
                end, killing = time.monotonic() + FOR_S, True
                while time.monotonic() < end:
                    await asyncio.sleep(EVERY_S)
                    await (crew.kill() if killing else crew.add())
                    killing = not killing
                while await counted(store) < COUNT:
                    await asyncio.sleep(0.2)
                await asyncio.sleep(1.0)  # a repeat would show
            assert await counted(store) == COUNT
            each = COUNT // SUBJECTS
            for number in range(SUBJECTS):
                doc, shared = await store.get(Tally, f"p{number}"), await store.get(Tally, bed(f"p{number}"))
                assert doc is not None and shared is not None
                assert set(doc.seen) == set(TOPICS)
                assert sorted(n for lane in doc.seen.values() for n in lane) == list(range(1, each + 1))
                assert all(lane == sorted(lane) for lane in doc.seen.values()), "an inversion"
                assert sorted(shared.seen[f"p{number}"]) == list(range(1, each + 1))
        finally:
            await crew.end()
            await store.close()
