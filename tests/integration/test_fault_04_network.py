"""Fault 4: the broker stands still for 25 s; the network to each server is a black hole, is cut and is slow, while
models are registered and images built. Nothing is lost, nothing is done twice, nobody restarts anything; and while
only Kafka is away the registry answers as ever."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest

from infra.stack.azurite import Azurite
from infra.stack.kafka import Kafka
from infra.stack.mongo import Mongo
from infra.stack.registry import Registry
from infra.stack.server import Server, free_port
from modelyard.core.documents import Document
from modelyard.core.events import Envelope
from modelyard.kernel.service import Context, Service
from tests.backends import need
from tests.e2e.yard import Yard
from tests.integration.hosting import hosted
from tests.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.fault]
SERVERS: dict[str, type[Server]] = {"kafka": Kafka, "mongo": Mongo, "azure": Azurite, "registry": Registry}
RATE, AGES_S = 15.0, {"freeze": 8.0, "cut": 5.0, "slow": 5.0}
FROZEN_S, CALM_S, WITHIN_S = 25.0, 3.0, 60.0
SCORE = b"def run(data):\n    return data\n"
LOCK = b"# nothing\n"


class Effects(Document):
    """The events of one subject whose effect was had, in order."""

    kind: ClassVar[str] = "effects"
    had: list[tuple[int, str]] = []


async def on_event(ctx: Context, event: Envelope) -> None:
    id = f"{event.topic} {event.subject}"
    doc = await ctx.store.get(Effects, id) or Effects(id=id)
    await ctx.commit(doc.evolve(had=[*doc.had, (int(event.sequence), event.id)]), cause=event.id)


TOPICS = ("model.registered", "image.requested", "image.built", "image.failed")
RECORDER = Service("recorder", (Effects,), (), lambda ctx: (), dict.fromkeys(TOPICS, on_event))


@dataclass
class Load:
    """Registrations at an even pace and builds one after the other, each repeated under its key until answered."""

    yard: Yard
    http: aiohttp.ClientSession
    models: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    first: list[tuple[float, float, int]] = field(default_factory=list)
    """(when, seconds, status) of the first try of each registration."""

    async def call(self, service: str, method: str, path: str, body: Any = None, key: str = "") -> dict[str, Any]:
        raw, kind = (body, "application/octet-stream") if isinstance(body, bytes) else (
            None if body is None else json.dumps(body), "application/json")
        headers = {"content-type": kind, **({"idempotency-key": key} if key else {})}
        while True:
            began, status = time.monotonic(), 0
            try:
                async with self.http.request(method, self.yard.url(service) + path, data=raw,
                                             headers=headers) as answer:
                    status, text = answer.status, await answer.text()
                    if status < 300:
                        return dict(json.loads(text)) if text else {}
                    assert status in (409, 503), text
            except (aiohttp.ClientError, TimeoutError):
                status = 0
            finally:
                if path == "/v1/models" and not headers.get("x-again"):
                    self.first.append((began, time.monotonic() - began, status))
            headers["x-again"] = "1"
            await asyncio.sleep(0.2)

    async def artifact(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        await self.call("registry", "PUT", f"/v1/artifacts/{digest}", data)
        return digest

    async def register(self, n: int, digest: str) -> None:
        spec = {"name": f"m{n % 20}", "artifact": digest, "framework": "custom"}
        self.models.add((await self.call("registry", "POST", "/v1/models", spec, f"m-{n}"))["id"])

    async def registering(self, over: asyncio.Event, digest: str) -> None:
        async with asyncio.TaskGroup() as group:
            n, began = 0, time.monotonic()
            while not over.is_set():
                group.create_task(self.register(n, digest))
                n += 1
                await asyncio.sleep(max(0.0, began + n / RATE - time.monotonic()))

    async def building(self, over: asyncio.Event, score: str, lock: str) -> None:
        n = 0
        while not over.is_set():
            n += 1
            image = await self.call("image-builder", "POST", "/v1/images",
                                    {"name": f"img-{n % 5}", "score": score, "lock": lock}, f"i-{n}")
            while image["phase"] not in ("ready", "failed"):
                image = await self.call("image-builder", "GET", f"/v1/images/{image['id']}?wait=5")
            assert image["phase"] == "ready", image
            self.images.add(image["id"])
            await asyncio.sleep(0.5)


@dataclass
class Stage:
    servers: dict[str, Server]
    wires: dict[str, Proxy]
    yard: Yard
    load: Load
    recorder: Context


@asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        servers: dict[str, Server] = {}
        wires: dict[str, Proxy] = {}
        for name, type_ in SERVERS.items():
            server = servers[name] = type_(folder / name, port=free_port())
            wire = wires[name] = stack.enter_context(Proxy(server.port))
            server.advertised = wire.port
            await asyncio.to_thread(server.start)
            stack.push_async_callback(asyncio.to_thread, server.stop)
        urls = {name: server.url.replace(f":{server.port}", f":{wires[name].port}") for name, server in servers.items()}
        settings = {"MODELYARD_BUS": f"{urls['kafka']}/yard", "MODELYARD_BLOBS": f"{urls['azure']}/yard",
                    "MODELYARD_STORE": urls["mongo"].replace("?", "yard?", 1), "MODELYARD_IMAGES": urls["registry"]}
        yard = await asyncio.to_thread(Yard.start, "apart", folder / "data", ("registry", "image-builder"), **settings)
        stack.push_async_callback(asyncio.to_thread, yard.stop)
        recorder = await stack.enter_async_context(hosted(RECORDER, folder / "recorder", bus=settings["MODELYARD_BUS"]))
        http = await stack.enter_async_context(aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30)))
        yield Stage(servers, wires, yard, Load(yard, http), recorder)


async def had(stage: Stage) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    after = None
    while page := await stage.recorder.store.find(Effects, after=after, limit=500):
        found |= {doc.id: doc.had for doc in page}
        after = (page[-1].id, page[-1].id)
    return found


async def weather(stage: Stage) -> list[tuple[str, float, float]]:
    """Every server's network in every way, and the broker standing still: (what, from, until)."""
    spans = []
    for name, wire in stage.wires.items():
        for way, seconds in AGES_S.items():
            began = time.monotonic()
            if way == "slow":
                wire.slow(0.1, 500_000)
            else:
                (wire.freeze if way == "freeze" else wire.cut)()
            await asyncio.sleep(seconds)
            wire.heal()
            spans.append((f"{name} {way}", began, time.monotonic()))
            await asyncio.sleep(CALM_S)
    began = time.monotonic()
    await asyncio.to_thread(stage.servers["kafka"].freeze)
    await asyncio.sleep(FROZEN_S)
    await asyncio.to_thread(stage.servers["kafka"].thaw)
    spans.append(("kafka stopped", began, time.monotonic()))
    return spans


async def test_a_bad_network_loses_nothing(tmp_path: Path) -> None:
    for name in SERVERS:
        need(name)
    async with stage(tmp_path) as here:
        load, over = here.load, asyncio.Event()
        digest, score, lock = [await load.artifact(data) for data in (b"weights", SCORE, LOCK)]
        pids = {name: process.pid for name, process in here.yard.processes.items()}
        async with asyncio.timeout(300), asyncio.TaskGroup() as group:
            group.create_task(load.registering(over, digest))
            group.create_task(load.building(over, score, lock))
            spans = await weather(here)
            over.set()
        healed = time.monotonic()
        wanted = {f"model.registered {id}" for id in load.models}
        wanted |= {f"{topic} {id}" for id in load.images for topic in ("image.requested", "image.built")}
        async with asyncio.timeout(WITHIN_S):
            while wanted - (await had(here)).keys():
                await asyncio.sleep(0.5)
        print(f"all effects {time.monotonic() - healed:.1f} s after the end; {len(load.models)} models, "
              f"{len(load.images)} images")
        assert {name: p.pid for name, p in here.yard.processes.items() if p.poll() is None} == pids
        check_effects(await had(here), wanted)
        await all_are_there(load)
    check_latency(load, spans)


def check_effects(found: dict[str, list[tuple[int, str]]], wanted: set[str]) -> None:
    """Each once; the numbers of each subject without a gap."""
    assert set(found) == wanted, sorted(set(found) ^ wanted)[:10]
    subjects: dict[str, list[int]] = defaultdict(list)
    for name, events in found.items():
        assert len(events) == 1, (name, events)
        topic, _, subject = name.partition(" ")
        subjects[topic.partition(".")[0] + subject].append(events[0][0])
    assert all(sorted(numbers) == list(range(1, len(numbers) + 1)) for numbers in subjects.values())


async def all_are_there(load: Load) -> None:
    listed: set[str] = set()
    after = ""
    while True:
        page = await load.call("registry", "GET", f"/v1/models?limit=500{after}")
        listed |= {item["id"] for item in page["items"]}
        if not page["next"]:
            break
        after = f"&after={page['next']}"
    assert listed == load.models, (len(listed), len(load.models))


def check_latency(load: Load, spans: list[tuple[str, float, float]]) -> None:
    """While only Kafka is away, whichever way, the registry answers as if it were there."""
    kafka: list[float] = []
    for what, began, end in spans:
        tries = [(seconds, status) for when, seconds, status in load.first if began <= when < end]
        seconds = sorted(s for s, _ in tries)
        p99 = seconds[int(len(seconds) * 0.99)]
        print(f"{what}: {len(tries)} POSTs, {sum(status != 201 for _, status in tries)} to be repeated, "
              f"p99 {1000 * p99:.0f} ms")
        if what.startswith("kafka"):
            kafka += seconds
            assert all(status == 201 for _, status in tries), what
    assert sorted(kafka)[int(len(kafka) * 0.99)] <= 0.250
