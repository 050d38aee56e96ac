"""What the stream worker needs beside Faust: its watchdog blames only what has work and finishes none of it."""

import pytest

pytest.importorskip("aiokafka", reason="modelyard[kafka] is not installed")

from modelyard.adapters import urls
from modelyard.adapters.bus_kafka_stream import Watchdog, partition_of
from modelyard.core.errors import Invalid

ONE, TWO = ("capture.closed", 0), ("capture.closed", 1)


def test_it_speaks_when_nothing_is_finished_for_too_long() -> None:
    clock = [0.0]
    dog = Watchdog(45, lambda: clock[0])
    seen = []
    for clock[0] in range(0, 100, 5):
        if dog.silent({ONE: (3, 9), TWO: (int(clock[0]), 1000)}, {ONE, TWO}):
            seen.append(clock[0])
    assert seen[0] == 50 and dog.silent({ONE: (3, 9)}, {ONE}) == [ONE]


def test_no_work_no_share_and_no_kafka_are_no_fault() -> None:
    clock = [0.0]
    dog = Watchdog(45, lambda: clock[0])
    for clock[0] in range(0, 140, 5):
        assert dog.silent({ONE: (9, 9), TWO: (0, 9)}, {ONE}) == []
    clock[0] += 1
    assert dog.silent({ONE: (9, 9), TWO: (0, 9)}, {ONE}) == [TWO], "nobody has it"
    assert dog.silent({ONE: (9, 10)}, {ONE}) == []
    dog.rest()
    clock[0] += 100
    assert dog.silent({ONE: (9, 10)}, {ONE}) == [], "it begins to wait when Kafka is back"


@pytest.mark.parametrize(("key", "murmur2"), [("21", -973932308), ("foobar", -790332482)])
def test_a_key_lies_where_every_client_puts_it(key: str, murmur2: int) -> None:
    """The hashes are those of Kafka's own tests of its Java client."""
    assert partition_of(key, 1000) == (murmur2 & 0x7FFFFFFF) % 1000


async def test_a_bus_that_is_no_kafka_is_refused_with_what_to_set() -> None:
    with pytest.raises(Invalid, match=r"needs bus=kafka://HOST:PORT .*not from sqlite:///var/yard\.db"):
        await urls.open_stream("sqlite:///var/yard.db")
