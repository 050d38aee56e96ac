"""A node with the rooms that deployments need, real images made by hand, and calls over its own HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelyard.image_builder.model import Image
from modelyard.kernel.service import Context
from modelyard.node import Node, opened
from modelyard.settings import load
from tests import handmade


@dataclass
class Answer:
    status: int
    body: Any
    headers: dict[str, str]


@dataclass
class Desk:
    """Asks a node, and puts images into its builder's books as if they had been built."""

    node: Node
    session: aiohttp.ClientSession
    made: dict[str, str] = field(default_factory=dict)

    def context(self, service: str) -> Context:
        return next(h.context for h in self.node.parts.hosted if h.service.name == service)

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        async with self.session.request(method, self.node.url + path, json=body, headers=headers) as answer:
            kind = answer.content_type
            content = await answer.json(content_type=None) if kind.endswith("json") else await answer.text()
            return Answer(answer.status, content, {k.lower(): v for k, v in answer.headers.items()})

    async def get(self, name: str = "iris", more: str = "") -> dict[str, Any]:
        found = await self.call("GET", f"/v1/deployments/{name}{more}")
        assert found.status == 200, found
        return found.body

    async def until(self, when: Callable[[dict[str, Any]], bool], name: str = "iris", within_s: float = 40) -> Any:
        last = None
        try:
            async with asyncio.timeout(within_s):
                while not when(last := await self.get(name)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"not within {within_s} s; last: {last}")
        return last

    async def healthy(self, generation: int, name: str = "iris") -> dict[str, Any]:
        return await self.until(lambda d: d["phase"] == "healthy" and d["observed_generation"] == generation, name)

    async def gone(self, name: str = "iris") -> None:
        async with asyncio.timeout(40):
            while (await self.call("GET", f"/v1/deployments/{name}")).status != 404:
                await asyncio.sleep(0.05)

    async def image(self, version: int, score: str = handmade.ECHO, *, phase: str = "ready", **more: Any) -> Image:
        """Version ``version`` of ``scorer``; ``phase`` says how far its building is."""
        ctx = self.context("image-builder")
        digest = await handmade.image(ctx.images, "scorer", str(version), score)
        return await ctx.store.commit(Image(
            id=f"scorer:{version}", name="scorer", version=version, python="3.11", platform="linux/amd64",
            phase=phase, digest=digest if phase == "ready" else None, models=[f"iris:{version}"],
            model_names=["iris"], **more))


@asynccontextmanager
async def desk_on(data: Path, **more: Any) -> AsyncIterator[Desk]:
    settings = await asyncio.to_thread(load, data=data, port=0, **more)
    async with opened(settings) as node, aiohttp.ClientSession() as session:
        work = asyncio.create_task(node.work())
        try:
            yield Desk(node, session)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_on(tmp_path / "data") as desk:
        yield desk
