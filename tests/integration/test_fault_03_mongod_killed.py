"""Fault 3: mongod is killed three times during 1,000 registrations. Every acknowledged one is there, none twice, and
writes resume within 15 s of its restart."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from infra.stack.mongo import Mongo
from modelyard.adapters.urls import open_bus
from tests.backends import need
from tests.e2e.test_journey import upload
from tests.e2e.yard import Yard, until

pytestmark = [pytest.mark.slow, pytest.mark.fault]
REGISTRATIONS, NAMES, KILLS, CALLERS, RESUME_S = 1_000, 50, 3, 8, 15.0


@dataclass
class Told:
    """What the registry acknowledged: registration → model, and when it last did."""

    models: dict[int, str] = field(default_factory=dict)
    newest: float = 0.0


async def register(http: aiohttp.ClientSession, url: str, n: int, artifact: str, told: Told) -> None:
    """Until it is acknowledged: whatever is no answer, or 5xx, is asked again under the same key."""
    body = {"name": f"m{n % NAMES}", "artifact": artifact, "tags": {"n": str(n)}}
    while True:
        try:
            async with http.post(f"{url}/v1/models", json=body, headers={"idempotency-key": f"r{n}"}) as answer:
                if answer.status < 500 and answer.status != 409:
                    assert answer.status == 201, await answer.text()
                    told.models[n] = (await answer.json())["id"]
                    told.newest = time.monotonic()
                    return
        except (aiohttp.ClientError, TimeoutError):
            pass
        await asyncio.sleep(0.05)  # the database is away; the next try decides


async def load(url: str, artifact: str, told: Told) -> None:
    todo = iter(range(REGISTRATIONS))

    async def caller(http: aiohttp.ClientSession) -> None:
        for n in todo:
            await register(http, url, n, artifact, told)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http, asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(caller(http))


async def kill(mongo: Mongo, yard: Yard, told: Told) -> list[float]:
    """Three times: SIGKILL, not ready while it is away, started again; the seconds until the next acknowledgement."""
    resumed = []
    for count in range(1, KILLS + 1):
        while len(told.models) < count * REGISTRATIONS // (KILLS + 1):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(mongo.kill)
        await asyncio.to_thread(until, lambda: ready(yard) == 503, 10, why="not ready without a database")
        assert yard.processes["registry"].poll() is None
        await asyncio.to_thread(mongo.start)
        began = time.monotonic()
        while told.newest < began:
            assert time.monotonic() - began < 2 * RESUME_S, "nothing was acknowledged any more"
            await asyncio.sleep(0.01)
        resumed.append(told.newest - began)
        await asyncio.to_thread(until, lambda: ready(yard) == 200, 15, why="ready again")
    return resumed


def ready(yard: Yard) -> int:
    return yard.call("GET", "/readyz", service="registry").status


def all_models(yard: Yard) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = yard.call("GET", f"/v1/models?limit=200{after}").json
        found += page["items"]
        if not page["next"]:
            return found
        after = f"&after={page['next']}"


async def registered(url: str) -> Counter[str]:
    """How many different events told of each model's registration."""
    bus = await open_bus(url)
    try:
        records, _ = await bus.read(["model.registered"], "beginning", limit=10_000)
        return Counter(subject for subject, _ in {(e.subject, e.id) for _, e in records})
    finally:
        await bus.close()


def test_a_killed_database_loses_and_doubles_nothing(tmp_path: Path) -> None:
    need("mongo")
    with Mongo(tmp_path / "mongo") as mongo:
        yard = Yard.start("apart", tmp_path / "data", ("registry",), MODELYARD_STORE=mongo.url)
        try:
            artifact, told = upload(yard, b"weights"), Told()

            async def run() -> list[float]:
                work = asyncio.create_task(load(yard.url("registry"), artifact, told))
                kills = asyncio.create_task(kill(mongo, yard, told))
                await asyncio.gather(work, kills)
                return kills.result()

            began = time.monotonic()
            resumed = asyncio.run(asyncio.wait_for(run(), 180))
            print(f"\n{REGISTRATIONS} registrations, {KILLS} kills: {time.monotonic() - began:.1f} s; writes resumed "
                  f"after {', '.join(f'{s:.2f}' for s in resumed)} s")
            assert max(resumed) <= RESUME_S
            models = all_models(yard)
            assert sorted(told.models.values()) == sorted(m["id"] for m in models)  # all there, and none more
            assert sorted(int(m["tags"]["n"]) for m in models) == list(range(REGISTRATIONS))
            each = REGISTRATIONS // NAMES
            assert {m["id"] for m in models} == {f"m{n}:{v + 1}" for n in range(NAMES) for v in range(each)}
            url = f"sqlite://{yard.data}/yard.db"
            until(lambda: len(asyncio.run(registered(url))) == REGISTRATIONS, 15, every=0.3, why="every event is out")
            assert set(asyncio.run(registered(url)).values()) == {1}
        finally:
            assert yard.stop() == []
