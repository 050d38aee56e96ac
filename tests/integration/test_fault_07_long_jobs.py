"""Fault 7: twenty jobs, each longer than the consumer's poll limit, on Kafka: no rebalance, each done once.

A handler only records the job; a leased loop does it, as builds and deployments are done.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
from aiokafka import AIOKafkaConsumer

from infra.stack.kafka import Kafka
from modelyard.adapters import bus_kafka_group
from modelyard.adapters.bus_kafka_group import Membership
from modelyard.adapters.urls import open_bus
from modelyard.core.documents import Document
from modelyard.core.errors import AlreadyApplied, Conflict
from modelyard.core.events import Envelope
from modelyard.kernel.service import Change, Context, Loop, Service
from tests.backends import need
from tests.contract.bus_worker import event
from tests.integration.hosting import hosted

pytestmark = [pytest.mark.slow, pytest.mark.fault]
JOBS, PARALLEL = 20, 10
POLL_S, JOB_S, LEASE_S = 3.0, 9.0, 3.0
"""The limit is scaled from five minutes; a job outlasts it and its own lease three times."""


class Job(Document):
    kind: ClassVar[str] = "job"
    indexed: ClassVar[frozenset[str]] = frozenset({"phase"})
    phase: str = "queued"


class Work:
    """What was done, how often; and the memberships that there were."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.consumers: list[AIOKafkaConsumer] = []

    async def on_requested(self, ctx: Context, envelope: Envelope) -> None:
        try:
            await ctx.commit(Job(id=envelope.subject, due=datetime.now(UTC)), cause=envelope.id)
        except (AlreadyApplied, Conflict):
            return
        ctx.wake("work")

    async def work(self, ctx: Context, job: Job) -> Change[Job]:
        await asyncio.sleep(JOB_S)
        self.done[job.id] += 1
        return lambda newest: (newest.evolve(phase="done", due=None), ())


def listening(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    """Every consumer that is made is kept, to be asked how often its group was dealt anew."""
    make = Membership.consumer

    def made(how: Membership) -> AIOKafkaConsumer:
        work.consumers.append(make(how))
        return work.consumers[-1]

    monkeypatch.setattr(Membership, "consumer", made)
    monkeypatch.setattr(bus_kafka_group, "POLL_S", POLL_S)


async def test_a_job_longer_than_the_poll_limit_costs_no_rebalance(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    need("kafka")
    work = Work()
    listening(monkeypatch, work)
    loop = Loop("work", Job, work.work, {"phase": "queued"}, parallel=PARALLEL, lease_s=LEASE_S)
    service = Service("builder", (Job,), (), lambda ctx: (), {"image.requested": work.on_requested}, (loop,))
    with Kafka(tmp_path / "kafka") as kafka:
        async with hosted(service, tmp_path / "builder", bus=f"{kafka.url}/yard?session_s=6") as ctx:
            bus = await open_bus(f"{kafka.url}/yard")
            await until_joined(work)
            generation = work.consumers[0]._coordinator.generation
            for number in range(JOBS):
                await bus.publish(event(number, key=f"job{number}", topic="image.requested"))
            async with asyncio.timeout(JOB_S * JOBS / PARALLEL + 30):
                while len(await done_of(ctx)) < JOBS:
                    await asyncio.sleep(0.2)
            assert work.done == dict.fromkeys((f"job{n}" for n in range(JOBS)), 1)
            assert len(work.consumers) == 1, "the consumer was built anew"
            assert work.consumers[0]._coordinator.generation == generation, "the group was dealt anew"
            await bus.close()


async def until_joined(work: Work) -> None:
    async with asyncio.timeout(30):
        while not (work.consumers and work.consumers[0].assignment()):
            await asyncio.sleep(0.05)


async def done_of(ctx: Context) -> list[Any]:
    return await ctx.store.find(Job, {"phase": "done"}, limit=JOBS)
