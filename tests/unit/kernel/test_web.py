"""The frame around every request: problems, ids, bodies, preconditions, streams, waiting, health, metrics."""

import asyncio
import contextlib
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelyard.core.errors import BuildFailed, Denied, Unavailable
from modelyard.kernel import call, web
from tests.unit.kernel.garden import Plant, Yard, yard

YAML = {"content-type": "application/yaml"}
JSON = {"content-type": "application/json"}


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Yard]:
    async with yard(tmp_path) as one:
        yield one


async def raw(here: Yard, data: bytes, headers: dict[str, str] = JSON, path: str = "/v1/plants") -> tuple[int, Any]:
    status, _, body = await here.call("POST", path, data=data, headers=headers)
    return status, body


def is_problem(headers: Any, body: Any, status: int, code: str) -> None:
    assert headers["content-type"] == "application/problem+json"
    assert {"type", "title", "status", "code", "detail", "errors", "help", "request_id"} <= body.keys()
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == headers["x-request-id"]
    assert body["type"] and body["title"] and body["detail"]


async def test_create_show_list_change(here: Yard) -> None:
    status, headers, body = await here.call("POST", "/v1/plants", json={"name": "rose", "tags": {"a": "b"}})
    assert (status, headers["etag"], headers["location"]) == (201, '"1"', "/v1/plants/rose")
    assert body["id"] == "rose" and body["workspace"] == "default"
    assert not {"revision", "sequence", "made_by", "deleted", "due", "lease", "attempts", "secret"} & body.keys()
    assert (await here.call("GET", "/v1/plants/rose"))[2] == body
    assert (await here.call("GET", "/v1/plants"))[2] == {"items": [body], "next": None}
    status, headers, changed = await here.call("PATCH", "/v1/plants/rose", json={"height": 3, "tags": {"a": None}})
    assert (status, headers["etag"], changed["height"], changed["tags"]) == (200, '"2"', 3, {})


async def test_refs_arrive_whole(here: Yard) -> None:
    for ref in ("iris:4", "iris@champion", "a%2Fb", "caf%C3%A9"):
        _, headers, body = await here.call("GET", f"/v1/plants/{ref}")
        is_problem(headers, body, 404, "not-found")
        assert body["id"] == {"a%2Fb": "a/b", "caf%C3%A9": "café"}.get(ref, ref)


async def test_head_answers_where_get_does(here: Yard) -> None:
    await here.call("POST", "/v1/plants", json={"name": "rose"})
    for path in ("/v1/plants", "/v1/plants/rose", "/livez", "/v1/openapi.json", "/v1/plants/rose/content?size=9",
                 "/v1/events?follow=false"):
        status, _, text = await here.call("HEAD", path)
        assert (status, text) == (200, ""), path
    assert (await here.call("HEAD", "/v1/plants/lily"))[0] == 404


async def test_unknown_route_and_method(here: Yard) -> None:
    _, headers, body = await here.call("GET", "/v1/nothing")
    is_problem(headers, body, 404, "no-such-route")
    _, headers, body = await here.call("PUT", "/v1/plants/rose")
    is_problem(headers, body, 405, "method-not-allowed")
    assert set(headers["allow"].split(", ")) == {"GET", "HEAD", "PATCH", "DELETE"}


async def test_every_problem_of_a_body_at_once(here: Yard) -> None:
    wrong = {"name": "x", "height": "2", "tags": {"k": 1}, "colour": "red"}
    _, headers, body = await here.call("POST", "/v1/plants", json=wrong)
    is_problem(headers, body, 422, "invalid")
    assert {e["field"] for e in body["errors"]} == {"name", "height", "tags.k", "colour"}
    assert all(e["message"] for e in body["errors"])
    assert (await here.call("GET", "/v1/plants"))[2]["items"] == []


@pytest.mark.parametrize("height", [True, 1.5, "1", None, 0, [1]])
async def test_json_types_are_kept_apart(here: Yard, height: Any) -> None:
    status, _, body = await here.call("POST", "/v1/plants", json={"name": "rose", "height": height})
    assert status == 422 and body["errors"][0]["field"] == "height"


@pytest.mark.parametrize("data", [
    b"", b"{", b"{]", b'{"name": "rose", "name": "lily"}', b'{"name": "rose", "tags": {"a": "1", "a": "2"}}',
    b'{"name": "rose", "height": NaN}', b'{"name": "rose", "height": Infinity}', b'{"name": "rose", "height": 1e999}',
    b'{"name": "\\ud800"}', b'{"name": "\xff"}', b'{"height": 99999999999999999999}', b"[" * 5000,
    b'{"a":' * 70 + b"1" + b"}" * 70, b"9" * 5000,
])
async def test_malformed_json(here: Yard, data: bytes) -> None:
    _, headers, body = await here.call("POST", "/v1/plants", data=data, headers=JSON)
    is_problem(headers, body, 400, "malformed")


@pytest.mark.parametrize("data", [
    b"a: [", b"name: rose\nname: lily", b"name: &x rose\ntags: {k: *x}", b"name: !!python/object:os.system rose",
    b"height: .nan\nname: !!float rose", b"name: rose\n---\nname: lily", b"1: rose", b"[a]: rose", b"{a: b}: rose",
    b"[" * 200_000, b"- " * 100, b"a: &a [*a]", b"name: \x00", b"tags: !!set {a, b}", b"null: rose",
])
async def test_malformed_yaml(here: Yard, data: bytes) -> None:
    _, headers, body = await here.call("POST", "/v1/plants", data=data, headers=YAML)
    is_problem(headers, body, 400, "malformed")


async def test_yaml_is_read_without_guessing(here: Yard) -> None:
    text = b'name: "no"\nheight: 12\ntags:\n  country: no\n  day: 2026-11-23\n  version: "1.20"\n  hex: 0x1f\n'
    status, body = await raw(here, text, YAML)
    assert status == 201
    assert body["tags"] == {"country": "no", "day": "2026-11-23", "version": "1.20", "hex": "0x1f"}
    status, body = await raw(here, b"name: lily\ntags: {a: 1.20}\n", {"content-type": "application/x-yaml"})
    assert status == 422 and body["errors"][0]["field"] == "tags.a"
    assert (await raw(here, b"- name: rose", YAML))[0] == 422


async def test_media_types(here: Yard) -> None:
    good = b'{"name": "rose"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/html"):
        status, headers, body = await here.call("POST", "/v1/plants", data=good, headers={"content-type": kind})
        is_problem(headers, body, 415, "unsupported-media-type")
    status, body = await raw(here, good, {"content-type": "application/octet-stream"})
    assert (status, body["code"]) == (415, "unsupported-media-type")
    status, body = await raw(here, good, {"content-type": "application/json; charset=latin-1"})
    assert status == 415
    status, body = await raw(here, gzip.compress(good), {**JSON, "content-encoding": "gzip"})
    assert status == 415
    assert (await raw(here, good, {"content-type": "application/vnd.x+json; charset=utf-8"}))[0] == 201


async def test_a_body_without_type(here: Yard) -> None:
    async def send(method: str, path: str) -> int:
        async with here.http.request(method, here.url + path, data=b"{}", skip_auto_headers=["content-type"]) as answer:
            return answer.status

    assert await send("POST", "/v1/plants") == 415
    assert await send("PUT", "/v1/plants/rose/feed") == 201  # curl -T names none


async def test_documents_have_a_size(here: Yard) -> None:
    big = json.dumps({"name": "rose", "tags": {"k": "x" * 1024 * 1024}}).encode()
    _, headers, body = await here.call("POST", "/v1/plants", data=big, headers=JSON)
    is_problem(headers, body, 413, "too-large")
    assert "1048576" in body["detail"]

    async def chunked() -> AsyncIterator[bytes]:
        for start in range(0, len(big), 65536):
            yield big[start:start + 65536]

    _, headers, body = await here.call("POST", "/v1/plants", data=chunked(), headers=JSON)
    is_problem(headers, body, 413, "too-large")


async def test_if_match(here: Yard) -> None:
    await here.call("POST", "/v1/plants", json={"name": "rose"})
    for tag, wanted in [('"1"', 200), ('"1"', 412), ('"2"', 200), ("*", 200), ('"4"', 200), ('"9", "5"', 200),
                        ('W/"6"', 412), ('"abc"', 412), ("6", 200)]:
        status, headers, body = await here.call("PATCH", "/v1/plants/rose", json={"height": 2},
                                                headers={"if-match": tag})
        assert status == wanted, tag
        if wanted == 412:
            is_problem(headers, body, 412, "stale")


async def test_fifty_writers_with_one_etag(here: Yard) -> None:
    await here.call("POST", "/v1/plants", json={"name": "rose"})
    answers = await asyncio.gather(*(here.call("PATCH", "/v1/plants/rose", json={"height": n + 1},
                                               headers={"if-match": '"1"'}) for n in range(50)))
    assert sorted(a[0] for a in answers) == [200] + [412] * 49


async def test_merge_patch(here: Yard) -> None:
    await here.call("POST", "/v1/plants", json={"name": "rose", "height": 4, "tags": {"a": "1", "b": "2"}})
    patch = {"tags": {"a": None, "c": "3"}, "height": None}
    headers = {"content-type": "application/merge-patch+json"}
    _, _, body = await here.call("PATCH", "/v1/plants/rose", data=json.dumps(patch), headers=headers)
    assert (body["tags"], body["height"]) == ({"b": "2", "c": "3"}, 1)
    for wrong, field in [({"tags": {"a": 1}}, "tags.a"), ({"colour": "red"}, "colour"), ({"name": None}, "name")]:
        status, _, body = await here.call("PATCH", "/v1/plants/rose", json=wrong)
        assert status == 422 and [e["field"] for e in body["errors"]] == [field]
    assert (await here.call("PATCH", "/v1/plants/rose", json=[1]))[0] == 422


async def test_blockers_are_told(here: Yard) -> None:
    await here.call("POST", "/v1/plants", json={"name": "rose"})
    _, headers, body = await here.call("DELETE", "/v1/plants/rose")
    is_problem(headers, body, 412, "in-use")
    assert body["blockers"] == [{"kind": "bee", "id": "b", "phase": "busy"}]


@pytest.mark.parametrize(("error", "status", "code"), [
    (Unavailable("no rain", retry_after=7), 503, "unavailable"), (Denied("not yours"), 403, "denied"),
    (BuildFailed("score.py, line 3: no run"), 422, "build-failed"), (KeyError("secret of the rake"), 500, "internal"),
])
async def test_the_tree_as_statuses(here: Yard, error: Exception, status: int, code: str) -> None:
    here.soil.fail = [error]
    _, headers, body = await here.call("POST", "/v1/plants/rose/boom")
    is_problem(headers, body, status, code)
    assert "secret" not in json.dumps(body) and "Traceback" not in json.dumps(body)
    assert headers.get("retry-after") == ("7" if status == 503 else None)


async def test_request_ids_and_traces(here: Yard) -> None:
    _, headers, _ = await here.call("GET", "/livez", headers={"x-request-id": "abc-1.2:3"})
    assert headers["x-request-id"] == "abc-1.2:3"
    for insane in ("a b", "x" * 129, "é", "<script>"):
        _, headers, _ = await here.call("GET", "/livez", headers={"x-request-id": insane})
        assert headers["x-request-id"] not in (insane, "")
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    _, headers, _ = await here.call("POST", "/v1/plants", json={"name": "rose"},
                                    headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    assert headers["traceparent"].split("-")[1] == trace
    pending = await here.contexts["garden"].store.pending(10)
    event = pending[0].events[0]
    assert event.traceparent is not None and event.traceparent.split("-")[1] == trace


async def test_upload_and_download_stream(here: Yard) -> None:
    size = 3_000_000

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"y" * (size // 30)

    status, _, body = await here.call("PUT", "/v1/plants/rose/feed", data=chunks())
    assert (status, body) == (201, {"bytes": size})
    assert max(here.soil.fed) <= 65536
    status, headers, text = await here.call("GET", f"/v1/plants/rose/content?size={size}")
    assert (status, headers["content-length"], text) == (200, str(size), "x" * size)


async def test_a_stream_that_breaks_is_seen(here: Yard) -> None:
    _, headers, body = await here.call("GET", "/v1/plants/rose/content?absent=1")
    is_problem(headers, body, 404, "not-found")
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
        await here.call("GET", "/v1/plants/rose/content?break=1&size=200000")


async def test_nobody_follows_for_nobody(here: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "GONE_S", 0.05)
    async with here.http.get(here.url + "/v1/plants/rose/content?endless=1&silent=1") as answer:
        await answer.content.readexactly(11)
        await asyncio.sleep(0.2)
        assert here.soil.ended == 0
        answer.close()
    for _ in range(100):
        if here.soil.ended:
            break
        await asyncio.sleep(0.02)
    assert here.soil.ended == 1


async def test_a_cut_upload_is_an_error_for_the_handler(here: Yard) -> None:
    host, port = here.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PUT /v1/plants/rose/feed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await asyncio.sleep(0.1)
    assert here.soil.fed == []


async def test_long_poll(here: Yard) -> None:
    await here.call("POST", "/v1/plants", json={"name": "rose"})
    began = time.monotonic()
    status, _, body = await here.call("GET", "/v1/plants/rose?wait=0.3")
    assert (status, body["phase"]) == (200, "seed") and 0.25 < time.monotonic() - began < 3
    waiting = asyncio.create_task(here.call("GET", "/v1/plants/rose?wait=30"))
    await asyncio.sleep(0.1)
    await here.contexts["garden"].change(Plant, "rose", lambda d: (d.evolve(phase="bloom"), ()))
    assert (await asyncio.wait_for(waiting, 5))[2]["phase"] == "bloom"
    for wrong in ("soon", "-1", "nan", "1e9"):
        status, _, body = await here.call("GET", f"/v1/plants/rose?wait={wrong}")
        assert status == 422 and body["errors"][0]["field"] == "wait"


async def test_whoever_hangs_up_while_waiting_is_no_error(here: Yard, caplog: pytest.LogCaptureFixture) -> None:
    await here.call("POST", "/v1/plants", json={"name": "rose"})
    waiting = asyncio.create_task(here.call("GET", "/v1/plants/rose?wait=30"))

    async def running(number: float) -> None:
        async with asyncio.timeout(10):
            while call_count() != number:
                await asyncio.sleep(0.02)

    await running(1)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await running(0)
    assert (await here.call("GET", "/v1/plants/rose"))[0] == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def call_count() -> float:
    return web.RUNNING._value.get()


async def test_stopping_ends_waits_and_streams_and_answers_what_runs(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        await here.call("POST", "/v1/plants", json={"name": "rose"})
        tasks = [asyncio.create_task(here.call(*request)) for request in (
            ("GET", "/v1/plants/rose?wait=60"), ("GET", "/v1/events"), ("GET", "/v1/plants/rose/content?endless=1"),
            ("POST", "/v1/plants/rose/slow"))]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        stopping = asyncio.create_task(here.server.stop())
        await asyncio.sleep(0.2)
        here.soil.gate.set()
        await stopping
        assert [answer[0] for answer in await asyncio.gather(*tasks)] == [200, 200, 200, 202]
        assert time.monotonic() - began < 5
        with pytest.raises(aiohttp.ClientConnectionError):
            await here.call("GET", "/livez")


async def test_health(here: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await here.call("GET", "/livez"))[2] == {"status": "ok"}
    status, _, body = await here.call("GET", "/readyz")
    assert (status, body["status"], body["services"]) == (200, "ok", ["garden", "orchard"])
    await here.bus.close()
    status, _, body = await here.call("GET", "/readyz")
    assert (status, body["status"]) == (200, "degraded") and body["checks"]["bus"] != "ok"
    await here.contexts["garden"].store.close()
    status, headers, body = await here.call("GET", "/readyz")
    is_problem(headers, body, 503, "not-ready")
    assert headers["retry-after"] and "store of garden" in body["detail"]
    assert (await here.call("GET", "/livez"))[0] == 200


async def test_metrics_by_route(here: Yard) -> None:
    for name in ("rose", "lily"):
        await here.call("GET", f"/v1/plants/{name}")
    await here.call("GET", "/nowhere/at/all")
    _, headers, text = await here.call("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain")
    line = 'modelyard_http_requests_total{method="GET",route="/v1/plants/{ref}",service="garden",status="404"}'
    assert any(row.startswith(line) and float(row.split()[-1]) >= 2 for row in text.splitlines())
    assert 'route="unmatched"' in text and "/nowhere" not in text and "modelyard_http_request_seconds_bucket" in text


async def test_header_hygiene(here: Yard) -> None:
    _, headers, _ = await here.call("GET", "/v1/plants")
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert headers["server"] == "modelyard"


ROOM = Path("/proc/sys/net/core/somaxconn")


@pytest.mark.skipif(not ROOM.exists() or int(ROOM.read_text()) < 1024, reason="the system lets fewer wait")
async def test_many_connections_wait_while_the_loop_is_busy(here: Yard) -> None:
    """One that finds no room would be tried again a second later, and then after three."""
    host, port = here.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(600)]
        for one in sockets:  # nothing is accepted meanwhile: this is the server's loop
            one.setblocking(False)
            one.connect_ex((host, int(port)))
        there = [one for one in sockets if one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01"]
        assert len(there) == len(sockets)
    assert (await here.call("GET", "/livez"))[0] == 200
