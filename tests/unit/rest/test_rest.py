"""REST as bytes, over both of its carriers: aiohttp alone, and plain requests read by us with aiohttp behind."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from modelyard.scoring import rest_wire
from modelyard.scoring.dataplane import DataPlane
from modelyard.scoring.rest import Site
from tests.unit.rest.http1 import CARRIERS, LIVE, Answered, Caller, calling, carried, chunked, get, post
from tests.unit.scoring.planes import open_plane

LIMIT = 4096
SCORE = """
import time
def run(data):
    if isinstance(data, dict) and "sleep" in data:
        time.sleep(data["sleep"])
    if isinstance(data, dict) and "mark" in data:
        with open(data["mark"], "a") as ran:
            ran.write("x")
    if isinstance(data, dict) and "long" in data:
        return "x" * data["long"]
    return data
"""
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.5]}
INFER = "/v2/models/flower/infer"
BINARY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters":
                                 {"binary_data_size": 8}}]}).encode()


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[DataPlane]:
    async with open_plane(tmp_path, SCORE, max_message_bytes=LIMIT, timeout_ms=30_000) as it:
        yield it


def _packed(data: bytes, how: str) -> bytes:
    body = gzip.compress(data, mtime=0) if how == "gzip" else zlib.compress(data)
    return post(body, headers=[f"Content-Encoding: {how}"])


def _infer(document: object, *headers: str) -> bytes:
    return post(document if isinstance(document, bytes) else json.dumps(document).encode(), INFER, headers)


PLAIN: dict[str, tuple[bytes, list[int]]] = {
    "get": (get(), [200]), "healthy": (get("/"), [200]), "ready": (get("/v2/health/ready"), [200]),
    "swagger": (get("/swagger.json?version=3"), [200]), "no swagger": (get("/swagger.json?version=4"), [404]),
    "a query that means nothing": (get("/v2?x=/y"), [200]),
    "score": (post(), [200]), "no body": (get("/score", "POST"), [400]), "not json": (post(b"{"), [400]),
    "metadata": (get("/v2/models/flower"), [200]), "model ready": (get("/v2/models/flower/versions/7/ready"), [200]),
    "no model": (get("/v2/models/rose"), [404]), "no version": (get("/v2/models/flower/versions/9"), [404]),
    "infer": (_infer({"id": "9", "inputs": [TENSOR]}), [200]),
    "versioned": (post(json.dumps({"inputs": [TENSOR]}).encode(), "/v2/models/flower/versions/7/infer"), [200]),
    "infer no model": (post(b"{}", "/v2/models/rose/infer"), [404]),
    "infer nothing": (_infer({"inputs": []}), [400]),
    "binary": (_infer(BINARY + np.ones(2, "f4").tobytes(), f"Inference-Header-Content-Length: {len(BINARY)}"), [200]),
    "a wrong length": (_infer(BINARY, "inference-header-content-length: ten"), [400]),
    "a length beyond": (_infer(BINARY, "Inference-Header-Content-Length: 99999"), [400]),
    "own id": (post(headers=["X-Request-Id: mine", "Traceparent: 00-" + "a" * 32 + "-" + "b" * 16 + "-01"]), [200]),
    "a bad id": (post(headers=["x-request-id: " + "a" * 200]), [200]),
    "a body nobody wants": (get()[:-2] + b"Content-Length: 3\r\n\r\nabc", [200]),
    "nowhere": (get("/nowhere"), [404]), "nowhere posted": (post(path="/v2/models/flower/no"), [404]),
    "too deep": (get("/v2/models/flower/versions/7/ready/x"), [404]), "empty name": (get("/v2/models//ready"), [404]),
    "dots": (get("/v2/./health/../health/live"), [404]), "two slashes": (get("/v2//x"), [404]),
    "post to get": (post(path="/v2"), [405]), "get of post": (get("/score"), [405]),
    "delete": (get("/metrics", "DELETE"), [405]), "options": (get("/score", "OPTIONS"), [405]),
    "three in a row": (get("/v2/health/live") + post(b'{"sleep":0.05}') + get("/score"), [200, 200, 405]),
    "keep-alive": (get(headers=["Host: x", "Connection: Keep-Alive"]), [200]),
}
OTHERS: dict[str, tuple[bytes, list[int]]] = {
    "http/1.0 kept": (get(version="1.0", headers=["Connection: keep-alive"]), [200]),
    "percent": (get("/v2/models/%66lower"), [200]), "absolute": (get("http://x/v2"), [200]),
    "odd method": (get("/v2", "PROPFIND"), [405]), "fragment": (get("/v2#x"), [200]),
    "leading line ends": (b"\r\n" + get(), [200]), "chunked": (chunked(b"[1", b"]"), [200]),
    "chunked, then plain": (chunked(b"[1]") + post(), [200, 200]),
    "plain, then chunked": (post() + chunked(b"[2]") + get("/nowhere"), [200, 200, 404]),
    "chunked too large": (chunked(b"1" * (LIMIT + 1)), [413]),
    "gzip": (_packed(b"[1]", "gzip"), [200]), "deflate": (_packed(b"[1]", "deflate"), [200]),
    "gzip too large": (_packed(b"1" * (LIMIT + 1), "gzip"), [413]),
    "another expectation": (post(headers=["Expect: mercy"]), [417]),
    "upgrade": (get(headers=["Host: x", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA"]),
                [200]),
}
LAST: dict[str, tuple[bytes, list[int]]] = {
    "close": (get(headers=["Host: x", "Connection: close"]), [200]),
    "close, posted": (post(headers=["connection: Close"]), [200]),
    "http/1.0": (get(version="1.0", headers=[]), [200]),
    "no host": (get(headers=["X: y"]), [400]), "two hosts": (get(headers=["Host: x", "Host: y"]), [400]),
    "two lengths": (post(headers=["Content-Length: 4"]), [400]), "minus": (post(b"", length=-3), [400]),
    "length and chunked": (chunked(b"[1]", headers=["Content-Length: 3"]), [400]),
    "a bad chunk": (get("/score", "POST", headers=["Host: x", "Transfer-Encoding: chunked"]) + b"zz\r\n", [400]),
    "garbage": (b"\0\1\2garbage\r\n\r\n", [400]), "no method": (b"GARBAGE\r\n\r\n", [400]),
    "a bad name": (get(headers=["Host: x", "a b: c"]), [400]), "no colon": (get(headers=["Host: x", "abc"]), [400]),
    "folded": (get(headers=["Host: x", "a: b", " c"]), [400]), "http/3": (get(version="3.1"), [400]),
    "bare line ends": (b"GET /v2 HTTP/1.1\nHost: x\n\n", [400]),
    "a long path": (get("/" + "a" * 9_000), [400]),
    "a long header": (get(headers=["Host: x", "a: " + "b" * 9_000]), [400]),
    "many headers": (get(headers=["Host: x", *(f"a{n}: b" for n in range(300))]), [400]),
    "not gzip": (post(b"[1]", headers=["Content-Encoding: gzip"]), [400]),
    "a zero byte": (get(headers=["Host: x", "a: b\0c"]), [400]),
}


async def under_way(plane: DataPlane, calls: int = 1) -> None:
    """Until so many calls have arrived."""
    async with asyncio.timeout(10):
        while plane.metrics.in_flight < calls:
            await asyncio.sleep(0.01)


async def exchange(caller: Caller, sent: bytes, answers: int) -> list[Answered]:
    caller.send(sent)
    return [await caller.answer() for _ in range(answers)]


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS, *LAST])
async def test_both_answer_with_the_same_bytes(plane: DataPlane, name: str) -> None:
    sent, statuses = (PLAIN | OTHERS | LAST)[name]
    seen = {}
    for carrier in CARRIERS:
        async with carried(plane, carrier) as (_, address), calling(address) as caller:
            seen[carrier] = await exchange(caller, sent, len(statuses))
            assert [answer.status for answer in seen[carrier]] == statuses, seen[carrier]
            assert await (caller.ended() if name in LAST else caller.is_open()), carrier
    alike = {c: [(a.head, a.body.replace(a.headers.get("x-request-id", "-").encode(), b"")) for a in answers]
             for c, answers in seen.items()}
    assert alike["direct"] == alike["aiohttp"]


def test_what_is_plain_is_read_by_us(plane: DataPlane) -> None:
    """And nothing else: the table above would be as green if aiohttp answered all of it."""
    site = Site(plane)

    def ours(sent: bytes) -> bool:
        return rest_wire.read(site, sent[:sent.find(b"\r\n\r\n") + 4], LIMIT) is not None

    assert [name for name, (sent, _) in PLAIN.items() if not ours(sent)] == []
    assert [name for name, (sent, _) in (OTHERS | LAST).items() if ours(sent)] == [
        "plain, then chunked", "close", "close, posted"]


async def test_refusals_are_problems_and_name_what_is_allowed(plane: DataPlane, carrier: str) -> None:
    async with carried(plane, carrier) as (_, address), calling(address) as caller:
        for sent, status, code, allow in ((get("/no"), 404, "not-found", None), (get("/score"), 405,
                                          "method-not-allowed", "POST"), (post(path="/"), 405, "method-not-allowed",
                                          "GET,HEAD"), (post(b"{"), 400, "invalid", None)):
            answer, = await exchange(caller, sent, 1)
            problem = json.loads(answer.body)
            assert (answer.status, problem["status"], problem["code"]) == (status, status, code)
            assert answer.headers["content-type"] == "application/problem+json" and answer.headers.get("allow") == allow


async def test_head_has_no_body(plane: DataPlane, carrier: str) -> None:
    async with carried(plane, carrier) as (_, address), calling(address) as caller:
        for path in ("/v2", "/nowhere"):
            caller.send(get(path, "HEAD"))
            answer = await caller.answer(bare=True)
            assert int(answer.headers["content-length"]) > 50
        assert await caller.is_open()


async def test_a_body_over_the_limit_is_refused_by_its_length(plane: DataPlane, carrier: str) -> None:
    """At once, before a byte of it; whoever sends it all the same can go on afterwards."""
    async with carried(plane, carrier) as (_, address), calling(address) as caller:
        caller.send(post(b"", length=LIMIT + 1))
        answer = await caller.answer()
        assert answer.status == 413 and str(LIMIT) in json.loads(answer.body)["detail"]
        caller.send(b"x" * (LIMIT + 1))
        assert await caller.is_open()
        answer, = await exchange(caller, post(b'"' + b"x" * (LIMIT - 2) + b'"'), 1)
        assert answer.status == 200


async def test_expect_continue(plane: DataPlane, carrier: str) -> None:
    async with carried(plane, carrier) as (_, address), calling(address) as caller:
        caller.send(post(b"", headers=["Expect: 100-continue"], length=3))
        assert (await caller.answer()).status == 100
        caller.send(b"[1]")
        assert (await caller.answer()).body == b"[1]"


async def test_a_request_in_pieces(plane: DataPlane, carrier: str) -> None:
    """Each piece is a read of its own: the caller waits until the server has had it."""
    async with carried(plane, carrier) as (_, address):
        body = json.dumps({"data": list(range(500))}).encode()
        whole = post(body) + LIVE
        head = whole.find(b"\r\n\r\n") + 4
        for cuts in ((20,), (head,), (head, head + 10, head + len(body)), (head + 1, head + len(body) + 5)):
            async with calling(address) as caller:
                for start, end in zip((0, *cuts), (*cuts, len(whole)), strict=True):
                    caller.send(whole[start:end])
                    await caller.writer.drain()
                    async with calling(address) as other:
                        assert await other.is_open()
                assert (await caller.answer()).body == body.replace(b" ", b"")
                assert (await caller.answer()).body == b'{"live":true}'


async def test_many_in_a_row_are_answered_in_order(plane: DataPlane, carrier: str) -> None:
    """Also those that are refused at once, which must not pile up on the stack."""
    async with carried(plane, carrier) as (_, address), calling(address) as caller:
        count = 1_200
        caller.send(b"".join(post(b"%d" % n) if n % 3 else post(b"{}", "/v2/models/rose/infer") for n in range(count)))
        for n in range(count):
            answer = await caller.answer()
            assert answer.body == b"%d" % n if n % 3 else answer.status == 404


async def test_a_caller_that_does_not_read_is_not_read_from(tmp_path: Path, carrier: str) -> None:
    async with open_plane(tmp_path, SCORE) as plane, carried(plane, carrier) as (_, address), \
            calling(address, limit=1024) as caller:
        size, count = 1 << 20, 12
        caller.send(b"".join(post(b'{"long": %d}' % (size + n)) for n in range(count)))
        for n in range(count):
            answer = await caller.answer()
            assert len(answer.body) == size + n + 2
        assert await caller.is_open()


async def test_draining_answers_and_then_closes(plane: DataPlane, carrier: str) -> None:
    async with carried(plane, carrier) as (transport, address), calling(address) as busy, calling(address) as idle:
        assert await idle.is_open()
        busy.send(post(b'{"sleep": 0.2}') + post(b"2"))
        await under_way(plane)
        plane.drain()
        await transport.drain()
        answer = await busy.answer()
        assert answer.status == 200 and answer.headers["connection"] == "close" and await busy.ended()
        idle.send(get("/v2/health/ready"))
        answer = await idle.answer()
        assert answer.status == 503 and answer.headers["connection"] == "close" and await idle.ended()


async def test_a_call_whose_caller_is_gone_is_not_begun(plane: DataPlane, carrier: str, tmp_path: Path) -> None:
    async with carried(plane, carrier) as (_, address), calling(address) as first:
        first.send(post(b'{"sleep": 0.5}'))
        async with calling(address) as second:
            second.send(post(json.dumps({"mark": str(tmp_path / "ran")}).encode()))
            await under_way(plane, 2)
        assert (await first.answer()).status == 200
        answer, = await exchange(first, post(b"3"), 1)
        assert answer.body == b"3" and not (tmp_path / "ran").exists() and plane.metrics.in_flight == 0


async def test_a_stop_answers_what_is_under_way(plane: DataPlane, carrier: str) -> None:
    async with carried(plane, carrier) as (transport, address), calling(address) as busy, calling(address) as idle:
        assert await idle.is_open()
        busy.send(post(b'{"sleep": 0.3}'))
        await under_way(plane)
        await transport.stop(10)
        assert (await busy.answer()).status == 200 and await busy.ended() and await idle.ended()
        with pytest.raises(OSError):
            async with calling(address):
                pass


async def test_unix_sockets(plane: DataPlane, carrier: str, tmp_path: Path) -> None:
    async with carried(plane, carrier, f"unix:{tmp_path}/http") as (_, address), calling(address) as caller:
        assert [a.body for a in await exchange(caller, post() + chunked(b"[2]"), 2)] == [b"[1]", b"[2]"]


async def test_nothing_comes_for_long(plane: DataPlane) -> None:
    """Between requests the connection ends; in the middle of one with an answer. A call may take its time."""
    async with carried(plane, "direct") as (transport, address), calling(address) as idle, calling(address) as slow, \
            calling(address) as busy:
        assert await idle.is_open()
        slow.send(post(b"[1", length=3))
        busy.send(post(b'{"sleep": 0.3}'))
        await under_way(plane)
        door = transport._door  # type: ignore[attr-defined]
        door.sweep(60, 60)
        assert await idle.is_open(), "not yet"
        door.sweep(-1, -1)  # a second from now
        assert await idle.ended()
        answer = await slow.answer()
        assert answer.status == 408 and answer.headers["connection"] == "close" and await slow.ended()
        assert (await busy.answer()).status == 200 and await busy.is_open()
