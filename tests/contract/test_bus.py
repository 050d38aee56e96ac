"""What every EventBus promises."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from modelyard.adapters.urls import open_bus
from modelyard.core.errors import Invalid
from modelyard.core.events import Envelope
from modelyard.ports.bus import Delivery, EventBus
from tests.backends import Backend, backends, url_of
from tests.contract.bus_worker import event

WORKER = Path(__file__).with_name("bus_worker.py")
TOPICS = ["model.registered", "model.updated", "image.built", "image.failed"]


@pytest.fixture(params=backends("bus"))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    backend: Backend = request.param
    return url_of(backend, tmp_path)


@pytest.fixture
async def bus(url: str) -> AsyncIterator[EventBus]:
    opened = await open_bus(url)
    yield opened
    await opened.close()


async def take(deliveries: AsyncIterator[Delivery], count: int, *, ack: bool = True,
               within: float = 20.0) -> list[Delivery]:
    """The next ``count`` deliveries; fails when they do not come."""
    taken: list[Delivery] = []
    async with asyncio.timeout(within):
        while len(taken) < count:
            delivery = await anext(deliveries)
            taken.append(delivery)
            if ack:
                await delivery.ack()
    return taken


async def nothing_more(deliveries: AsyncIterator[Delivery], wait: float = 0.3) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(wait):
            delivery = await anext(deliveries)
            pytest.fail(f"delivered again: {delivery.origin}")


def numbers(deliveries: Iterable[Delivery]) -> list[int]:
    return [Envelope.decode(d.raw).data["n"] for d in deliveries]


def by_key(deliveries: Iterable[Delivery]) -> dict[tuple[str, str], list[int]]:
    lanes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for delivery in deliveries:
        lanes[delivery.topic, delivery.key].append(Envelope.decode(delivery.raw).data["n"])
    return lanes


async def mixed(bus: EventBus, count: int) -> list[Envelope]:
    """Published: topics and keys interleaved at random."""
    sent = [event(n, topic=random.choice(TOPICS), key=f"k{random.randint(0, 9)}") for n in range(count)]
    for envelope in sent:
        await bus.publish(envelope)
    return sent


# Delivery --------------------------------------------------------------------------------------------------------


async def test_a_new_group_sees_everything_from_the_beginning(bus: EventBus) -> None:
    sent = await mixed(bus, 60)
    for group in ("a", "b"):
        async with bus.subscribe(group, TOPICS) as deliveries:
            got = await take(deliveries, 60)
            assert sorted(numbers(got)) == list(range(60))
            assert {Envelope.decode(d.raw).id for d in got} == {e.id for e in sent}
            await nothing_more(deliveries)


async def test_a_delivery_tells_where_it_comes_from(bus: EventBus) -> None:
    await bus.publish(event(5, key="iris:4"))
    async with bus.subscribe("g", TOPICS) as deliveries:
        (got,) = await take(deliveries, 1)
    assert (got.topic, got.key) == ("model.registered", "default/iris:4")
    assert got.origin.startswith("model.registered[") and "]@" in got.origin


async def test_order_holds_for_each_topic_and_key(bus: EventBus) -> None:
    async def publish_all() -> None:
        lanes = [(topic, f"k{k}", list(range(25))) for topic in TOPICS for k in range(4)]
        while lanes:
            topic, key, rest = random.choice(lanes)
            await bus.publish(event(rest.pop(0), topic=topic, key=key))
            lanes = [lane for lane in lanes if lane[2]]

    async with bus.subscribe("g", TOPICS) as deliveries:
        publishing = asyncio.create_task(publish_all())
        lanes = by_key(await take(deliveries, 400))
        await publishing
    assert len(lanes) == 16
    assert all(found == list(range(25)) for found in lanes.values())


async def test_only_the_topics_asked_for_arrive(bus: EventBus) -> None:
    sent = await mixed(bus, 40)
    wanted = [e.data["n"] for e in sent if e.topic == "image.built"]
    async with bus.subscribe("g", ["image.built"]) as deliveries:
        assert sorted(numbers(await take(deliveries, len(wanted)))) == wanted
        await nothing_more(deliveries)


async def test_deliveries_of_different_keys_are_open_at_once(bus: EventBus) -> None:
    for number in range(50):
        await bus.publish(event(number, key=f"k{number}"))
    async with bus.subscribe("g", TOPICS) as deliveries:
        got = await take(deliveries, 50, ack=False)
        for delivery in reversed(got):
            await delivery.ack()
        await nothing_more(deliveries)
    async with bus.subscribe("g", TOPICS) as deliveries:
        await nothing_more(deliveries)


async def test_many_more_than_a_window_arrive(bus: EventBus) -> None:
    for start in range(0, 3000, 100):
        await asyncio.gather(*(bus.publish(event(n, key=f"k{n}")) for n in range(start, start + 100)))
    open_: list[Delivery] = []
    seen: list[int] = []
    async with bus.subscribe("g", TOPICS) as deliveries, asyncio.timeout(30):
        async for delivery in deliveries:
            seen += numbers([delivery])
            open_.append(delivery)
            if len(open_) > 20:
                await open_.pop(random.randrange(len(open_))).ack()
            if len(seen) == 3000:
                break
    assert sorted(seen) == list(range(3000))


# Acknowledgement, death and succession ---------------------------------------------------------------------------


async def test_what_was_acknowledged_does_not_come_again(url: str) -> None:
    for expected in (range(10), range(10, 20)):
        bus = await open_bus(url)
        for number in expected:
            await bus.publish(event(number))
        async with bus.subscribe("g", TOPICS) as deliveries:
            assert sorted(numbers(await take(deliveries, 10))) == list(expected)
            await nothing_more(deliveries)
        await bus.close()


async def test_what_was_not_acknowledged_comes_again_in_order_after_reopening(url: str) -> None:
    bus = await open_bus(url)
    for number in range(40):
        await bus.publish(event(number, key=f"k{number % 4}"))
    async with bus.subscribe("g", TOPICS) as deliveries:
        got = await take(deliveries, 40, ack=False)
        acked = {n for d, n in zip(got, numbers(got), strict=True) if n < 20}
        for delivery, number in zip(got, numbers(got), strict=True):
            if number in acked:
                await delivery.ack()
    await bus.close()
    again = await open_bus(url)
    async with again.subscribe("g", TOPICS) as deliveries:
        lanes = by_key(await take(deliveries, 20))
        await nothing_more(deliveries)
    await again.close()
    assert lanes == {("model.registered", f"default/k{k}"): list(range(20 + k, 40, 4)) for k in range(4)}


async def test_a_gap_in_the_acknowledgements_is_delivered_again(bus: EventBus) -> None:
    for number in range(10):
        await bus.publish(event(number, key="one"))
    async with bus.subscribe("g", TOPICS) as deliveries:
        got = await take(deliveries, 10, ack=False)
        for delivery in [*got[:3], *got[4:]]:
            await delivery.ack()
    async with bus.subscribe("g", TOPICS) as deliveries:
        again = numbers(await take(deliveries, 1))
        assert again == [3]  # what follows may come again as well, in order


@asynccontextmanager
async def members(url: str, count: int) -> AsyncIterator[list[tuple[EventBus, AsyncIterator[Delivery]]]]:
    async with AsyncExitStack() as stack:
        joined = []
        for _ in range(count):
            bus = await open_bus(url)
            stack.push_async_callback(bus.close)
            joined.append((bus, await stack.enter_async_context(bus.subscribe("g", TOPICS))))
        yield joined


@pytest.mark.slow
async def test_two_members_share_the_work(url: str) -> None:
    async with members(url, 2) as ((first_bus, first), (_, second)):
        got: dict[int, list[Delivery]] = {0: [], 1: []}

        async def work(who: int, deliveries: AsyncIterator[Delivery]) -> None:
            async for delivery in deliveries:
                got[who].append(delivery)
                await delivery.ack()

        tasks = [asyncio.create_task(work(n, d)) for n, d in enumerate((first, second))]
        async with asyncio.timeout(30):  # until both have their part
            number = 0
            while not (got[0] and got[1]):
                await bus_publish(first_bus, number)
                number += 1
        await asyncio.sleep(0.5)
        got[0].clear()
        got[1].clear()
        lanes = [(topic, f"k{k}", list(range(10))) for topic in TOPICS for k in range(20)]
        while lanes:
            topic, key, rest = random.choice(lanes)
            await first_bus.publish(event(rest.pop(0), topic=topic, key=key))
            lanes = [lane for lane in lanes if lane[2]]
        async with asyncio.timeout(20):
            while len(got[0]) + len(got[1]) < 800:
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    a, b = by_key(got[0]), by_key(got[1])
    assert a and b and not set(a) & set(b)
    assert all(found == list(range(10)) for found in (*a.values(), *b.values()))


async def bus_publish(bus: EventBus, number: int) -> None:
    await bus.publish(event(number, key=f"w{number}", topic=TOPICS[number % 4]))
    await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_who_leaves_hands_over_what_is_open(url: str) -> None:
    async with members(url, 2) as ((first_bus, first), (_, second)):
        bus = await open_bus(url)
        async with bus.subscribe("g", TOPICS) as third:
            for number in range(60):
                await first_bus.publish(event(number, key=f"k{number % 12}"))
            held = await take(third, 5, ack=False, within=30)
        await bus.close()
        wanted = set(numbers(held))
        found: set[int] = set()

        async def drain(deliveries: AsyncIterator[Delivery]) -> None:
            async for delivery in deliveries:
                await delivery.ack()
                found.update(numbers([delivery]))

        tasks = [asyncio.create_task(drain(d)) for d in (first, second)]
        async with asyncio.timeout(20):
            while not wanted <= found or len(found) < 60:
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_cancelled_wait_takes_nothing(bus: EventBus) -> None:
    async with bus.subscribe("g", TOPICS) as deliveries:
        for number in range(5):
            await nothing_more(deliveries, 0.05)
            await bus.publish(event(number))
            assert numbers(await take(deliveries, 1)) == [number]


async def test_cancel_leaves_no_task(url: str) -> None:
    before = asyncio.all_tasks()
    bus = await open_bus(url)
    opened = asyncio.all_tasks()

    async def consume() -> None:
        async with bus.subscribe("g", TOPICS) as deliveries:
            async for _ in deliveries:
                pass

    working = asyncio.create_task(consume())
    reading = asyncio.create_task(bus.read([], "end", wait=60))
    await asyncio.sleep(0.2)
    for task in (working, reading):
        task.cancel()
    await asyncio.gather(working, reading, return_exceptions=True)
    assert asyncio.all_tasks() == opened
    await bus.close()
    await bus.close()
    assert asyncio.all_tasks() == before


# Processes -------------------------------------------------------------------------------------------------------


async def start(*args: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, str(WORKER), *args, stdout=asyncio.subprocess.PIPE)


async def lines(process: asyncio.subprocess.Process, count: int) -> list[str]:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return [(await process.stdout.readline()).decode().strip() for _ in range(count)]


async def kill(process: asyncio.subprocess.Process) -> list[str]:
    """SIGKILL; what it had still printed."""
    process.kill()
    assert process.stdout is not None
    rest = (await process.stdout.read()).decode().split()
    await process.wait()
    return rest


async def test_a_killed_member_is_succeeded_and_loses_nothing(url: str) -> None:
    bus = await open_bus(url)
    for number in range(60):
        await bus.publish(event(number))
    worker = await start("consume", url, "g", "20")
    first = [int(n) for n in (await lines(worker, 31))[1:]]
    await kill(worker)
    async with bus.subscribe("g", TOPICS) as deliveries:
        rest: list[int] = []
        async with asyncio.timeout(30):
            while set(first[:20]) | set(rest) < set(range(60)) or not set(first[20:]) <= set(rest):
                rest += numbers(await take(deliveries, 1))
    await bus.close()
    for key in range(7):
        lane = [n for n in rest if n % 7 == key]
        assert lane == sorted(lane)


async def test_a_killed_publisher_has_published_what_it_says(url: str) -> None:
    worker = await start("publish", url, "100000")
    said = await lines(worker, 50)
    said += await kill(worker)
    bus = await open_bus(url)
    found: list[int] = []
    place = "beginning"
    while True:
        records, place = await bus.read([], place, limit=500)
        if not records:
            break
        found += [envelope.data["n"] for _, envelope in records]
    await bus.publish(event(0))
    await bus.close()
    whole = [int(line) for line in said if line.isdigit()]
    assert set(whole) <= set(found)
    assert sorted(found) == list(range(len(found)))
    assert all(found[i] < found[j] for key in range(7) for i, j in pairwise(at for at, n in enumerate(found)
                                                                            if n % 7 == key))


async def test_an_event_of_another_process_arrives_at_once(url: str) -> None:
    bus = await open_bus(url)
    worker = await start("consume", url, "g", "1000")
    assert await lines(worker, 1) == ["joined"]
    waits = []
    for number in range(20):
        began = time.monotonic()
        await bus.publish(event(number))
        assert await lines(worker, 1) == [str(number)]
        waits.append(time.monotonic() - began)
    await kill(worker)
    await bus.close()
    assert sorted(waits)[10] < 0.25


# Read ------------------------------------------------------------------------------------------------------------


async def test_read_walks_the_log_by_cursors(bus: EventBus) -> None:
    assert await bus.read([], "beginning") == ([], (await bus.read([], "end"))[1])
    sent = await mixed(bus, 50)
    place, seen = "beginning", []
    cursors = []
    while True:
        records, place = await bus.read([], place, limit=7)
        if not records:
            break
        assert len(records) <= 7
        seen += [envelope for _, envelope in records]
        cursors += [cursor for cursor, _ in records]
    assert by_lane(seen) == by_lane(sent)
    for index in (0, 20, 49):
        records, _ = await bus.read([], cursors[index], limit=100)
        assert {e.id for _, e in records} == {e.id for e in seen[index + 1:]}
        assert by_lane([e for _, e in records]) == by_lane(seen[index + 1:])


def by_lane(events: list[Envelope]) -> dict[tuple[str, str], list[int]]:
    lanes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for envelope in events:
        lanes[envelope.topic, envelope.partitionkey].append(envelope.data["n"])
    return lanes


async def test_read_keeps_to_the_topics(bus: EventBus) -> None:
    sent = await mixed(bus, 50)
    wanted = ["image.built", "image.failed"]
    records, place = await bus.read(wanted, "beginning", limit=100)
    assert by_lane([e for _, e in records]) == by_lane([e for e in sent if e.topic in wanted])
    await bus.publish(event(99, topic="model.updated"))
    await bus.publish(event(100, topic="image.built"))
    records, _ = await bus.read(wanted, place, limit=100)
    assert [e.data["n"] for _, e in records] == [100]


async def test_read_from_the_end_sees_only_what_comes(bus: EventBus) -> None:
    await bus.publish(event(1))
    records, place = await bus.read([], "end")
    assert records == []
    await bus.publish(event(2))
    records, _ = await bus.read([], place)
    assert [e.data["n"] for _, e in records] == [2]


async def test_read_waits_for_the_first_record(bus: EventBus) -> None:
    _, end = await bus.read(["image.built"], "end")
    reading = asyncio.create_task(bus.read(["image.built"], end, wait=20))
    await asyncio.sleep(0.1)
    await bus.publish(event(1, topic="model.updated"))
    await asyncio.sleep(0.1)
    assert not reading.done()
    await bus.publish(event(2, topic="image.built"))
    async with asyncio.timeout(5):
        records, _ = await reading
    assert [e.data["n"] for _, e in records] == [2]
    began = time.monotonic()
    assert (await bus.read([], "end", wait=0.2))[0] == []
    assert 0.15 < time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["", "yesterday", "-1", "1.5", "9" * 40, "０"])
async def test_text_that_is_no_cursor_is_invalid(bus: EventBus, text: str) -> None:
    with pytest.raises(Invalid):
        await bus.read([], text)


async def test_reading_needs_no_group_and_takes_nothing_from_one(bus: EventBus) -> None:
    await bus.publish(event(1))
    await bus.read([], "beginning")
    async with bus.subscribe("g", TOPICS) as deliveries:
        assert numbers(await take(deliveries, 1)) == [1]
