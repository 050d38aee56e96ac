"""Finding models: every filter, order and page, and no scan among a hundred thousand."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from modelyard.adapters import store_sqlite_find
from modelyard.registry.model import Model, latest_marks, place
from tests.unit.registry.conftest import Registry, digest, open_registry

pytestmark = pytest.mark.slow  # 100,000 versions


async def ids(registry: Registry, query: str) -> list[str]:
    answer = await registry.ask("GET", f"/v1/models?{query}", status=200)
    return [m["id"] for m in answer["items"]]


@pytest.fixture
async def garden(registry: Registry) -> Registry:
    await registry.register("iris", b"1", tags={"team": "flora", "gold": ""}, properties={"acc": "0.9"}, run="r1")
    await registry.register("iris", b"2", tags={"team": "flora"}, properties={"acc": "0.95"}, run="r2")
    await registry.register("rose", b"3", tags={"team": "fauna", "gold": "yes"}, framework="xgboost")
    await registry.register("iris-2", b"4", tags={"a=b": "c=d"})
    return registry


@pytest.mark.parametrize(("query", "expected"), [
    ("", ["iris-2:1", "rose:1", "iris:2", "iris:1"]),
    ("name=iris", ["iris:2", "iris:1"]),
    ("tag=team=flora", ["iris:2", "iris:1"]),
    ("tag=gold", ["rose:1", "iris:1"]),
    ("tag=gold=", ["iris:1"]),
    ("tag=gold&tag=team=flora", ["iris:1"]),
    ("tag=team=flora&tag=team=fauna&name=iris", None),
    ("tag=team&tag=team=fauna", ["rose:1"]),
    ("tag=nothing", []),
    ("property=acc=0.95", ["iris:2"]),
    ("property=acc&tag=gold", ["iris:1"]),
    ("run=r1", ["iris:1"]),
    ("framework=xgboost", ["rose:1"]),
    ("latest=true", ["iris-2:1", "rose:1", "iris:2"]),
    ("latest=true&tag=team=flora", ["iris:2"]),
    ("latest=true&tag=gold&name=iris", []),
    ("latest=false&name=rose", ["rose:1"]),
    ("order=created", ["iris:1", "iris:2", "rose:1", "iris-2:1"]),
    ("order=name", ["iris:1", "iris:2", "iris-2:1", "rose:1"]),
    ("order=-name&limit=2", ["rose:1", "iris-2:1"]),
])
async def test_filters_and_orders(garden: Registry, query: str, expected: list[str] | None) -> None:
    if expected is None:
        await garden.ask("GET", f"/v1/models?{query}", status=422)
    else:
        assert await ids(garden, query) == expected


async def test_updated_order_follows_changes(garden: Registry) -> None:
    await garden.ask("PATCH", "/v1/models/iris:1", json={"description": "x"}, status=200)
    assert (await ids(garden, "order=-updated"))[0] == "iris:1"


@pytest.mark.parametrize("query", ["order=size", "order=place", "latest=maybe", "limit=0", "limit=x", "after=junk",
                                   "tag==x", "colour=blue", "tags=a"])
async def test_bad_searches(garden: Registry, query: str) -> None:
    problem = await garden.ask("GET", f"/v1/models?{query}", status=422)
    assert problem["errors"]


async def test_versions_sort_as_numbers(registry: Registry) -> None:
    for n in range(12):
        await registry.register(data=bytes([n]))
    assert await ids(registry, "order=name") == [f"iris:{n}" for n in range(1, 13)]


async def test_a_walk_during_changes_misses_and_repeats_nothing(registry: Registry) -> None:
    for n in range(30):
        await registry.register(f"m{n:02}", b"x")
    seen: list[str] = []
    query = "order=created&limit=7"
    after = ""
    for step in range(100):
        page = await registry.ask("GET", f"/v1/models?{query}{after}", status=200)
        seen += [m["id"] for m in page["items"]]
        await registry.register(f"new{step}", b"x")
        await registry.ask("DELETE", f"/v1/models/{seen[-1]}", status=200)
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
        if len(seen) >= 30:
            break
    assert seen[:30] == [f"m{n:02}:1" for n in range(30)]


# -- a hundred thousand ---------------------------------------------------------------------------------------------

NAMES, VERSIONS = 2_000, 50


def seeded(n: int) -> Model:
    name, version = f"model-{n % NAMES:05}", n // NAMES + 1
    return Model(
        id=f"{name}:{version}", name=name, version=version, artifact=digest(str(n % 5000).encode()), size=1,
        framework=("onnx", "scikit-learn", "custom")[n % 3], run=f"run-{n % 10_000}", place=place(name, version),
        marks=latest_marks(name) if version == VERSIONS else (),
        tags={"team": f"t{n % 20}", **({"rare": "yes"} if n % 10_000 == 7 else {})}, properties={"n": str(n)})


def seed(path: Path, store: Any) -> None:
    """The store's own rows and entries, written in one transaction: a commit each would take minutes."""
    from modelyard.adapters.store_sqlite import _Row
    from modelyard.core.documents import INDEXED_ALWAYS

    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    for n in range(NAMES * VERSIONS):
        doc = seeded(n).evolve(revision=1)
        keys = doc.model_dump(mode="json", include=set(Model.indexed | INDEXED_ALWAYS) - {"deleted"})
        _Row(doc, store, doc.model_dump_json().encode(), keys, [], None).write(db, "registry")
    db.execute("COMMIT")
    db.close()


@pytest.mark.slow
async def test_a_hundred_thousand_versions_are_searched_by_index(tmp_path: Path) -> None:
    async with open_registry(tmp_path) as registry:
        await registry.ctx.store.commit(seeded(0).evolve(id="first:1", name="first", place=place("first", 1)))
        space = await registry.ctx.store._space("model", "default")  # type: ignore[attr-defined]
        await asyncio.to_thread(seed, tmp_path / "yard.db", space)
        some = random.Random(3)
        queries = {
            "get": lambda: f"/v1/models/model-{some.randrange(NAMES):05}:{some.randrange(VERSIONS) + 1}",
            "get highest": lambda: f"/v1/models/model-{some.randrange(NAMES):05}",
            "newest": lambda: "/v1/models?limit=100",
            "name": lambda: f"/v1/models?name=model-{some.randrange(NAMES):05}",
            "common tag": lambda: f"/v1/models?tag=team=t{some.randrange(20)}",
            "common key": lambda: "/v1/models?tag=team",
            "rare tag": lambda: "/v1/models?tag=rare",
            "tag and framework": lambda: f"/v1/models?tag=team=t{some.randrange(20)}&framework=onnx",
            "property": lambda: f"/v1/models?property=n={some.randrange(NAMES * VERSIONS)}",
            "run": lambda: f"/v1/models?run=run-{some.randrange(10_000)}",
            "latest": lambda: "/v1/models?latest=true",
            "latest and tag": lambda: f"/v1/models?latest=true&tag=team=t{some.randrange(20)}",
            "latest of a name": lambda: f"/v1/models?latest=true&name=model-{some.randrange(NAMES):05}",
            "by name": lambda: "/v1/models?order=name&limit=100",
            "nothing": lambda: "/v1/models?tag=team=t3&property=n=4&framework=onnx",
        }
        steps: list[None] = []  # one for each thousand steps of SQLite's machine; a scan takes over a million steps
        await registry.ctx.store._file.read(  # type: ignore[attr-defined]
            lambda db: db.set_progress_handler(lambda: steps.append(None), 1000))
        worst: dict[str, int] = {}
        for what, query in queries.items():
            steps.clear()
            for _ in range(5):
                answer = await registry.ask("GET", query(), status=200)
            assert what == "nothing" or "get" in what or answer["items"], what
            worst[what] = len(steps) * 1000 // 5
        steps.clear()
        assert (await registry.register("model-00007", b"new"))["version"] == VERSIONS + 1
        worst["register"] = len(steps) * 1000
        assert max(worst.values()) < 400_000, str(worst)
        assert await ids(registry, "latest=true&name=model-00007") == [f"model-00007:{VERSIONS + 1}"]


@pytest.mark.parametrize("where", [
    {"name": "iris"}, {"tags": {"a": "b"}}, {"tags": {"a": None}}, {"marks": "latest"},
    {"marks": "latest", "tags": {"a": "b", "c": None}}, {"artifact": "x"}, {},
])
@pytest.mark.parametrize("order", ["-created", "place", "id"])
async def test_no_search_is_a_scan(registry: Registry, where: dict[str, Any], order: str) -> None:
    """Whatever leads the search, SQLite itself says that it walks an index."""
    await registry.register()
    query = store_sqlite_find.plan(Model, where, order, None, 10, False)

    def plans() -> list[str]:
        with sqlite3.connect(registry.ctx.data / "yard.db") as db:
            found = []
            for lead in ("order", *range(len(query.equal))):
                sql, args = store_sqlite_find.compose(2, query, lead)
                found += [str(row[3]) for row in db.execute("EXPLAIN QUERY PLAN " + sql, args)]
        return found

    steps = await asyncio.to_thread(plans)
    assert steps and not [s for s in steps if s.startswith("SCAN ") and s.split()[1] in ("e", "d", "k", "p")], steps
