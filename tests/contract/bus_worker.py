"""A process of its own for the bus suite: ``publish URL N`` or ``consume URL GROUP ACKS``; a line for each step."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime

from modelyard.adapters.urls import open_bus
from modelyard.core.events import Envelope, event_id


def event(number: int, *, key: str | None = None, topic: str = "model.registered", **data: object) -> Envelope:
    subject = key or f"m{number % 7}"
    return Envelope(id=event_id(), source="/modelyard/registry", type=f"{topic}.v1", subject=subject,
                    time=datetime.now(UTC), partitionkey=f"default/{subject}", sequence=f"{number:020d}",
                    data={"n": number, **data})


async def publish(url: str, count: int) -> None:
    bus = await open_bus(url)
    for number in range(count):
        await bus.publish(event(number))
        print(number, flush=True)
    await bus.close()


async def consume(url: str, group: str, acks: int) -> None:
    """Acknowledges the first ``acks`` deliveries and only takes the others."""
    bus = await open_bus(url)
    async with bus.subscribe(group, ["model.registered"]) as deliveries:
        print("joined", flush=True)
        taken = 0
        async for delivery in deliveries:
            taken += 1
            print(Envelope.decode(delivery.raw).data["n"], flush=True)
            if taken <= acks:
                await delivery.ack()


if __name__ == "__main__":
    what, url, *rest = sys.argv[1:]
    if what == "publish":
        asyncio.run(publish(url, int(rest[0])))
    else:
        asyncio.run(consume(url, rest[0], int(rest[1])))
