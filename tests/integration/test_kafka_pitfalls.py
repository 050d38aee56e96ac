"""The pitfalls of aiokafka 0.14 that our Kafka bus must not fall into, each met on a real broker of the test's own.

C1–C11 are the names that the decision record on Kafka gives them.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from infra.stack.kafka import Kafka
from modelyard.adapters import bus_kafka, bus_kafka_group, bus_kafka_producer
from modelyard.adapters.bus_kafka_group import Member
from modelyard.adapters.urls import open_bus
from modelyard.core.errors import Invalid, TooLarge, Unavailable
from modelyard.core.events import Envelope
from modelyard.ports.bus import Delivery, EventBus
from tests.contract.bus_worker import event

pytestmark = pytest.mark.slow
ADAPTERS = Path(bus_kafka.__file__).parent
TOPIC = "model.registered"
prefixes = count()


@pytest.fixture
def url(kafka: Kafka) -> str:
    return f"{kafka.url}/p{next(prefixes)}?partitions=3&session_s=6"


@pytest.fixture
async def bus(url: str) -> AsyncIterator[bus_kafka.KafkaBus]:
    opened = await open_bus(url)
    assert isinstance(opened, bus_kafka.KafkaBus)
    yield opened
    await opened.close()


async def take(deliveries: AsyncIterator[Delivery], number: int, within: float = 20.0) -> list[int]:
    """The numbers of the next deliveries, acknowledged."""
    found = []
    async with asyncio.timeout(within):
        while len(found) < number:
            delivery = await anext(deliveries)
            found.append(Envelope.decode(delivery.raw).data["n"])
            await delivery.ack()
    return found


async def log_of(bus: EventBus) -> list[Envelope]:
    found: list[Envelope] = []
    place = "beginning"
    while True:
        records, place = await bus.read([TOPIC], place, 500)
        if not records:
            return found
        found += [e for _, e in records]


def generation(member: AsyncIterator[Delivery]) -> int:
    """Raised by the broker at each rebalance of the group."""
    assert isinstance(member, Member)
    return int(member._consumer._coordinator.generation)


async def test_c1_nothing_is_left_to_the_drivers_defaults(bus: bus_kafka.KafkaBus) -> None:
    await bus.publish(event(1))
    producer = bus._producer._producer
    assert producer is not None
    assert producer._sender._acks == -1
    assert producer._txn_manager is not None and producer._txn_manager.producer_id >= 0, "idempotent"
    async with bus.subscribe("g", [TOPIC]) as member:
        assert isinstance(member, Member)
        consumer = member._consumer
        assert (consumer._enable_auto_commit, consumer._auto_offset_reset) == (False, "earliest")
        assert consumer._isolation_level == "read_committed"
        assert consumer._rebalance_timeout_ms == 20_000 > consumer._session_timeout_ms == 6_000
        assert await take(member, 1) == [1]


async def test_c2_what_was_fetched_and_not_finished_is_never_committed(bus: EventBus) -> None:
    for number in range(6):
        await bus.publish(event(number, key="one"))
    async with bus.subscribe("g", [TOPIC]) as member:
        async with asyncio.timeout(20):
            taken = [await anext(member) for _ in range(6)]
        for delivery in (taken[0], *taken[2:]):
            await delivery.ack()
        await asyncio.sleep(0.5)  # what it would commit by itself, it has
    async with bus.subscribe("g", [TOPIC]) as member:
        assert await take(member, 5) == [1, 2, 3, 4, 5]


async def test_c3_a_handler_longer_than_the_poll_limit_costs_no_membership(
        bus: EventBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_kafka_group, "POLL_S", 1.0)
    for number in range(300):  # more than a partition's window: it is paused, and polled all the same
        await bus.publish(event(number, key="one"))
    async with bus.subscribe("g", [TOPIC]) as member:
        before = generation(member)
        async with asyncio.timeout(20):
            delivery = await anext(member)
        await asyncio.sleep(3.0)
        await delivery.ack()
        assert await take(member, 299) == list(range(1, 300))
        assert generation(member) == before


async def test_c4_a_consumer_that_fell_silent_is_noticed_and_built_anew(
        bus: EventBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_kafka_group, "SILENT_S", 1.0)
    monkeypatch.setattr(bus_kafka_group, "LOOK_EVERY_S", 0.3)
    async with bus.subscribe("g", [TOPIC]) as member:
        await bus.publish(event(1))
        assert await take(member, 1) == [1]
        assert isinstance(member, Member)
        member._consumer._fetcher._fetch_task.cancel()
        await bus.publish(event(2))
        with pytest.raises(Unavailable, match="built anew"):
            await take(member, 1)
    async with bus.subscribe("g", [TOPIC]) as member:
        assert await take(member, 1) == [2]


async def test_c5_a_static_member_that_restarts_moves_nothing(url: str) -> None:
    """There is no cooperative rebalance, so the way to avoid one is a name of one's own (``instance``)."""
    first, second = await open_bus(f"{url}&instance=a"), await open_bus(f"{url}&instance=b")
    async with first.subscribe("g", [TOPIC]) as staying:
        async with second.subscribe("g", [TOPIC]):
            await until(lambda: len(staying._consumer.assignment()) < 3)  # type: ignore[attr-defined]
        before = generation(staying)
        async with second.subscribe("g", [TOPIC]) as again:
            await asyncio.sleep(2.0)  # two heartbeats: a rebalance would show
            assert generation(staying) == generation(again) == before
    await first.close()
    await second.close()


async def until(what: Any, within: float = 20.0) -> None:
    async with asyncio.timeout(within):
        while not what():
            await asyncio.sleep(0.05)


def skip_a_number(producer: AIOKafkaProducer, topic: str) -> None:
    """What a batch that was given up leaves behind: its sequence numbers are used, and the broker never saw them."""
    for partition in range(3):
        producer._txn_manager.increment_sequence_number(TopicPartition(topic, partition), 5)


async def test_c6_a_wedged_producer_is_built_anew(bus: bus_kafka.KafkaBus, url: str, kafka: Kafka) -> None:
    await bus.publish(event(1, key="one"))
    assert bus._producer._producer is not None
    skip_a_number(bus._producer._producer, bus._link.name(TOPIC))
    with pytest.raises(Unavailable, match="may or may not"):
        await bus.publish(event(2, key="one"))
    async with asyncio.timeout(5):
        await bus.publish(event(3, key="one"))
    assert [e.data["n"] for e in await log_of(bus)] == [1, 3]


async def test_c6_the_bare_driver_stays_wedged(bus: bus_kafka.KafkaBus, kafka: Kafka) -> None:
    """When this fails, aiokafka #1017 is mended, and the rebuilding may go."""
    await bus.publish(event(1))
    topic = bus._link.name(TOPIC)
    bare = AIOKafkaProducer(bootstrap_servers=f"127.0.0.1:{kafka.port}", enable_idempotence=True, acks="all")
    await bare.start()
    await bare.send_and_wait(topic, b"1", b"k")
    skip_a_number(bare, topic)
    for _ in range(3):
        with pytest.raises(KafkaError):
            await bare.send_and_wait(topic, b"2", b"k")
    await bare.stop()


async def test_c7_a_send_that_raised_may_have_been_stored(bus: EventBus, kafka: Kafka,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    await bus.publish(event(1, key="one"))
    monkeypatch.setattr(bus_kafka_producer, "DELIVERY_S", 1.0)
    sent = event(2, key="one")
    kafka.freeze()
    try:
        with pytest.raises(Unavailable, match="may or may not"):
            await bus.publish(sent)
    finally:
        kafka.thaw()
    await asyncio.sleep(1.0)  # the frozen broker gets to what lay in its socket
    monkeypatch.setattr(bus_kafka_producer, "DELIVERY_S", 15.0)
    await bus.publish(sent)
    ids = [e.id for e in await log_of(bus)]
    assert ids[1:] == [sent.id, sent.id], "it was stored though it raised: a repeat has the same id"


async def test_c8_there_are_no_kafka_transactions(bus: bus_kafka.KafkaBus) -> None:
    await bus.publish(event(1))
    assert bus._producer._producer is not None
    assert bus._producer._producer._txn_manager.transactional_id is None
    source = "".join(path.read_text() for path in ADAPTERS.glob("bus_kafka*.py"))
    assert "transactional_id" not in source and "begin_transaction" not in source


async def test_c9_order_of_a_key_survives_the_retries_of_a_restart(bus: EventBus, kafka: Kafka) -> None:
    await bus.publish(event(0, key="one"))
    publishing = [asyncio.create_task(bus.publish(event(n, key="one"))) for n in range(1, 200)]
    await asyncio.sleep(0.005)
    kafka.kill()
    publishing += [asyncio.create_task(bus.publish(event(n, key="one"))) for n in range(200, 400)]
    await asyncio.to_thread(kafka.start)
    done = await asyncio.gather(*publishing, return_exceptions=True)
    assert not [d for d in done if d is not None], "an idempotent producer outlasts a restart"
    numbers = [e.data["n"] for e in await log_of(bus)]
    assert numbers == list(range(400)), "in order, each once"


async def test_c10_no_api_version_is_ever_given(bus: EventBus) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        await bus.check()
        await bus.publish(event(1))
        async with bus.subscribe("g", [TOPIC]) as member:
            assert await take(member, 1) == [1]
    assert not any("api_version=" in path.read_text() for path in ADAPTERS.glob("bus_kafka*.py"))


async def test_c11_the_trace_travels_in_the_event_and_nothing_is_patched(bus: bus_kafka.KafkaBus, kafka: Kafka) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await bus.publish(event(1).model_copy(update={"traceparent": trace}))
    reader = AIOKafkaConsumer(bus._link.name(TOPIC), bootstrap_servers=f"127.0.0.1:{kafka.port}",
                              auto_offset_reset="earliest")
    await reader.start()
    async with asyncio.timeout(20):
        record = await reader.getone()
    await reader.stop()
    assert record.headers == (("content-type", b"application/cloudevents+json"),)
    assert record.key == b"default/m1"
    assert Envelope.decode(record.value).traceparent == trace
    assert AIOKafkaProducer.send.__module__ == "aiokafka.producer.producer"


# What a cluster may be like --------------------------------------------------------------------------------------


async def test_a_topic_with_another_partition_count_is_named_with_the_fix(url: str, bus: EventBus) -> None:
    await bus.publish(event(1))
    other = await open_bus(url.replace("partitions=3", "partitions=5"))
    for doing in (other.publish(event(2)), other.read([TOPIC], "beginning")):
        with pytest.raises(Invalid, match=r"has 3 partitions where 5 are set.*partitions=3"):
            await doing
    with pytest.raises(Invalid, match="has 3 partitions"):
        async with other.subscribe("g", [TOPIC]):
            pass
    with pytest.raises(Unavailable, match="has 3 partitions"):
        await other.check()
    await bus.check()
    await bus.read([], "beginning")  # no topic was made by the wrong one
    await other.close()


async def test_a_service_has_a_dead_letter_topic_of_its_own(bus: bus_kafka.KafkaBus) -> None:
    async with bus.subscribe("registry", [TOPIC]):
        pass
    async with bus._topics.admin("asking") as admin:
        names = await admin.list_topics()
    assert bus._link.name("dead.registry") in names


async def test_an_event_that_is_too_large_is_refused_and_the_bus_goes_on(bus: EventBus) -> None:
    with pytest.raises(TooLarge, match="8,388,608"):
        await bus.publish(event(1, blob="x" * 9_000_000))
    await bus.publish(event(2, blob="x" * 8_000_000))
    async with bus.subscribe("g", [TOPIC]) as member:
        assert await take(member, 1) == [2]


async def test_no_broker_at_the_address_is_one_clear_line(kafka: Kafka) -> None:
    lost = await open_bus("kafka://127.0.0.1:1/x")
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"no Kafka broker answers at 127\.0\.0\.1:1; start it, or correct bus="):
        await lost.check()
    done = await asyncio.gather(*(lost.publish(event(n)) for n in range(200)), return_exceptions=True)
    assert all(isinstance(d, Unavailable) for d in done)
    assert time.monotonic() - began < 10, "two hundred publishers wait for one attempt, not in a row"
    await lost.close()
