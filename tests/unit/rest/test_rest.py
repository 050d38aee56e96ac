"""REST as bytes, over both of its carriers: aiohttp alone, and plain requests read by us with aiohttp behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelyard.scoring import rest_wire
from modelyard.scoring.dataplane import DataPlane
from modelyard.scoring.rest import Site
from tests.unit.rest.exchanges import LAST, LIMIT, OTHERS, PLAIN
from tests.unit.rest.http1 import CARRIERS, LIVE, Answered, Caller, calling, carried, chunked, get, post
from tests.unit.scoring.planes import open_plane

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


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[DataPlane]:
    async with open_plane(tmp_path, SCORE, max_message_bytes=LIMIT, timeout_ms=30_000) as it:
        yield it


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


UNREAD = {name: sent for name, (sent, [status, *_]) in LAST.items() if status >= 400}


async def test_what_cannot_be_read_is_a_problem_counted_and_not_logged(
        plane: DataPlane, carrier: str, caplog: pytest.LogCaptureFixture) -> None:
    async with carried(plane, carrier) as (_, address):
        for name, sent in {**UNREAD, "no expectation": OTHERS["another expectation"][0],
                           "packed oddly": OTHERS["an unknown encoding"][0]}.items():
            before = refusals(plane)
            async with calling(address) as caller:
                answer, = await exchange(caller, sent, 1)
                problem = json.loads(answer.body)
                assert answer.headers["content-type"] == "application/problem+json", name
                assert problem["status"] == answer.status and len(problem["detail"]) > 20, (name, problem)
                assert refusals(plane) == before + 1, name
                assert await caller.ended() if name in UNREAD else await caller.is_open(), name
    assert not caplog.records and plane.metrics.in_flight == 0


async def test_a_fault_of_ours_is_logged(plane: DataPlane, caplog: pytest.LogCaptureFixture) -> None:
    """As before: what is quiet is what callers do wrong."""
    async with carried(plane, "aiohttp") as (transport, address), calling(address) as caller:
        transport._site.find = lambda method, path: 1 // 0  # type: ignore[assignment,return-value,misc]
        answer, = await exchange(caller, get(), 1)
        assert answer.status == 500 and json.loads(answer.body)["code"] == "internal-server-error"
        assert await caller.ended()
    assert "ZeroDivisionError" in caplog.text and "Traceback" in caplog.text


def refusals(plane: DataPlane) -> int:
    return sum(calls for (model, _, _), calls in plane.metrics._calls.items() if not model)


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
        for cuts in ((5,), (20, 40), (30, head - 3, head - 1), (head,), (head, head + 10, head + len(body)),
                     (head + 1, head + len(body) + 5), (head + len(body) + 50,)):
            async with calling(address) as caller:
                for start, end in zip((0, *cuts), (*cuts, len(whole)), strict=True):
                    caller.send(whole[start:end])
                    await caller.writer.drain()
                    async with calling(address) as other:
                        assert await other.is_open()
                assert (await caller.answer()).body == body.replace(b" ", b"")
                assert (await caller.answer()).body == b'{"live":true}'


async def test_what_comes_while_the_other_server_opens(plane: DataPlane) -> None:
    """It is opened for the first who needs it; others come meanwhile, and more of every request."""
    async with carried(plane, "direct") as (_, address), contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(calling(address)) for _ in range(4)]
        whole = chunked(b"[1]") + LIVE
        for caller, cut in zip(callers, (70, 75, 80, 85), strict=True):
            caller.send(whole[:cut])
        for caller, cut in zip(callers, (70, 75, 80, 85), strict=True):
            await caller.writer.drain()
            caller.send(whole[cut:])
        for caller in callers:
            assert (await caller.answer()).body == b"[1]" and (await caller.answer()).body == b'{"live":true}'


@pytest.mark.parametrize("name", [name for name, (sent, _) in LAST.items() if sent.startswith((b"GET", b"POST"))])
async def test_what_is_wrong_in_the_second_piece(plane: DataPlane, carrier: str, name: str) -> None:
    """The first line is right and alone; what comes behind it is still judged as if it had come at once."""
    sent, statuses = LAST[name]
    cut = sent.find(b"\n") + 1
    async with carried(plane, carrier) as (_, address), calling(address) as caller:
        caller.send(sent[:cut])
        async with calling(address) as other:
            assert await other.is_open()
        assert [answer.status for answer in await exchange(caller, sent[cut:], 1)] == statuses
        assert await caller.ended()


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
            calling(address) as slower, calling(address) as busy:
        assert await idle.is_open()
        slow.send(post(b"[1", length=3))
        slower.send(post()[:30])
        busy.send(post(b'{"sleep": 0.3}'))
        await under_way(plane)
        door = transport._door  # type: ignore[attr-defined]
        door.sweep(60, 60)
        assert await idle.is_open(), "not yet"
        door.sweep(-1, -1)  # a second from now
        assert await idle.ended()
        for late in (slow, slower):
            answer = await late.answer()
            assert answer.status == 408 and answer.headers["connection"] == "close" and await late.ended()
        assert (await busy.answer()).status == 200 and await busy.is_open()


async def test_a_body_that_does_not_go_on(tmp_path: Path, carrier: str) -> None:
    """Also in chunks, which aiohttp reads; as long as something comes it is waited for."""
    async with open_plane(tmp_path, SCORE, timeout_ms=600) as plane, carried(plane, carrier) as (_, address), \
            calling(address) as silent, calling(address) as slow:
        head = get("/score", "POST", headers=["Host: x", "Transfer-Encoding: chunked"])
        silent.send(head + b"2\r\n[1")
        slow.send(head)
        began = asyncio.get_running_loop().time()
        for byte in b"[2222]":
            slow.send(b"1\r\n%c\r\n" % byte)
            await asyncio.sleep(0.12)  # it is this slow
        slow.send(b"0\r\n\r\n")
        assert (await slow.answer()).body == b"[2222]" and asyncio.get_running_loop().time() - began > 0.6
        answer = await silent.answer()
        assert answer.status == 408 and "0.6 s" in json.loads(answer.body)["detail"] and await silent.ended()
