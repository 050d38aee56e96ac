"""A tiny real service, and a yard of two of them: what the kernel's web rules are tried on, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.bus_sqlite import SqliteBus
from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.store_sqlite import SqliteStore
from modelyard.core.documents import Document
from modelyard.core.errors import Conflict, InUse, Invalid, NotFound, Unavailable
from modelyard.core.events import Envelope, Fact
from modelyard.kernel.forward import Peers
from modelyard.kernel.guard import LOCAL_HOSTS, Guard
from modelyard.kernel.run import Wakes, run_service
from modelyard.kernel.server import Hosted, Server, build
from modelyard.kernel.service import Context, Service
from modelyard.kernel.web import Call, Route, reply

SERVICE_TOKEN = "between-services"


class PlantSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[StrictStr, Field(min_length=2, max_length=20)]
    height: Annotated[int, Field(ge=1)] = 1
    tags: dict[StrictStr, StrictStr] = {}


class Plant(Document):
    kind: ClassVar[str] = "plant"
    indexed: ClassVar[frozenset[str]] = frozenset({"name", "height", "tags", "phase"})
    hidden: ClassVar[frozenset[str]] = frozenset({"secret"})

    name: str
    height: int = 1
    tags: dict[str, str] = {}
    phase: str = "seed"
    secret: str = "soil"


@dataclass
class Soil:
    """What a test looks at and turns: how often handlers ran, what the next one shall do."""

    runs: int = 0
    fail: list[Exception] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fed: list[int] = field(default_factory=list)
    refuse_events: bool = False
    ended: int = 0


def routes_of(soil: Soil, prefix: str) -> Any:
    async def found(ctx: Context, call: Call) -> Plant:
        doc = await ctx.store.get(Plant, call.params["ref"], workspace=call.workspace)
        if doc is None:
            raise NotFound(f"there is no plant '{call.params['ref']}'", kind="plant", id=call.params["ref"])
        return doc

    async def create(ctx: Context, call: Call) -> web.StreamResponse:
        soil.runs += 1
        spec = await call.body(PlantSpec)
        if call.idempotency_key:
            made = await ctx.store.find(Plant, {"made_by": call.idempotency_key}, workspace=call.workspace)
            if made:
                return reply(made[0], 201)
        doc = Plant(id=spec.name, workspace=call.workspace, made_by=call.idempotency_key, created=ctx.now(),
                    **spec.model_dump())
        try:
            doc = await ctx.commit(doc, Fact("model.registered"))
        except Conflict as exc:
            raise Conflict(f"the name '{spec.name}' is taken") from exc
        if soil.fail:
            raise soil.fail.pop(0)
        return reply(doc, 201, {"Location": f"{prefix}/{doc.id}"})

    async def listed(ctx: Context, call: Call) -> web.StreamResponse:
        where: dict[str, Any] = {"name": call.query["name"]} if "name" in call.query else {}
        tags = dict(tag.split("=", 1) for tag in call.all("tag"))
        return await call.page(ctx, Plant, where | ({"tags": tags} if tags else {}))

    async def show(ctx: Context, call: Call) -> web.StreamResponse:
        doc = await found(ctx, call)
        if call.wait_s:
            doc = await call.wait_for(ctx, Plant, doc.id, lambda d: d.phase != "seed")
        return reply(doc)

    async def patch(ctx: Context, call: Call) -> web.StreamResponse:
        doc = await found(ctx, call)
        spec = await call.merged(PlantSpec, doc.view())

        def change(now: Plant) -> tuple[Plant, Sequence[Fact]]:
            call.check_match(now)
            return now.evolve(generation=now.generation + 1, **spec.model_dump()), [Fact("model.updated")]

        return reply(await ctx.change(Plant, doc.id, change, workspace=call.workspace))

    async def delete(ctx: Context, call: Call) -> web.StreamResponse:
        await found(ctx, call)
        raise InUse("a bee sits on it", blockers=[{"kind": "bee", "id": "b", "phase": "busy"}])

    async def slow(ctx: Context, call: Call) -> web.StreamResponse:
        soil.runs += 1
        await soil.gate.wait()
        return reply({"runs": soil.runs}, 202)

    async def feed(ctx: Context, call: Call) -> web.StreamResponse:
        soil.fed = [len(chunk) async for chunk in call.chunks()]
        return reply({"bytes": sum(soil.fed)}, 201)

    async def content(ctx: Context, call: Call) -> web.StreamResponse:
        size = int(call.query.get("size", "10"))

        async def chunks() -> AsyncIterator[bytes]:
            if "absent" in call.query:
                raise NotFound("nothing grows here")
            for start in range(0, size, 65536):
                yield b"x" * min(65536, size - start)
                if "break" in call.query:
                    raise Unavailable("the bed is flooded")
            try:
                while "endless" in call.query:
                    yield b"x"
                    await asyncio.sleep(0.02)
                    if "silent" in call.query:
                        await soil.gate.wait()
            finally:
                soil.ended += 1

        return await call.stream(chunks(), length=None if "endless" in call.query else size,
                                 follow="endless" in call.query)

    async def boom(ctx: Context, call: Call) -> web.StreamResponse:
        raise soil.fail.pop(0) if soil.fail else KeyError("rake")

    async def internal(ctx: Context, call: Call) -> web.StreamResponse:
        return reply({"workspace": call.workspace, "query": dict(call.query)})

    def routes(ctx: Context) -> list[Route]:
        return [
            Route("POST", prefix, create, "Plant one", body=PlantSpec, answer=Plant, status=201),
            Route("GET", prefix, listed, "List plants"),
            Route("GET", prefix + "/{ref}", show, "Show a plant", answer=Plant),
            Route("PATCH", prefix + "/{ref}", patch, "Change a plant", body=PlantSpec, answer=Plant),
            Route("DELETE", prefix + "/{ref}", delete, "Take it out"),
            Route("POST", prefix + "/{ref}/slow", slow, "Waits for the test", status=202),
            Route("PUT", prefix + "/{ref}/feed", feed, "Streams in", raw=True, status=201),
            Route("POST", prefix + "/{ref}/feed", feed, "Streams in", raw=True, status=201),
            Route("GET", prefix + "/{ref}/content", content, "Streams out",
                  query={"size": "bytes", "absent": "", "break": "", "endless": "", "silent": ""}),
            Route("POST", prefix + "/{ref}/boom", boom, "Fails"),
            Route("GET", "/internal" + prefix + "/{ref}", internal, "For services"),
        ]

    return routes


def service(name: str, prefix: str, soil: Soil, handled: str | None = None) -> Service:
    """``handled``: a topic whose events the service takes, and refuses while ``soil.refuse_events``."""

    async def on_event(ctx: Context, event: Envelope) -> None:
        if soil.refuse_events:
            raise Invalid("this event is not liked")
        soil.runs += 1

    return Service(name=name, documents=(Plant,), owns=(prefix,), routes=routes_of(soil, prefix),
                   handlers={handled: on_event} if handled else {})


@dataclass
class Yard:
    """A server of the house; ``call`` is one request → (status, headers, body as JSON or text)."""

    url: str
    server: Server
    contexts: dict[str, Context]
    bus: SqliteBus
    peers: Peers
    soil: Soil
    http: aiohttp.ClientSession

    async def call(self, method: str, path: str, **how: Any) -> tuple[int, Any, Any]:
        async with self.http.request(method, self.url + path, **how) as answer:
            if answer.content_type.endswith("json") and method != "HEAD":
                return answer.status, answer.headers, await answer.json(content_type=None)
            return answer.status, answer.headers, await answer.text()


@asynccontextmanager
async def yard(data: Path, names: Sequence[str] = ("garden", "orchard"), *, soil: Soil | None = None,
               token: str | None = None, hosts: Sequence[str] = LOCAL_HOSTS, urls: dict[str, str] | None = None,
               work: bool = False, **context: Any) -> AsyncIterator[Yard]:
    """The named services behind one port; ``urls`` lead to those that run elsewhere. ``work``: relay and consumer."""
    soil = soil or Soil()
    house = [service("garden", "/v1/plants", soil, "model.registered"), service("orchard", "/v1/trees", soil)]
    async with AsyncExitStack() as stack:
        bus = await SqliteBus.open(data / "yard.db")
        stack.push_async_callback(bus.close)
        peers = Peers(urls or {}, SERVICE_TOKEN)
        stack.push_async_callback(peers.close)
        hosted, wakes = [], {}
        for one in (s for s in house if s.name in names):
            store = await SqliteStore.open(data / "yard.db", one.name)
            stack.push_async_callback(store.close)
            wakes[one.name] = Wakes()
            ctx = Context(one.name, store, DirBlobs(data / "blobs"), LayoutImages(data / "images"),
                          DirGrants(data / "blobs"), {}, peers, data, wake=wakes[one.name].wake)
            hosted.append(Hosted(one, replace(ctx, **context)))
        guard = Guard(hosts, token=token, service_token=SERVICE_TOKEN)
        needed = {f"store of {h.service.name}": h.context.store for h in hosted}
        server = Server(build(hosted, house, bus=bus, peers=peers, guard=guard, needed=needed))
        stack.push_async_callback(server.stop)
        url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
        peers.urls.update({h.service.name: url for h in hosted})
        http = await stack.enter_async_context(aiohttp.ClientSession())
        if work:
            stack.push_async_callback(_ended, [asyncio.create_task(
                run_service(h.context, h.service, bus, wakes[h.service.name])) for h in hosted])
        yield Yard(url, server, {h.service.name: h.context for h in hosted}, bus, peers, soil, http)


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
