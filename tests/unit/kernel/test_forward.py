"""Services apart: any one URL is the whole yard, and services call each other."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from modelyard.core.errors import Conflict, Denied, InUse, Invalid, ModelyardError, NotFound, TooLarge, Unavailable
from modelyard.kernel.forward import Peers
from tests.unit.kernel.garden import SERVICE_TOKEN, Yard, yard


def nobody() -> str:
    """A URL that nothing listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture
async def apart(tmp_path: Path) -> AsyncIterator[tuple[Yard, Yard]]:
    """(garden, orchard), each with its own server; the garden knows where the orchard is."""
    async with (yard(tmp_path, ["orchard"]) as orchard,
                yard(tmp_path, ["garden"], urls={"orchard": orchard.url}) as garden):
        orchard.peers.urls["garden"] = garden.url
        yield garden, orchard


async def test_any_url_is_the_whole_yard(apart: tuple[Yard, Yard]) -> None:
    garden, orchard = apart
    status, headers, body = await garden.call("POST", "/v1/trees", json={"name": "oak"},
                                              headers={"x-request-id": "r-1", "idempotency-key": "k"})
    assert (status, headers["etag"], headers["x-request-id"]) == (201, '"1"', "r-1")
    assert (await orchard.call("GET", "/v1/trees/oak"))[2] == body == (await garden.call("GET", "/v1/trees/oak"))[2]
    for one in apart:
        await one.call("POST", "/v1/plants", json={"name": f"rose-{one is garden}"})
        assert len((await one.call("GET", "/v1/trees?limit=5"))[2]["items"]) == 1
    assert len((await garden.call("GET", "/v1/plants"))[2]["items"]) == 2
    status, headers, body = await garden.call("PATCH", "/v1/trees/oak", json={"height": 0},
                                              headers={"if-match": '"7"'})
    assert (status, body["code"], headers["content-type"]) == (422, "invalid", "application/problem+json")
    assert (await garden.call("PATCH", "/v1/trees/oak", json={}, headers={"if-match": '"7"'}))[0] == 412
    assert (await garden.call("PUT", "/v1/trees"))[0] == 405
    assert (await garden.call("HEAD", "/v1/trees/oak"))[0] == 200
    assert (await garden.call("GET", "/v1/trees/a%2Fb:4"))[2]["id"] == "a/b:4"


async def test_bodies_stream_both_ways(apart: tuple[Yard, Yard]) -> None:
    garden, orchard = apart
    size = 5_000_000

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"z" * (size // 50)

    assert (await garden.call("PUT", "/v1/trees/oak/feed", data=chunks()))[2] == {"bytes": size}
    assert (await garden.call("PUT", "/v1/trees/oak/feed", data=b"z" * size))[2] == {"bytes": size}
    assert max(orchard.soil.fed) <= 65536
    _, headers, text = await garden.call("GET", f"/v1/trees/oak/content?size={size}")
    assert headers["content-length"] == str(len(text)) == str(size)
    async with garden.http.get(f"{garden.url}/v1/trees/oak/content?endless=1") as answer:
        assert await asyncio.wait_for(answer.content.readexactly(15), 5) == b"x" * 15
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
        await garden.call("GET", "/v1/trees/oak/content?break=1&size=200000")


async def test_the_owner_is_down(tmp_path: Path) -> None:
    url = nobody()
    async with yard(tmp_path, ["garden"], urls={"orchard": url}) as garden:
        for method, how in [("GET", {}), ("POST", {"json": {"name": "oak"}}), ("PUT", {"data": b"x" * 1000})]:
            status, headers, body = await garden.call(method, "/v1/trees/oak", **how)
            assert (status, body["code"], headers["retry-after"]) == (503, "unavailable", "2")
            assert body["service"] == "orchard" and url in body["detail"] and "orchard" in body["detail"]
    async with yard(tmp_path, ["garden"]) as garden:
        assert (await garden.call("GET", "/v1/trees"))[0] == 503


async def test_a_circle_is_noticed(tmp_path: Path) -> None:
    async with yard(tmp_path, ["garden"]) as garden:
        garden.peers.urls["orchard"] = garden.url
        status, _, body = await garden.call("GET", "/v1/trees")
        assert (status, body["code"], body["service"]) == (502, "misrouted", "orchard")


async def test_what_callers_claim_is_not_passed_on(tmp_path: Path) -> None:
    seen: list[web.Request] = []

    async def owner(request: web.Request) -> web.Response:
        seen.append(request)
        return web.json_response({}, headers={"Connection": "x-private", "X-Private": "1", "X-Public": "2"})

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", owner)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with yard(tmp_path, ["garden"], urls={"orchard": url}, token="sesame") as garden:
        _, headers, _ = await garden.call("GET", "/v1/trees/a%2Fb?q=1%262", headers={
            "authorization": "Bearer sesame", "x-modelyard-workspace": "other", "x-modelyard-anything": "x",
            "connection": "keep-alive, x-hop", "x-hop": "1", "x-end": "2", "te": "trailers", "x-request-id": "r"})
    await runner.cleanup()
    (request,) = seen
    given = {k.lower(): v for k, v in request.headers.items()}
    assert given["x-modelyard-workspace"] == "default" and given["x-modelyard-service-token"] == SERVICE_TOKEN
    assert given["x-end"] == "2" and given["x-request-id"] == "r"
    assert request.raw_path == "/v1/trees/a%2Fb?q=1%262"
    assert not {"authorization", "x-modelyard-anything", "x-hop", "te"} & given.keys()
    assert headers["x-public"] == "2" and "x-private" not in headers


async def test_stopping_ends_what_is_forwarded(apart: tuple[Yard, Yard]) -> None:
    garden, orchard = apart
    await orchard.call("POST", "/v1/trees", json={"name": "oak"})
    waiting = asyncio.create_task(garden.call("GET", "/v1/trees/oak?wait=60"))
    stream = await garden.http.get(f"{garden.url}/v1/trees/oak/content?endless=1&follow=true")
    await stream.content.readexactly(3)
    began = time.monotonic()
    await garden.server.stop()
    assert (await waiting)[0] == 503
    stream.close()
    assert time.monotonic() - began < 10


async def test_peers_speak_for_a_workspace(apart: tuple[Yard, Yard]) -> None:
    garden, _ = apart
    peers = garden.peers
    made = await peers.call("orchard", "POST", "/v1/trees", json={"name": "oak"}, workspace="other")
    assert made is not None and made["workspace"] == "other"
    assert await peers.call("orchard", "GET", "/v1/trees/oak") is None
    assert await peers.call("orchard", "GET", "/v1/trees/oak", workspace="other") == made
    assert await peers.call("orchard", "GET", "/internal/v1/trees/x?a=1") == {
        "workspace": "default", "query": {"a": "1"}}
    assert Peers.quote("iris:4") == "iris:4" and Peers.quote("a/b?c#é") == "a%2Fb%3Fc%23%C3%A9"
    assert [chunk async for chunk in peers.stream("orchard", "/v1/trees/x/content?size=4")] == [b"xxxx"]


async def test_peers_raise_the_tree(apart: tuple[Yard, Yard]) -> None:
    garden, orchard = apart
    peers, soil = garden.peers, orchard.soil
    errors: list[ModelyardError] = [
        Invalid("wrong", errors=[{"field": "a", "message": "b"}]), TooLarge("big"), Conflict("old", code="stale"),
        Conflict("gone", code="image-gone"), InUse("held", blockers=[{"id": "x"}]), Denied("no"),
        Unavailable("no rain", retry_after=4)]
    for error in errors:
        soil.fail = [error]
        with pytest.raises(type(error)) as caught:
            await peers.call("orchard", "POST", "/v1/trees/oak/boom")
        assert type(caught.value) is type(error)
        assert (caught.value.message, caught.value.code) == (error.message, error.code)
        assert {**error.detail}.items() <= caught.value.detail.items()
    with pytest.raises(Unavailable):  # a fault over there may pass
        await peers.call("orchard", "POST", "/v1/trees/oak/boom")
    with pytest.raises(NotFound):
        _ = [c async for c in peers.stream("orchard", "/v1/trees/x/content?absent=1")]
    with pytest.raises(Unavailable, match="does not run it"):
        await peers.call("orchard", "GET", "/v1/nothing")
    lost = Peers({"orchard": nobody()}, "")
    with pytest.raises(Unavailable, match="does not answer"):
        await lost.call("orchard", "GET", "/v1/trees")
    with pytest.raises(Unavailable, match="no URL"):
        await lost.call("garden", "GET", "/v1/plants")
    stranger = Peers(peers.urls, "wrong")
    with pytest.raises(Denied):
        await stranger.call("orchard", "GET", "/v1/trees")
    await stranger.close()
    await lost.close()
