"""Fault 6: ten poisoned records of five kinds among a thousand on Kafka.

990 effects; ten dead letters that say cause, origin and attempts; no other key waits for them; what was mended is
handed over again, twice, and has its effect once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from aiokafka import AIOKafkaProducer

from infra.stack.kafka import Kafka
from modelyard.adapters.urls import open_bus
from modelyard.core.documents import Document
from modelyard.core.errors import AlreadyApplied, Conflict, Invalid, NotFound, TooLarge
from modelyard.core.events import Envelope
from modelyard.kernel.consume import DeadLetter, dead_letters, replay
from modelyard.kernel.service import Context, Service
from tests.backends import need
from tests.contract.bus_worker import event
from tests.integration.hosting import hosted

pytestmark = [pytest.mark.slow, pytest.mark.fault]
TOPIC, COUNT = "model.registered", 1000
POISON = {"bad JSON": 2, "wrong schema": 2, "unknown type": 2, "handler bug": 2, "oversize": 2}
LIMIT = 256 * 1024


class Effect(Document):
    kind: ClassVar[str] = "effect"


class Handler:
    """Has effects; fails on what it is made to fail on until it is mended."""

    def __init__(self) -> None:
        self.effects: Counter[int] = Counter()
        self.waits: dict[int, float] = {}
        self.mended = False

    async def __call__(self, ctx: Context, envelope: Envelope) -> None:
        number = envelope.data["n"]
        if envelope.data.get("bug") and not self.mended:
            raise KeyError("weights")
        if len(envelope.data.get("blob", "")) > LIMIT:
            raise TooLarge(f"more than {LIMIT:,} bytes")
        try:
            await ctx.commit(Effect(id=envelope.id), cause=envelope.id)
        except (AlreadyApplied, Conflict):
            return
        self.effects[number] += 1
        self.waits[number] = time.time() - envelope.time.timestamp()


def poisoned(kind: str, number: int) -> bytes:
    """A record as a foreign or broken program would write it."""
    good: dict[str, Any] = json.loads(event(number).encode())
    if kind == "bad JSON":
        return b'{"specversion": "1.0", "id"'
    if kind == "wrong schema":
        del good["source"]
    elif kind == "unknown type":
        good["type"] = "model.registered.v9"
    elif kind == "handler bug":
        good["data"]["bug"] = True
    else:
        good["data"]["blob"] = "x" * 3_000_000
    return json.dumps(good).encode()


async def write(kafka: Kafka, topic: str) -> None:
    """A thousand records at 200 a second, every hundredth poisoned, over fifty keys."""
    kinds = [kind for kind, times in POISON.items() for _ in range(times)]
    producer = AIOKafkaProducer(bootstrap_servers=f"127.0.0.1:{kafka.port}", acks="all", max_request_size=4_000_000)
    await producer.start()
    for number in range(COUNT):
        kind = kinds[number // 100] if number % 100 == 50 else None
        key = f"default/poison{number // 100}" if kind else f"default/k{number % 50}"
        body = poisoned(kind, number) if kind else event(number, key=f"k{number % 50}").encode()
        await producer.send_and_wait(topic, body, key.encode())
        await asyncio.sleep(0.003)
    await producer.stop()


async def letters_of(ctx: Context, count: int) -> list[DeadLetter]:
    async with asyncio.timeout(60):
        while len(found := await dead_letters(ctx.store)) < count:
            await asyncio.sleep(0.1)
    return found


async def test_poison_is_set_aside_with_its_story_and_delays_nobody(tmp_path: Path) -> None:
    need("kafka")
    handler = Handler()
    service = Service("telemetry", (Effect,), (), lambda ctx: (), {TOPIC: handler})
    with Kafka(tmp_path / "kafka") as kafka:
        url = f"{kafka.url}/yard"
        async with hosted(service, tmp_path / "telemetry", bus=url) as ctx:
            notices = await open_bus(url)
            await notices.publish(event(COUNT))
            async with asyncio.timeout(60):
                while not handler.effects:  # the topic is declared and the group has joined
                    await asyncio.sleep(0.05)
            handler.effects.clear()
            handler.waits.clear()
            await write(kafka, f"yard.{TOPIC}")
            letters = await letters_of(ctx, 10)
            async with asyncio.timeout(30):
                while len(handler.effects) < 990:
                    await asyncio.sleep(0.05)
            assert sum(handler.effects.values()) == 990
            assert max(handler.waits.values()) <= 2.0
            assert len(letters) == 10
            for letter in letters:
                assert letter.event.origin.startswith(f"{TOPIC}[") and "]@" in letter.event.origin
                assert letter.message and letter.first_failed <= letter.last_failed
            causes = Counter((letter.error, letter.attempts_made) for letter in letters)
            assert causes == {("invalid", 0): 6, ("KeyError", 4): 2, ("too-large", 1): 2}
            async with asyncio.timeout(20):
                while len(told := (await notices.read(["dead.telemetry"], "beginning", 100))[0]) < 10:
                    await asyncio.sleep(0.1)
            assert {e.subject for _, e in told} == {letter.id for letter in letters}
            await notices.close()


async def test_what_was_mended_is_redriven_twice_and_has_its_effect_once(tmp_path: Path) -> None:
    need("kafka")
    handler = Handler()
    service = Service("telemetry", (Effect,), (), lambda ctx: (), {TOPIC: handler})
    with Kafka(tmp_path / "kafka") as kafka:
        async with hosted(service, tmp_path / "telemetry", bus=f"{kafka.url}/yard") as ctx:
            bus = await open_bus(f"{kafka.url}/yard")
            sent = [event(number, key=f"k{number}", bug=True) for number in range(10)]
            for one in sent:
                await bus.publish(one)
            letters = await letters_of(ctx, 10)
            with pytest.raises(Invalid, match="failed again"):
                await replay(ctx, service, letters[0].id)
            handler.mended = True
            assert [await replay(ctx, service, letter.id) for letter in letters] == ["applied"] * 10
            for letter in letters:
                with pytest.raises(NotFound):
                    await replay(ctx, service, letter.id)
            for one in sent:  # and the records themselves once more
                await bus.publish(one)
            await bus.publish(event(99, key="last"))
            async with asyncio.timeout(20):
                while handler.effects[99] < 1:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)
            assert handler.effects == {**dict.fromkeys(range(10), 1), 99: 1}
            assert await dead_letters(ctx.store) == []
            await bus.close()
