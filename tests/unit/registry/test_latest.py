"""The latest version, whoever registers and deletes at once, and however a settling ended."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelyard.adapters.store_sqlite import SqliteStore
from modelyard.core.errors import Unavailable
from modelyard.core.specs import ModelSpec
from modelyard.kernel.observe import REGISTRY
from modelyard.kernel.service import Context
from modelyard.registry import SERVICE, holds
from modelyard.registry.latest import settle
from modelyard.registry.model import Model
from modelyard.registry.register import register
from tests.unit.registry.conftest import Registry

SEED = 20261126


class Away(SqliteStore):
    """The real store, which does not answer the next ``fail`` commits that change a model."""

    fail = 0

    async def commit(self, doc: Any, events: Any = (), cause: str | None = None) -> Any:
        if self.fail and doc.kind == "model" and doc.revision:
            self.fail -= 1
            raise Unavailable("not now")
        return await super().commit(doc, events, cause)


async def models(ctx: Context) -> list[Model]:
    return await ctx.store.find(Model, {"name": "iris"}, limit=1000, tombstones=True)


async def marked(ctx: Context) -> list[str]:
    return [m.id for m in await ctx.store.find(Model, {"marks": "latest/iris"})]


def conflicts() -> float:
    return REGISTRY.get_sample_value("modelyard_conflicts_total", {"service": "registry", "kind": "model"}) or 0.0


async def test_one_after_the_other_each_costs_two_commits(registry: Registry) -> None:
    spec = ModelSpec(name="iris", artifact=await registry.upload(b"w"))
    for _ in range(5):
        await register(registry.ctx, "default", spec, None)
        event = (await registry.events())[-1]
        await SERVICE.handlers["model.registered"](registry.ctx, event)
    commits = {m.version: m.revision for m in await models(registry.ctx)}
    assert commits == {1: 2, 2: 2, 3: 2, 4: 2, 5: 1}
    assert await marked(registry.ctx) == ["iris:5"]


@pytest.mark.parametrize("processes", [1, 2, 3])
async def test_many_at_once(registry: Registry, processes: int) -> None:
    """Numbers have no gap and none is given twice; whoever comes last leaves one latest, the highest that lives."""
    chance = random.Random(SEED)
    spec = ModelSpec(name="iris", artifact=await registry.upload(b"w"))
    contexts = [registry.ctx]

    async def one(n: int) -> None:
        ctx = contexts[n % processes]
        await asyncio.sleep(chance.random() * 0.2)
        doc = await register(ctx, "default", spec, None)
        if n % 4 == 0:
            await asyncio.sleep(chance.random() * 0.05)
            await holds.remove(ctx, "default", doc.id, lambda doc: None)
        if n % 7 == 0:
            await settle(ctx, "default", "iris")

    async with registry.another_process() as second, registry.another_process() as third:
        contexts += [second, third]
        await asyncio.gather(*(one(n) for n in range(60)))
        found = await models(registry.ctx)
        assert sorted(m.version for m in found) == [*range(1, 61)]
        assert await marked(registry.ctx) == [f"iris:{max(m.version for m in found if not m.deleted)}"]
        assert (await register(contexts[processes - 1], "default", spec, None)).id == "iris:61"
        assert await marked(registry.ctx) == ["iris:61"]


async def test_a_settling_that_failed_is_done_by_the_event(registry: Registry, tmp_path: Path) -> None:
    store = await Away.open(tmp_path / "yard.db", "registry")
    ctx = replace(registry.ctx, store=store)
    spec = ModelSpec(name="iris", artifact=await registry.upload(b"w"))
    await register(ctx, "default", spec, None)
    store.fail = 1
    with pytest.raises(Unavailable):
        await register(ctx, "default", spec, None)
    assert await marked(ctx) == ["iris:1", "iris:2"]
    for event in await registry.events():
        await SERVICE.handlers["model.registered"](ctx, event)
    assert await marked(ctx) == ["iris:2"]
    assert (await register(ctx, "default", spec, None)).id == "iris:3"
    assert await marked(ctx) == ["iris:3"]
    await store.close()


async def test_what_was_changed_meanwhile_is_looked_at(registry: Registry) -> None:
    """What is remembered of the latest is not what it is now."""
    await registry.register()
    await registry.ask("PATCH", "/v1/models/iris:1", json={"tags": {"team": "flora"}}, status=200)
    await registry.register()
    await registry.ask("DELETE", "/v1/models/iris:2", status=200)
    assert await marked(registry.ctx) == ["iris:1"]
    await registry.register()
    assert await marked(registry.ctx) == ["iris:3"]
    assert (await registry.ask("GET", "/v1/models/iris:1"))["tags"] == {"team": "flora"}


async def test_a_number_that_another_took_is_not_given_again(registry: Registry) -> None:
    spec = ModelSpec(name="iris", artifact=await registry.upload(b"w"))
    async with registry.another_process() as other:
        assert (await register(registry.ctx, "default", spec, None)).id == "iris:1"
        for n in (2, 3):
            assert (await register(other, "default", spec, None)).id == f"iris:{n}"
        await holds.remove(other, "default", "iris:3", lambda doc: None)
        assert await marked(registry.ctx) == ["iris:2"]
        before = conflicts()
        assert (await register(registry.ctx, "default", spec, None)).id == "iris:4"
        assert conflicts() == before + 1   # the one that found "iris:2" taken
        assert await marked(registry.ctx) == ["iris:4"]
