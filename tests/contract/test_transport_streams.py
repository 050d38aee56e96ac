"""ModelStreamInfer on both transports: order, errors by message, back-pressure both ways, capture, many at once."""

from __future__ import annotations

import asyncio
import re
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.contract.transports import INFER, STREAM, Served, ask, failed, outcome, serving, streamed, wait_for
from tests.raw_h2 import RawClient, framed, unframed

MIB = 1 << 20


def test_order_is_kept_and_a_bad_message_is_answered_in_its_place(channel: grpc.Channel) -> None:
    stream = channel.stream_stream(STREAM)
    bodies = [ask(id="0"), ask(id="1", model="no"), ask(id="2", fail=True), b"\xff", ask(id="4")]
    answers = [streamed(body) for body in stream(iter(bodies), timeout=20)]
    assert [a.infer_response.id for a in answers] == ["0", "1", "2", "", "4"]
    assert [a.error_message.partition(":")[0] for a in answers] == ["", "NOT_FOUND", "INTERNAL", "INVALID_ARGUMENT", ""]


def test_each_message_is_answered_before_the_next_is_sent(channel: grpc.Channel) -> None:
    """A caller that waits for an answer before it goes on."""
    turn = threading.Semaphore(1)

    def bodies() -> Iterator[bytes]:
        for n in range(50):
            assert turn.acquire(timeout=10)
            yield ask(id=str(n))

    seen = []
    for body in channel.stream_stream(STREAM)(bodies(), timeout=20):
        seen.append(streamed(body).infer_response.id)
        turn.release()
    assert seen == [str(n) for n in range(50)]


def test_many_messages_in_flight_on_one_stream(channel: grpc.Channel) -> None:
    ids = [str(n) for n in range(3_000)]
    answers = channel.stream_stream(STREAM)((ask(id=n) for n in ids), timeout=60)
    assert [streamed(body).infer_response.id for body in answers] == ids


def test_messages_that_arrive_in_one_piece_are_answered_together(served: Served) -> None:
    with RawClient(served.address) as client:
        stream = client.call(STREAM)
        client.send(stream, framed(*(ask(id=str(n)) for n in range(100))))
        heard = client.heard[stream]
        client.until(lambda: len(unframed_so_far(heard.body)) == 100)
        assert not heard.ended, "the stream goes on"
        client.send(stream, b"", end=True)
        assert client.answer(stream).status == "0"
        assert [streamed(m).infer_response.id for m in unframed(heard.body)] == [str(n) for n in range(100)]


BATCHED = """
import time
import numpy as np
def run_batch(data: np.ndarray):
    time.sleep(0.02)
    return data
"""


@pytest.mark.parametrize("transport", ["grpc", "h2"])
def test_one_prediction_answers_many_messages_of_a_stream(transport: str, tmp_path: Path) -> None:
    with (serving(tmp_path, transport, score=BATCHED) as own, grpc.insecure_channel(own.address) as channel):
        sent = [np.array([float(n)]) for n in range(100)]
        answers = channel.stream_stream(STREAM)((ask(x, id=str(n)) for n, x in enumerate(sent)), timeout=60)
        got = [outcome(streamed(body).infer_response.SerializeToString()) for body in answers]
        assert [x.tolist() for x in got] == [x.tolist() for x in sent]
        shown = own.replica.get("/metrics")[1].decode()
        (batches,) = re.findall(r"^modelyard_scoring_batch_calls_count\S* (\S+)", shown, re.MULTILINE)
        assert 1 <= float(batches) <= 50, "100 where each waits for the one before"


def unframed_so_far(body: bytes) -> list[bytes]:
    try:
        return unframed(body)
    except AssertionError:
        return []


def test_every_message_of_a_stream_is_captured(channel: grpc.Channel, served: Served) -> None:
    mine = uuid.uuid4().hex
    bodies = [ask(model="no" if n == 3 else "flower", fail=n == 4) for n in range(6)]
    answers = list(channel.stream_stream(STREAM)(iter(bodies), metadata=(("x-request-id", mine),), timeout=20))
    records = wait_for(lambda: len(found := served.captured(mine)) == 5 and found)
    admitted = [n for n in range(6) if n != 3]  # a refused call is counted, not recorded
    assert [r["request"] for r in records] == [bodies[n] for n in admitted]
    assert [r["response"] for r in records] == [answers[n] for n in admitted]
    assert [r["status"] for r in records] == ["OK", "OK", "OK", "INTERNAL", "OK"]
    assert {(r["protocol"], r["method"]) for r in records} == {("stream", "ModelStreamInfer")}
    assert len({r["prediction_id"] for r in records}) == 5


def test_a_message_of_a_stream_is_captured_under_its_own_id(channel: grpc.Channel, served: Served) -> None:
    mine = uuid.uuid4().hex
    given = [f"{mine}/0", "", f"{mine}/2", mine + "\n", f"{mine}/4"]  # the fourth would be no x-request-id either
    bodies = [ask(id=id_, fail=n == 4) for n, id_ in enumerate(given)]
    answers = list(channel.stream_stream(STREAM)(iter(bodies), metadata=(("x-request-id", mine),), timeout=20))
    assert [streamed(a).infer_response.id for a in answers] == given
    for n in (0, 2, 4):
        (record,) = wait_for(lambda n=n: served.captured(given[n]))
        assert record["request"] == bodies[n] and record["status"] == ("INTERNAL" if n == 4 else "OK")
    shared = wait_for(lambda: len(found := served.captured(mine)) == 2 and found)
    assert [r["request"] for r in shared] == [bodies[1], bodies[3]]


@pytest.mark.slow
def test_a_caller_that_does_not_read_is_not_read_from(served: Served) -> None:
    """Back-pressure both ways: what is under way for a stream is bounded, whatever its caller sends."""
    body = framed(ask(np.zeros(8_000)))
    with RawClient(served.address, credit=False) as client:
        stream = client.call(STREAM)
        sent, stalled = 0, 0
        while stalled < 20:  # a second in which nothing more is taken
            took = client.send(stream, body[sent % len(body):])
            sent += took
            stalled = 0 if took else stalled + 1
            client.read(0.05 if not took else 0.0001)
            assert sent < 128 * MIB, "the server reads on, though its answers are not taken"
        assert served.in_flight() <= 512
        client.credit = True
        heard = client.heard[stream]
        client.give_credit(stream, 256 * MIB)
        rest = body[sent % len(body):] if sent % len(body) else b""
        while rest:
            rest = rest[client.send(stream, rest):]
            client.read(0.05)
        client.send(stream, b"", end=True)
        assert client.answer(stream, 60).status == "0"
        answers = unframed(heard.body)
        assert len(answers) == -(-sent // len(body)) and all(not streamed(a).error_message for a in answers)


def test_others_go_on_while_a_caller_does_not_read(served: Served, channel: grpc.Channel) -> None:
    body = framed(ask(np.zeros(8_000)))
    with RawClient(served.address, credit=False) as client:
        stream = client.call(STREAM)
        for _ in range(100):
            client.send(stream, body)
            client.read(0.001)
        for _ in range(20):
            assert outcome(channel.unary_unary(INFER)(ask(), timeout=5)).tolist() == [0]
    wait_for(lambda: served.in_flight() == 0, 20, "the end of the stream that was left")


def test_a_cancelled_stream_leaves_nothing_behind(channel: grpc.Channel, served: Served) -> None:
    mark, go_on = uuid.uuid4().hex, threading.Event()

    def bodies() -> Iterator[bytes]:
        yield ask(mark=mark + "-first", sleep=0.5)
        yield from (ask(mark=f"{mark}-queued-{n}") for n in range(10))
        go_on.wait(10)

    call = channel.stream_stream(STREAM)(bodies())
    wait_for(lambda: mark + "-first" in served.ran() and served.in_flight() >= 1)
    call.cancel()
    go_on.set()
    wait_for(lambda: served.in_flight() == 0)
    assert not [m for m in served.ran() if m.startswith(mark + "-queued")], "what was queued never ran"


def test_a_deadline_ends_a_stream(channel: grpc.Channel, served: Served) -> None:
    go_on = threading.Event()

    def bodies() -> Iterator[bytes]:
        yield ask(id="0")
        go_on.wait(10)

    answers = channel.stream_stream(STREAM)(bodies(), timeout=2)
    assert streamed(next(answers)).infer_response.id == "0"
    assert failed(lambda: next(answers)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    go_on.set()
    wait_for(lambda: served.in_flight() == 0)


@pytest.mark.slow
async def test_a_thousand_streams_at_once_on_one_connection(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        streams = [channel.stream_stream(STREAM)() for _ in range(1_000)]

        async def turn(n: int, text: str) -> None:
            await streams[n].write(ask(id=text))
            assert streamed(await streams[n].read()).infer_response.id == text

        await asyncio.wait_for(asyncio.gather(*(turn(n, f"{n}a") for n in range(1_000))), 60)
        await asyncio.wait_for(asyncio.gather(*(turn(n, f"{n}b") for n in range(1_000))), 60)
        for stream in streams:
            await stream.done_writing()
        assert {await stream.code() for stream in streams} == {grpc.StatusCode.OK}


@pytest.mark.slow
async def test_a_thousand_calls_at_once_on_one_connection(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        infer = channel.unary_unary(INFER)
        answers = await asyncio.wait_for(asyncio.gather(*(infer(ask(np.full(1, n))) for n in range(1_000))), 60)
    assert [outcome(a).tolist() for a in answers] == [[n] for n in range(1_000)]


@pytest.mark.parametrize("quiet_s", [0.5])
def test_keepalive_pings_of_a_client_are_welcome(served: Served, quiet_s: float) -> None:
    options = [("grpc.keepalive_time_ms", 5_100), ("grpc.keepalive_timeout_ms", 2_000),
               ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0)]
    with grpc.insecure_channel(served.address, options) as channel:
        infer = channel.unary_unary(INFER)
        assert infer(ask())
        sleeping = infer.future(ask(sleep=quiet_s))
        assert sleeping.result(20) and infer(ask())
