"""The same image asked for twice is built once, on every store, whichever builder is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from modelyard.kernel.server import Server
from tests.backends import Backend, backends, url_of
from tests.unit.image_builder.conftest import SCORE, Yard, running

SIX = {"requirements": ["six"]}


class Index:
    """A package index that answers when it is let, and then knows nothing: so long builds go on."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        await self.open.wait()
        return web.Response(status=404)


@pytest.fixture
async def index(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Index]:
    found, app = Index(), web.Application()
    app.router.add_get("/{rest:.*}", found.answer)
    server = Server(app)
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}/simple")
    yield found
    found.open.set()
    await server.stop()


@pytest.fixture(params=backends("store"))
async def pair(request: pytest.FixtureRequest, tmp_path: Path, index: Index) -> AsyncIterator[tuple[Yard, Yard]]:
    """Two builders and registries on one store, as two processes have them."""
    backend: Backend = request.param
    url = url_of(backend, tmp_path)
    async with AsyncExitStack() as stack:
        yield (await stack.enter_async_context(running(tmp_path / "data", documents=url)),
               await stack.enter_async_context(running(tmp_path / "data", documents=url)))
        index.open.set()
    backend.clean(url)


async def versions(yard: Yard, name: str) -> list[int]:
    items = (await yard.call("GET", f"/v1/images?name={name}&order=version")).json["items"]
    return [doc["version"] for doc in items]


async def test_the_same_request_at_once_is_one_build(pair: tuple[Yard, Yard], index: Index) -> None:
    model = await pair[0].register("iris", b"weights")
    score = await pair[0].upload(SCORE)
    spec: dict[str, Any] = {"name": "one", "models": ["iris"], "score": score, "tags": {"a": "b"}, **SIX}
    answers = await asyncio.gather(
        *(pair[n % 2].call("POST", "/v1/images", {**spec, "models": [("iris", model)[n % 3 == 0]]},
                           **({"idempotency_key": f"k-{n}"} if n % 4 == 0 else {})) for n in range(12)))
    assert [a.status for a in answers] == [202] * 12 and {a.json["id"] for a in answers} == {"one:1"}
    assert {a.headers["Location"] for a in answers} == {"/v1/images/one:1"}
    assert [a.headers.get("Idempotency-Replayed") for a in answers].count(None) == 1
    assert await versions(pair[1], "one") == [1]

    other = [{"tags": {"a": "c"}}, {"env": {"A": "b"}}, {"models": []}, {"timeout_s": 99}, {"requirements": ["seven"]},
             {"description": "x"}, {"models": [await pair[1].register("iris", b"others")]}]
    assert [(await pair[n % 2].post(**{**spec, **one}))["version"] for n, one in enumerate(other)] == [*range(2, 9)]
    assert (await pair[1].post(**{**spec, **other[-1]}))["version"] == 8, "the newest model is a version like any other"

    patched = await pair[0].call("PATCH", "/v1/images/one:2", {"tags": {"a": "b", "c": "d"}})
    assert patched.status == 200
    assert (await pair[1].post(**{**spec, **other[0]}))["version"] == 9, "what was changed since is not what is asked"

    index.open.set()
    assert (await pair[0].over("one:1"))["phase"] == "failed"
    again = await pair[1].post(**{**spec, "models": [model]})
    assert again["version"] == 10, "a build that is over is no answer"

    async def told() -> bool:
        said = {e.subject for yard in pair for e in await yard.events() if e.topic == "image.requested"}
        return said == {f"one:{n}" for n in range(1, 11)}

    await pair[0].until(told)


async def test_a_deleted_one_is_built_again(pair: tuple[Yard, Yard]) -> None:
    spec = {"name": "gone", "score": await pair[0].upload(SCORE), **SIX}
    assert (await pair[0].post(**spec))["id"] == (await pair[1].post(**spec))["id"] == "gone:1"
    assert (await pair[1].call("DELETE", "/v1/images/gone:1")).status == 202
    assert (await pair[0].post(**spec))["id"] == "gone:2"
