"""Retries, errors and streams, against small servers that misbehave on purpose."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from modelyard import AsyncClient
from modelyard.client.http import Http, path
from modelyard.client.problems import from_problem
from modelyard.core import errors

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def http(url: str, timeout_s: float = 5) -> AsyncIterator[Http]:
    session = Http(url, "secret", timeout_s)
    try:
        yield session
    finally:
        await session.close()


@pytest.mark.slow
async def test_post_is_repeated_under_one_key() -> None:
    keys = []

    async def handler(request: web.Request) -> web.Response:
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) == 1:
            assert request.transport is not None
            request.transport.close()
        if len(keys) < 4:
            return web.json_response({"code": "unavailable", "detail": "busy"}, status=503)
        return web.json_response({"token": request.headers["Authorization"]})

    async with serving(handler) as url, http(url) as session:
        assert await session.json("POST", "/v1/models", json={}) == {"token": "Bearer secret"}
    assert len(keys) == 4 and len(set(keys)) == 1


async def test_a_call_that_must_not_be_repeated_is_not() -> None:
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Idempotency-Key"))
        return web.json_response({"code": "unavailable", "detail": "busy"}, status=503)

    async with serving(handler) as url, http(url) as session:
        with pytest.raises(errors.Unavailable, match="busy"):
            await session.json("POST", "/score", json={}, repeat=False)
    assert seen == [None]


async def test_nothing_there_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    async with http(url) as session:
        with pytest.raises(errors.Unavailable) as caught:
            await session.json("GET", "/v1/models")
    assert str(caught.value) == f"nothing answers at {url}; start it with: modelyard serve"


async def test_silence_is_unavailable() -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    async with serving(handler) as url, http(url, timeout_s=0.1) as session:
        with pytest.raises(errors.Unavailable, match="did not answer in time"):
            await session.json("GET", "/", repeat=False)


@pytest.mark.parametrize(("status", "code", "expected"), [
    (422, "invalid", errors.Invalid), (413, "too-large", errors.TooLarge), (404, "not-found", errors.NotFound),
    (409, "name-taken", errors.Conflict), (412, "stale", errors.Conflict), (412, "in-use", errors.InUse),
    (401, "unauthenticated", errors.Denied), (503, "", errors.Unavailable), (422, "build-failed", errors.BuildFailed),
    (500, "internal", errors.ModelyardError), (418, "", errors.ModelyardError),
])
def test_problems_become_our_errors(status: int, code: str, expected: type[errors.ModelyardError]) -> None:
    exc = from_problem(status, {"code": code, "detail": "why", "blockers": [1], "errors": []}, "7")
    assert type(exc) is expected
    assert exc.message == "why" and exc.detail["blockers"] == [1] and exc.detail["retry_after"] == 7
    assert exc.code == (code or expected.code)


async def test_an_answer_that_is_no_problem_is_told_as_it_is() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=404, text="<h1>nginx</h1>")

    async with serving(handler) as url, http(url) as session:
        with pytest.raises(errors.NotFound, match="404 Not Found: <h1>nginx</h1>"):
            await session.json("GET", "/")


@pytest.mark.parametrize("url", ["", "127.0.0.1:8700", "ftp://here", "http://", "http://[::1"])
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(errors.Invalid, match=r"http://127\.0\.0\.1:8700"):
        Http(url, None, 1)


def test_a_part_of_a_path_stays_one_part() -> None:
    assert path("models", "iris:4", "content") == "/v1/models/iris:4/content"
    assert path("models", "../../x y?#") == "/v1/models/..%2F..%2Fx%20y%3F%23"


async def test_events_go_on_behind_the_last_one() -> None:
    """A connection is cut in the middle; the next one starts behind what was seen, and nothing comes twice."""
    asked: list[str | None] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("Last-Event-ID"))
        answer = web.StreamResponse()
        await answer.prepare(request)
        first = int(asked[-1] or 0) + 1
        for n in (first, first + 1):
            await answer.write(b": still here\n\n" + b"id: %d\ndata: " % n + event(n) + b"\n\n")
        assert request.transport is not None
        request.transport.close()
        return answer

    async with serving(handler) as url, AsyncClient(url) as yard:
        found = []
        async for one in yard.events(["model.*"], after="beginning"):
            found.append((one.cursor, one.topic, int(one.sequence)))
            if len(found) == 6:
                break
    assert found == [(str(n), "model.registered", n) for n in range(1, 7)]
    assert asked == [None, "2", "4"]


def event(n: int) -> bytes:
    import json

    return json.dumps({
        "specversion": "1.0", "id": f"e{n}", "source": "/modelyard/registry", "type": "model.registered.v1",
        "subject": "iris:1", "time": "2026-11-23T14:05:06Z", "partitionkey": "default/iris:1",
        "sequence": f"{n:020d}", "data": {"long": "x" * 300_000},
    }).encode()
