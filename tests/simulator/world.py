"""The yard of one seed: what lives on (documents, log, blobs, images, replicas) and the processes that come and go."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

from modelyard.core.documents import Document
from modelyard.core.events import Envelope
from modelyard.deployer import SERVICE as DEPLOYER
from modelyard.image_builder import SERVICE as BUILDER
from modelyard.image_builder.assemble import Result
from modelyard.image_builder.model import Image
from modelyard.kernel import letters
from modelyard.kernel.guard import Guard
from modelyard.kernel.idempotency import FORGET
from modelyard.kernel.run import Wakes, run_service
from modelyard.kernel.service import Context, Service
from modelyard.kernel.web import application, mount, web
from modelyard.registry import SERVICE as REGISTRY

from .bus import Log
from .clock import VirtualLoop
from .network import Network, peers
from .shaken import Process, Shaken, ShakenBus, Trace, Weather
from .store import MemoryStore, Shelf
from .target import Ground, MemoryTarget
from .things import MemoryBlobs, MemoryImages, NoGrants, Shed

TOKEN = "between-services"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Tally(Document):
    """How often each event of one subject had its effect, in the order of the effects."""

    kind: ClassVar[str] = "tally"
    effects: list[tuple[str, int, str]] = []


async def on_event(ctx: Context, event: Envelope) -> None:
    """A consumer as others write them: asks elsewhere, reads, changes, commits with the cause."""
    await ctx.blobs.stat("asked/first")
    id = f"{event.source}/{event.topic}/{event.subject}"
    old = await ctx.store.get(Tally, id, workspace=event.workspace)
    doc = old or Tally(id=id, workspace=event.workspace, created=ctx.now())
    effect = (event.topic, int(event.sequence), event.id)
    await ctx.commit(doc.evolve(effects=[*doc.effects, effect], updated=ctx.now()), cause=event.id)


TOPICS = ("model.registered", "model.updated", "model.deleted", "model.aliased", "image.requested", "image.built",
          "image.failed", "image.deleted", "deployment.requested", "deployment.ready", "deployment.updated",
          "deployment.deleted")
RECORDER = Service("recorder", (Tally,), (), lambda ctx: (), dict.fromkeys(TOPICS, on_event))
SERVICES = {s.name: s for s in (REGISTRY, BUILDER, DEPLOYER, RECORDER)}
INSTANCES = (
    "registry.0", "registry.1", "image-builder.0", "image-builder.1", "deployer.0", "recorder.0", "recorder.1")


class QuickBuild:
    """In place of ``image_builder.assemble.Build``, whose tools are programs: the same ports, two blobs, one manifest.
    What is around it (holds, phases, log, deletion meanwhile, giving up) is the real loop."""

    def __init__(self, ctx: Context, doc: Image, log: Any, scratch: Any) -> None:
        self.ctx, self.doc, self.log = ctx, doc, log

    async def run(self) -> Result:
        doc, put = self.doc, []
        for what in ("config", "layer"):
            data = json.dumps([what, doc.id, doc.models, doc.score]).encode()
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            await self.ctx.images.put_blob(doc.repo, digest, _once(data))
            put.append({"mediaType": what, "digest": digest, "size": len(data)})
            await self.log.line(what)
            await asyncio.sleep(0.7)
        body = json.dumps({"schemaVersion": 2, "config": put[0], "layers": put[1:]}).encode()
        digest = await self.ctx.images.put_manifest(doc.repo, doc.tag, body, MANIFEST)
        return Result(digest, len(body), put[0]["digest"], "3.11", signatures={}, served_as={})


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


class World:
    """Everything of one seed. ``weather`` is what the dice say; ``lives`` are the processes that run now."""

    def __init__(self, loop: VirtualLoop, seed: int, data: Path) -> None:
        self.loop, self.data = loop, data
        self.dice = random.Random(f"world {seed}")
        self.weather = Weather(random.Random(f"weather {seed}"))
        self.trace = Trace()
        self.network = Network(random.Random(f"network {seed}"))
        self.log = Log(random.Random(f"log {seed}"))
        self.shelves = {name: Shelf() for name in SERVICES}
        self.blobs: dict[str, bytes] = {}
        self.shed, self.ground = Shed(), Ground()
        self.lives: dict[str, Process] = {}
        self.buried: list[Any] = []
        self.faults: list[str] = []
        self.poisoned = 0

    async def start(self, name: str) -> None:
        """A new life of an instance."""
        service = SERVICES[name.rpartition(".")[0]]
        process = Process(name, self.weather, self.trace)
        self.lives[name] = process
        ctx, bus, wakes = self._context(service, process)
        self.buried.append(ctx)  # ids of objects are keys in places: no later one may get the same
        if service is not RECORDER:
            self.network.listen(service.name, process, await _application(service, ctx))
        running = replace(service, loops=(*service.loops, FORGET))
        task = self.loop.create_task(run_service(ctx, running, cast(Any, bus), wakes), name=name)
        task.add_done_callback(lambda done: self._ended(process, done))
        process.tasks.add(task)
        self.trace.note(f"{name} starts")

    def _context(self, service: Service, process: Process) -> tuple[Context, ShakenBus, Wakes]:
        def shaken(port: Any, name: str) -> Any:
            return Shaken(port, name, process)

        wakes = Wakes()
        ctx = Context(
            service=service.name, store=shaken(MemoryStore(self.shelves[service.name]), "store"),
            blobs=shaken(MemoryBlobs(self.blobs), "blobs"), images=shaken(MemoryImages(self.shed), "images"),
            grants=shaken(NoGrants(), "grants"), targets={"local": shaken(MemoryTarget(self.ground), "target")},
            peers=peers(self.network, process, SERVICES, TOKEN), data=self.data / process.name.replace(".", "-"),
            wake=wakes.wake, now=self.loop.now)
        return ctx, ShakenBus(self.log, process), wakes

    def _ended(self, process: Process, done: asyncio.Task[Any]) -> None:
        if not process.dead and not done.cancelled():
            self.faults.append(f"{process.name} ended by itself: {done.exception()!r}")

    async def crash(self, name: str) -> None:
        """Everything of it stops where it is. The broker hears of it after a while, as by a session that ends."""
        process = self.lives.pop(name)
        process.dead = True
        self.trace.note(f"{name} CRASHES")
        self.network.gone(process)
        for member in process.members:
            self.loop.call_later(self.dice.uniform(0.0, 12.0), self.log.leave, member)
        await _ended(*process.tasks)

    async def stop(self) -> None:
        """All end as by SIGTERM: leases are given back."""
        for process in list(self.lives.values()):
            await _ended(*process.tasks)
        self.lives.clear()
        await _ended(*(asyncio.all_tasks() - {asyncio.current_task()}))


async def _ended(*tasks: Any) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _application(service: Service, ctx: Context) -> web.Application:
    app = application(Guard({service.name}, service_token=TOKEN))
    mount(app, service.routes(ctx), ctx)
    mount(app, letters.internal_routes(service), ctx, owner="kernel")
    app._set_loop(asyncio.get_running_loop())
    app.on_startup.freeze()
    await app.startup()
    app.freeze()
    return app
