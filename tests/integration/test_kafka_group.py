"""Members of a Kafka group among themselves, and when the broker does not answer; a broker of the test's own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import count

import pytest

from infra.stack.kafka import Kafka
from modelyard.adapters import bus_kafka_group
from modelyard.adapters.bus_kafka_group import Member
from modelyard.adapters.urls import open_bus
from modelyard.core.errors import Unavailable
from modelyard.core.events import Envelope
from modelyard.ports.bus import Delivery, EventBus
from tests.contract.bus_worker import event

pytestmark = pytest.mark.slow
TOPIC = "model.registered"
prefixes = count()


@pytest.fixture
def url(kafka: Kafka) -> str:
    return f"{kafka.url}/g{next(prefixes)}?partitions=4&session_s=6"


@pytest.fixture
async def bus(url: str) -> AsyncIterator[EventBus]:
    opened = await open_bus(url)
    yield opened
    await opened.close()


def number(delivery: Delivery) -> int:
    return int(Envelope.decode(delivery.raw).data["n"])


async def test_what_is_in_hand_when_partitions_are_dealt_anew_may_be_finished(bus: EventBus, url: str) -> None:
    """Ten slow handlers, another member joins: what they finish meanwhile does not come again to anybody."""
    for n in range(40):
        await bus.publish(event(n, key=f"k{n}"))
    seen: list[int] = []

    async def slowly(delivery: Delivery) -> None:
        await asyncio.sleep(1.5)
        seen.append(number(delivery))
        await delivery.ack()

    async def drain(member: AsyncIterator[Delivery]) -> None:
        async for delivery in member:
            seen.append(number(delivery))
            await delivery.ack()

    other = await open_bus(url)
    async with bus.subscribe("g", [TOPIC]) as first:
        async with asyncio.timeout(20):
            held = [await anext(first) for _ in range(10)]
        working = [asyncio.create_task(slowly(delivery)) for delivery in held]
        async with other.subscribe("g", [TOPIC]) as second:
            draining = [asyncio.create_task(drain(m)) for m in (first, second)]
            await asyncio.gather(*working)
            async with asyncio.timeout(20):
                while len(set(seen)) < 40:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)
            for task in draining:
                task.cancel()
            await asyncio.gather(*draining, return_exceptions=True)
    await other.close()
    assert sorted(seen) == list(range(40)), "each once"


async def test_a_key_that_is_never_finished_holds_up_its_partition_only(bus: EventBus) -> None:
    """A thousand events behind it fill its window; other partitions go on, and go on, and the group stays."""
    for start in range(0, 1000, 100):
        await asyncio.gather(*(bus.publish(event(n, key="stuck")) for n in range(start, start + 100)))
    others = [f"k{n}" for n in range(40)]
    seen: set[str] = set()
    async with bus.subscribe("g", [TOPIC]) as member, asyncio.timeout(30):
        stuck = (await anext(member)).origin.partition("@")[0]
        for key in others:
            await bus.publish(event(1, key=key))
        while len(seen) < 20:
            delivery = await anext(member)
            if delivery.key != "default/stuck":
                assert not delivery.origin.startswith(stuck)
                seen.add(delivery.key)
                await delivery.ack()
        assert isinstance(member, Member)
        (lane,) = (lane for lane in member._lanes.values() if f"{lane.topic}[{lane.partition}]" == stuck)
        assert lane.due() is None, "nothing of it may be committed"


async def test_one_instance_name_for_two_processes_is_told_of(
        url: str, caplog: pytest.LogCaptureFixture) -> None:
    first, second = await open_bus(f"{url}&instance=a"), await open_bus(f"{url}&instance=a")
    async with first.subscribe("g", [TOPIC]), second.subscribe("g", [TOPIC]), asyncio.timeout(60):
        while "does each process have an instance= of its own" not in caplog.text:
            await asyncio.sleep(0.1)
    await first.close()
    await second.close()


async def test_a_group_that_never_deals_its_partitions_is_joined_anew(
        bus: EventBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_kafka_group, "STUCK_S", 1.0)
    monkeypatch.setattr(bus_kafka_group, "LOOK_EVERY_S", 0.3)
    await bus.publish(event(1))
    async with bus.subscribe("g", [TOPIC]) as member:
        assert isinstance(member, Member)
        await member.give_up()  # as in a rebalance whose end never comes
        with pytest.raises(Unavailable, match="joined anew"):
            async with asyncio.timeout(20):
                await anext(member)
    async with bus.subscribe("g", [TOPIC]) as member, asyncio.timeout(20):
        assert number(await anext(member)) == 1


async def test_a_frozen_broker_is_told_of_and_joining_anew_goes_on(
        bus: EventBus, kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_kafka_group, "AWAY_S", 3.0)
    monkeypatch.setattr(bus_kafka_group, "LOOK_S", 1.0)
    await bus.publish(event(1))
    async with bus.subscribe("g", [TOPIC]) as member:
        async with asyncio.timeout(20):
            await (await anext(member)).ack()
        await asyncio.sleep(0.5)
        kafka.freeze()
        try:
            with pytest.raises(Unavailable, match="does not answer in time"):
                async with asyncio.timeout(30):
                    await anext(member)
        finally:
            kafka.thaw()
    thawed = time.monotonic()
    await bus.publish(event(2))
    async with bus.subscribe("g", [TOPIC]) as member:
        async with asyncio.timeout(30):
            assert number(await anext(member)) == 2
    assert time.monotonic() - thawed < 20
