"""The service as the kernel runs it: an event on the bus, segments in the store, and everything else by itself."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from modelyard.core.events import Envelope
from modelyard.core.layout import segment_key
from modelyard.kernel.run import run_service
from modelyard.telemetry import SERVICE
from modelyard.telemetry.model import Process, Segment
from tests.conftest import House, OpenHouse
from tests.unit.telemetry.bench import Life

REQUESTED = Envelope(
    id="e1", source="/modelyard/deployer", type="deployment.requested.v1", subject="iris", time=datetime.now(UTC),
    partitionkey="default/iris", sequence=f"{1:020d}",
    data={"name": "iris", "image": "iris-scorer:7", "capture": {"enabled": True, "retention_days": 30}})


@asynccontextmanager
async def running(h: House) -> AsyncIterator[None]:
    task = asyncio.create_task(run_service(h.ctx, SERVICE, h.bus, h.wakes))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(what: Callable[[], Awaitable[object]], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not await what():
        assert time.monotonic() < end, "waited too long"
        await asyncio.sleep(0.02)


async def ship(h: House, life: Life) -> None:
    number, raw = life.segment()

    async def once() -> AsyncIterator[bytes]:
        yield raw

    await h.ctx.blobs.put(segment_key("default", life.deployment, life.replica, number), once())


async def test_from_event_to_events(house: OpenHouse) -> None:
    life = Life()
    async with house("telemetry") as h:
        await h.bus.publish(REQUESTED)
        async with running(h):
            await ship(h, life.record(datetime.now(UTC)))
            await until(lambda: h.store.find(Segment))
            records, _ = await h.bus.read(["capture.closed"], "beginning", wait=10)
            assert [e.subject for _, e in records] == ["iris:0-1a2b3c4d:0"]
        await ship(h, life.record(datetime.now(UTC)).end(datetime.now(UTC)))
    async with house("telemetry") as h, running(h):
        async def complete() -> bool:
            found = await h.store.find(Process)
            return bool(found) and found[0].state == "complete"

        await until(complete)
        assert [b.key async for b in h.ctx.blobs.list("capture/iris/.segments/")] == []
