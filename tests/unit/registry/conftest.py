"""A registry on a free port: real HTTP, the SQLite store, a folder of blobs; and an image builder that only tells
phases, behind real HTTP as well."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.store_sqlite import SqliteStore
from modelyard.kernel.forward import SERVICE_TOKEN, Peers
from modelyard.kernel.guard import Guard
from modelyard.kernel.loop import run_loop
from modelyard.kernel.server import Server
from modelyard.kernel.service import Context
from modelyard.kernel.wakes import Wakes
from modelyard.kernel.web import application, mount
from modelyard.registry import SERVICE

TOKEN = "a-service-token"


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Phases:
    """What ``GET /v1/images/{id}`` answers; a name that is not there is 404."""

    images: dict[str, str] = field(default_factory=dict)

    async def show(self, request: web.Request) -> web.Response:
        phase = self.images.get(request.match_info["id"])
        if phase is None:
            return web.json_response({"code": "not-found", "detail": "no such image"}, status=404)
        return web.json_response({"id": request.match_info["id"], "phase": phase})


@dataclass
class Registry:
    """One registry, and how a test speaks to it."""

    ctx: Context
    wakes: Wakes
    port: int
    http: aiohttp.ClientSession
    phases: Phases

    async def ask(self, method: str, path: str, *, status: int | None = None, internal: bool = False,
                  headers: dict[str, str] | None = None, **more: Any) -> Any:
        """The JSON answer; ``status`` is asserted. Any path but a public one under /v1 is written whole."""
        head = {**(headers or {}), **({SERVICE_TOKEN: TOKEN} if internal else {})}
        async with self.http.request(method, f"http://127.0.0.1:{self.port}{path}", headers=head, **more) as r:
            body = await r.json(content_type=None) if r.content_type.endswith("json") else await r.read()
            if status is not None:
                assert r.status == status, (r.status, body)
            self.last = r
            return body

    async def upload(self, data: bytes) -> str:
        await self.ask("PUT", f"/v1/artifacts/{digest(data)}", data=data)
        assert self.last.status in (200, 201), self.last.status
        return digest(data)

    async def register(self, name: str = "iris", data: bytes = b"weights", status: int = 201, **spec: Any) -> Any:
        return await self.ask("POST", "/v1/models", status=status,
                              json={"name": name, "artifact": await self.upload(data), **spec})

    def blobs(self) -> list[Path]:
        """Everything in the blob folder, drafts too."""
        root = self.ctx.blobs.root  # type: ignore[attr-defined]
        return sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())

    async def events(self) -> list[Any]:
        """What waits to be published, by subject."""
        return [event for doc in await self.ctx.store.pending(10_000) for event in doc.events]

    @contextlib.asynccontextmanager
    async def another_process(self) -> AsyncIterator[Context]:
        """On the same documents, remembering nothing."""
        store = await SqliteStore.open(self.ctx.data / "yard.db", "registry")
        try:
            yield replace(self.ctx, store=store)
        finally:
            await store.close()

    def later(self, seconds: float) -> None:
        """Moves the registry's clock on."""
        clock = self.ctx.now
        object.__setattr__(self.ctx, "now", lambda: clock() + timedelta(seconds=seconds))

    @contextlib.asynccontextmanager
    async def loops(self) -> AsyncIterator[None]:
        """With the registry's loops running."""
        tasks = [asyncio.create_task(run_loop(self.ctx, loop, self.wakes)) for loop in SERVICE.loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def until(self, what: Any, seconds: float = 30.0) -> None:
        async with asyncio.timeout(seconds):
            while not await what():
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def open_registry(folder: Path) -> AsyncIterator[Registry]:
    phases, wakes = Phases(), Wakes()
    builder = web.Application()
    builder.router.add_get("/v1/images/{id}", phases.show)
    builder_server = Server(builder)
    peers = Peers({"image-builder": f"http://127.0.0.1:{await builder_server.start('127.0.0.1', 0)}"}, TOKEN)
    store = await SqliteStore.open(folder / "yard.db", "registry")
    blobs = DirBlobs(folder / "blobs")
    ctx = Context(service="registry", store=store, blobs=blobs, images=LayoutImages(folder / "images"),
                  grants=DirGrants(folder / "blobs"), targets={}, peers=peers, data=folder, wake=wakes.wake)
    app = application(Guard(service_token=TOKEN))
    mount(app, SERVICE.routes(ctx), ctx)
    server = Server(app)
    port = await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        yield Registry(ctx, wakes, port, http, phases)
    await server.stop()
    await builder_server.stop()
    await peers.close()
    await store.close()


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    async with open_registry(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def files() -> dict[str, bytes]:
    """One small trained model, as the files that people have."""
    import joblib
    import skops.io
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    x, y = load_iris(return_X_y=True)
    fitted = LogisticRegression(max_iter=500).fit(x, y)
    plain, packed = io.BytesIO(), io.BytesIO()
    joblib.dump(fitted, plain)
    joblib.dump(fitted, packed, compress=("gzip", 3))
    onnx = to_onnx(fitted, x[:1].astype("float32"), options={"zipmap": False})
    return {"onnx": onnx.SerializeToString(), "skops": skops.io.dumps(fitted),
            "joblib": plain.getvalue(), "joblib.gz": packed.getvalue()}

