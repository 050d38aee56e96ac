"""Registry and image builder on one server, with their loops running, as one process of Modelyard has them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from modelyard import image_builder, registry
from modelyard.adapters import urls
from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.bus_sqlite import SqliteBus
from modelyard.adapters.images_layout import LayoutImages
from modelyard.core.archives import pack
from modelyard.image_builder.model import Image
from modelyard.kernel.forward import Peers
from modelyard.kernel.guard import Guard
from modelyard.kernel.run import Wakes, run_service
from modelyard.kernel.server import Hosted, Server, build
from modelyard.kernel.service import Context

TOKEN = "a-token-between-services"
SCORE = b"def init():\n    pass\n\n\ndef run(data):\n    return data\n"
OVER = ("ready", "failed", "cancelled")


@dataclass
class Answer:
    status: int
    json: Any
    raw: bytes
    headers: Any


@dataclass
class Yard:
    """What the tests see: HTTP, and the contexts for looking behind it."""

    url: str
    http: aiohttp.ClientSession
    images: Context
    registry: Context
    bus: SqliteBus
    deployments: dict[str, str]
    """Name → phase: what the deployer's side answers."""

    async def call(self, method: str, path: str, body: Any = None, *, data: bytes | None = None, internal: bool = False,
                   **headers: str) -> Answer:
        sent = {k.replace("_", "-"): v for k, v in headers.items()}
        if internal:
            sent["x-modelyard-service-token"] = TOKEN
        if data is not None:
            sent["content-type"] = "application/octet-stream"
        kinds: dict[str, Any] = {"data": data} if data is not None else {"json": body}
        async with self.http.request(method, self.url + path, headers=sent, **kinds) as answer:
            raw = await answer.read()
            is_json = "json" in answer.content_type
            return Answer(answer.status, await answer.json(content_type=None) if is_json and raw else None, raw,
                          answer.headers)

    async def upload(self, data: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        answer = await self.call("PUT", f"/v1/artifacts/{digest}", data=data)
        assert answer.status in (200, 201), answer
        return digest

    async def upload_folder(self, folder: Path) -> str:
        return await self.upload(b"".join(await asyncio.to_thread(lambda: list(pack(folder)))))

    async def register(self, name: str, data: bytes = b"weights", **fields: Any) -> str:
        body = {"name": name, "artifact": await self.upload(data), "framework": "custom", **fields}
        answer = await self.call("POST", "/v1/models", body)
        assert answer.status == 201, answer
        return str(answer.json["id"])

    async def post(self, **spec: Any) -> dict[str, Any]:
        answer = await self.call("POST", "/v1/images", spec)
        assert answer.status == 202, answer
        return dict(answer.json)

    async def over(self, id: str) -> dict[str, Any]:
        """The image once its build has ended."""
        while True:
            doc = (await self.call("GET", f"/v1/images/{id}?wait=20")).json
            if doc["phase"] in OVER:
                return dict(doc)

    async def small(self, name: str = "tiny", **spec: Any) -> dict[str, Any]:
        """An image without wheels: a scoring file and an empty lock."""
        spec = {"score": await self.upload(SCORE), "lock": await self.upload(b""), **spec}
        return await self.over((await self.post(name=name, **spec))["id"])

    async def attached(self, id: str) -> list[dict[str, Any]]:
        """What is attached to an image in its store, once all of it is: entries of the index, of any version."""
        name, _, version = id.partition(":")
        doc = (await self.call("GET", f"/v1/images/{id}")).json
        found: list[dict[str, Any]] = []

        async def there() -> bool:
            raw = await self.images.images.get_manifest(name, doc["digest"].replace(":", "-"))
            found[:] = json.loads(raw[0])["manifests"] if raw else []
            return sum(e["annotations"]["io.modelyard.image"] == f"{name}:{version}" for e in found) == 2

        await self.until(there)
        return found

    async def gone(self, id: str) -> None:
        """Returns once a deleted image is a tombstone."""
        for _ in range(1600):
            if await self.images.store.get(Image, id) is None:
                return
            await asyncio.sleep(0.025)
        raise AssertionError(f"{id} is still there")

    async def events(self) -> list[Any]:
        found, _ = await self.bus.read([], after="beginning", limit=1000)
        return [envelope for _, envelope in found]

    async def until(self, check: Callable[[], Awaitable[bool]]) -> None:
        for _ in range(1600):
            if await check():
                return
            await asyncio.sleep(0.025)
        raise AssertionError("it did not happen")


@asynccontextmanager
async def deployer(phases: dict[str, str]) -> AsyncIterator[str]:
    """The URL of something that tells deployments' phases as the deployer does."""
    async def show(request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if id not in phases:
            return web.json_response({"code": "not-found", "detail": f"there is no deployment '{id}'"}, status=404)
        return web.json_response({"id": id, "phase": phases[id]})

    app = web.Application()
    app.router.add_get("/v1/deployments/{id}", show)
    server = Server(app)
    try:
        yield f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
    finally:
        await server.stop()


@asynccontextmanager
async def running(data: Path, store: str = "", documents: str = "") -> AsyncIterator[Yard]:
    """A yard over a data folder; a second one over the same folder is the same yard restarted. ``store`` is the URL of
    its image store and ``documents`` that of its documents, when they are not in the folder."""
    data.mkdir(parents=True, exist_ok=True)
    bus = await SqliteBus.open(data / "yard.db")
    blobs, peers = DirBlobs(data / "blobs"), Peers({}, TOKEN)
    images = await urls.open_images(store) if store else LayoutImages(data / "images")
    hosted, work = [], []
    for service in (registry.SERVICE, image_builder.SERVICE):
        wakes = Wakes()
        ctx = Context(service=service.name, blobs=blobs, images=images,
                      store=await urls.open_store(documents or f"sqlite://{data}/yard.db", service.name),
                      grants=DirGrants(data / "blobs"), targets={}, peers=peers, data=data,
                      wake=wakes.wake, open_images=urls.open_images)
        hosted.append(Hosted(service, ctx))
        work.append(run_service(ctx, service, bus, wakes))
    server = Server(build(hosted, [h.service for h in hosted], bus=bus, peers=peers, guard=Guard(service_token=TOKEN),
                          needed={}))
    url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
    peers.urls.update(dict.fromkeys(("registry", "image-builder"), url))
    tasks = [asyncio.create_task(w) for w in work]
    phases: dict[str, str] = {}
    try:
        async with aiohttp.ClientSession() as http, deployer(phases) as peers.urls["deployer"]:
            yield Yard(url, http, hosted[1].context, hosted[0].context, bus, phases)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop()
        await peers.close()
        for h in hosted:
            await h.context.store.close()
        await images.close()
        await bus.close()


def check_bill(bill: Any) -> Any:
    """What the CycloneDX 1.6 schema has against a bill of materials; None: nothing."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill))


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    async with running(tmp_path / "data") as found:
        yield found


@pytest.fixture
def onnx() -> bytes:
    """A model that adds its input to itself."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, 2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", [x], [y])
    out = io.BytesIO()
    out.write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    return out.getvalue()
