"""A telemetry service on embedded adapters with a clock that the test turns, and segments to feed it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import aiohttp

from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.store_sqlite import SqliteStore
from modelyard.core.events import Envelope
from modelyard.core.inference import PROTO
from modelyard.core.layout import segment_key
from modelyard.core.segments import COLLECT, COUNTS, END, RECORD, START, new_mark, pack, pack_json, pack_words
from modelyard.kernel.forward import Peers
from modelyard.kernel.guard import Guard
from modelyard.kernel.server import Server
from modelyard.kernel.service import Context
from modelyard.kernel.web import application, mount
from modelyard.telemetry import SERVICE
from modelyard.telemetry.handlers import on_deployment
from modelyard.telemetry.ingest import step
from modelyard.telemetry.model import CaptureStream

NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
REPLICA = "0-1a2b3c4d"


@dataclass
class Clock:
    now: datetime = NOON

    def __call__(self) -> datetime:
        return self.now

    def tick(self, **by: float) -> None:
        self.now += timedelta(**by)


@dataclass
class Life:
    """Writes the segments of one scoring process, one frame after the other, as its capture log does."""

    replica: str = REPLICA
    image: str = "iris-scorer:7"
    deployment: str = "iris"
    number: int = 0
    sequence: int = 0
    collected: int = 0
    frames: list[bytes] = field(default_factory=list)
    mark: bytes = new_mark(b"mark")

    def record(self, at: datetime, status: str = "OK", model: str = "iris:4", latency_ms: float = 1.0,
               request: bytes = b"ask", response: bytes = b"answer", protocol: str = "grpc",
               type_: str = PROTO) -> Life:
        self.sequence += 1
        words = pack_words([f"{self.replica}.{self.sequence}", f"r{self.sequence}", model, protocol, "ModelInfer",
                            status, type_, type_, ""])
        self.frames.append(b"".join(pack(self.mark, RECORD, words, request, response, self.sequence, ns(at),
                                         int(latency_ms * 1e6), 1000)))
        return self

    def count(self, at: datetime, reason: str, calls: int, status: str = "OK", bucket: int = 100,
              model: str = "iris:4") -> Life:
        slot = int(at.timestamp()) // 10 * 10
        body = {"counts": [[slot, model, status, reason, bucket, calls]], "rows_lost": 0}
        self.frames.append(pack_json(self.mark, COUNTS, body, b"", self.sequence))
        return self

    def collect(self, at: datetime, collector: str, columns: list[str] | None, rows: list[list[Any]]) -> Life:
        self.collected += 1
        words = pack_words([f"{self.replica}.{self.sequence}", collector])
        self.frames.append(pack_json(self.mark, COLLECT, {"columns": columns, "rows": rows}, words, self.collected,
                                     ns(at)))
        return self

    def end(self, at: datetime) -> Life:
        body = {"recorded": self.sequence, "collected": self.collected, "ended": ns(at)}
        self.frames.append(pack_json(self.mark, END, body, b"", self.sequence))
        return self

    def segment(self) -> tuple[int, bytes]:
        """Closes what was written since the last: (number, bytes)."""
        about = {"image": self.image, "models": ["iris:4"], "replica": self.replica, "segment": self.number,
                 "started": ns(NOON), "opened": ns(NOON)}
        raw = pack_json(self.mark, START, about) + b"".join(self.frames)
        self.frames = []
        self.number += 1
        return self.number - 1, raw


@dataclass
class Bench:
    """``ctx`` of the service, its clock, and one HTTP server with its routes."""

    ctx: Context
    clock: Clock
    url: str
    http: aiohttp.ClientSession

    async def ship(self, life: Life, workspace: str = "default") -> None:
        """Puts the life's next segment where its shipper would."""
        number, raw = life.segment()
        await self.put(segment_key(workspace, life.deployment, life.replica, number), raw)

    async def put(self, key: str, raw: bytes) -> None:
        async def once() -> AsyncIterator[bytes]:
            yield raw

        await self.ctx.blobs.put(key, once())

    async def deployed(self, topic: str = "deployment.requested", sequence: int = 1, workspace: str = "default",
                       **data: Any) -> None:
        """An event of the deployment ``iris`` arrives."""
        await on_deployment(self.ctx, Envelope(
            id=f"e{topic}{sequence}", source="/modelyard/deployer", type=f"{topic}.v1", subject="iris",
            time=self.clock(), workspace=workspace, partitionkey=f"{workspace}/iris", sequence=f"{sequence:020d}",
            data={"name": "iris", "image": "iris-scorer:7", "capture": {"enabled": True, "retention_days": 30},
                  **data}))

    async def step(self, workspace: str = "default", ctx: Context | None = None) -> CaptureStream:
        """One turn of the ingest loop, settled as the kernel does."""
        ctx = ctx or self.ctx
        stream = await ctx.store.get(CaptureStream, "iris", workspace=workspace)
        assert stream is not None
        change = await step(ctx, stream)
        newest = await ctx.store.get(CaptureStream, "iris", workspace=workspace)
        assert newest is not None
        settled = change(newest)
        assert settled is not None
        return await ctx.commit(settled[0], *settled[1])

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path, headers=headers) as answer:
            body = await answer.read()
            return answer.status, json.loads(body) if answer.content_type.endswith("json") else body

    async def keys(self, prefix: str = "") -> list[str]:
        return [blob.key async for blob in self.ctx.blobs.list(prefix)]

    async def events(self) -> list[Envelope]:
        """Everything announced so far, by subject and sequence."""
        found = [e for p in await self.ctx.store.pending(10_000) for e in p.events]
        return sorted(found, key=lambda e: (e.subject, e.sequence))


@asynccontextmanager
async def bench(data: Path) -> AsyncIterator[Bench]:
    clock = Clock()
    store = await SqliteStore.open(data / "yard.db", "telemetry")
    blobs = DirBlobs(data / "blobs")
    ctx = Context("telemetry", store, blobs, LayoutImages(data / "images"), DirGrants(data / "blobs"), {},
                  Peers({}, "token"), data, now=clock)
    app = application(Guard(service_token="token"))
    mount(app, SERVICE.routes(ctx), ctx)
    server = Server(app)
    url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
    try:
        async with aiohttp.ClientSession() as http:
            yield Bench(ctx, clock, url, http)
    finally:
        await server.stop()
        await ctx.peers.close()
        await store.close()


class Crashed(Exception):
    """The process died here."""


class Crashing:
    """An adapter whose process dies at a chosen call: before the call (``after`` False) or right after it."""

    def __init__(self, inner: Any, budget: list[int], after: bool) -> None:
        self._inner, self._budget, self._after = inner, budget, after

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._inner, name)
        if name not in ("commit", "put", "delete"):
            return inner

        async def call(*args: Any, **named: Any) -> Any:
            self._budget[0] -= 1
            if self._budget[0] == 0 and not self._after:
                raise Crashed(name)
            result = await inner(*args, **named)
            if self._budget[0] == 0:
                raise Crashed(name)
            return result

        return call


def crashing(ctx: Context, at: int, after: bool) -> Context:
    """The same context, dying at its ``at``-th change of anything."""
    budget = [at]
    return replace(ctx, store=cast(Any, Crashing(ctx.store, budget, after)),
                   blobs=cast(Any, Crashing(ctx.blobs, budget, after)))


def ns(at: datetime) -> int:
    return round(at.timestamp() * 1_000_000) * 1000
