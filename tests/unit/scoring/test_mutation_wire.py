"""Damaged requests through the whole of the server, over real connections: damaged messages in whole calls, and damaged
bytes of HTTP itself. Each is answered by a documented status or its connection ends; those after it are right."""

from __future__ import annotations

import asyncio
import http.client
import random
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest

from modelyard.core.inference import Inference, read_response, write_request
from modelyard.core.tensors import Tensor
from tests.bad_clients import connected, half_streams, post
from tests.contract.transports import INFER, STREAM, streamed, wait_for
from tests.unit.scoring.roots import Replica, launch, make_root
from tests.unit.scoring.test_mutation import (
    ALLOWED,
    FLOWER,
    JSON_SEEDS,
    SEEDS,
    binary_body,
    mutate,
    mutated_message,
    rest_body,
)

pytestmark = pytest.mark.slow  # real servers, and thousands of requests
MANY_BY_HTTP, MANY_BY_GRPC, MANY_CONNECTIONS, AT_ONCE = 20_000, 6_000, 400, 16
GOOD = write_request(Inference("iris", tensors=[Tensor("x", FLOWER)]))
GOOD_JSON = orjson.dumps({"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 4], "data": FLOWER[0].tolist()}]})
STATUSES = {b"200", b"400", b"404", b"405", b"408", b"413", b"415", b"417", b"431"}


def resident_mib(replica: Replica) -> float:
    fields = Path(f"/proc/{replica.process.pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * 4096 / 2**20


def unharmed(replica: Replica, before_mib: float) -> None:
    """Nobody is in the server any more, nothing was logged, and it is no larger."""
    def in_flight() -> bool:
        lines = replica.get("/metrics")[1].decode().splitlines()
        return any(line.startswith("modelyard_scoring_in_flight 0") for line in lines)

    wait_for(in_flight, 20, "the end of what is under way")
    assert replica.process.poll() is None and "Traceback" not in replica.log.read_text()
    assert (grown := resident_mib(replica) - before_mib) < 24, f"{grown:.1f} MiB more after three quarters of it"


@pytest.mark.parametrize("transport", ["h2", "grpc"])
def test_damaged_bodies_over_http(tmp_path: Path, two_models: list[dict[str, Any]], transport: str) -> None:
    """On connections that are kept."""
    dice = random.Random(20261126)
    root = make_root(tmp_path, models=two_models)
    seen: Counter[int] = Counter()
    with launch(root, arguments=["--transport", transport]) as replica:
        connection = http.client.HTTPConnection(replica.http, timeout=30)

        def ask(model: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
            connection.request("POST", f"/v2/models/{model}/infer", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

        before = 0.0
        for n in range(MANY_BY_HTTP):
            call = binary_body(dice) if n % 2 else rest_body(dice)
            length = {} if call.options is None else {"Inference-Header-Content-Length": str(call.options)}
            status, body = ask(call.model, call.body, length)
            seen[status] += 1
            assert status in (200, 400, 404, 413), (status, body, call.body)
            if n % 50 == 0:
                status, body = ask("iris", GOOD_JSON, {})
                assert status == 200 and orjson.loads(body)["outputs"][0]["data"] == [0]
            if n == MANY_BY_HTTP // 4:
                before = resident_mib(replica)
        connection.close()
        unharmed(replica, before)
    assert seen[200] > MANY_BY_HTTP // 60 and seen[400] > MANY_BY_HTTP // 3, seen


def damaged(dice: random.Random) -> bytes:
    return mutated_message(dice) if dice.random() < 0.5 else mutate(dice.choice(SEEDS), dice)


async def call_by_call(channel: grpc.aio.Channel, dice: random.Random, seen: Counter[str]) -> None:
    """Some damaged calls and one that is not, at once."""
    infer = channel.unary_unary(INFER)

    async def one(message: bytes) -> str:
        try:
            await infer(message, timeout=30)
        except grpc.aio.AioRpcError as exc:
            assert exc.details(), "it is said what is wrong"
            return str(exc.code().name)
        return "OK"

    good, *statuses = await asyncio.gather(infer(GOOD, timeout=30), *(one(damaged(dice)) for _ in range(AT_ONCE)))
    assert read_response(good).tensors[0].array.tolist() == [0]
    seen.update(statuses)


async def in_a_stream(channel: grpc.aio.Channel, dice: random.Random, seen: Counter[str]) -> None:
    """The same in one stream: each message has its own answer, in order, and none ends the stream."""
    sent = [GOOD, *(damaged(dice) for _ in range(AT_ONCE)), GOOD]
    call = channel.stream_stream(STREAM)(iter(sent), timeout=30)
    answers = [streamed(answer) async for answer in call]
    assert len(answers) == len(sent) and await call.code() is grpc.StatusCode.OK
    for answer in (answers[0], answers[-1]):
        assert not answer.error_message
        assert read_response(answer.infer_response.SerializeToString()).tensors[0].array.tolist() == [0]
    seen.update("INVALID_ARGUMENT" if answer.error_message else "OK" for answer in answers[1:-1])


@pytest.mark.parametrize("transport", ["h2", "grpc"])
async def test_damaged_messages_over_grpc(tmp_path: Path, two_models: list[dict[str, Any]], transport: str) -> None:
    dice = random.Random(20261127)
    root = make_root(tmp_path, models=two_models)
    seen: Counter[str] = Counter()
    with launch(root, arguments=["--transport", transport]) as replica:
        async with grpc.aio.insecure_channel(replica.grpc, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            before = 0.0
            while seen.total() < MANY_BY_GRPC:
                await (call_by_call if dice.random() < 0.7 else in_a_stream)(channel, dice, seen)
                if not before and seen.total() > MANY_BY_GRPC // 4:
                    before = resident_mib(replica)
        await asyncio.to_thread(unharmed, replica, before)
    assert set(seen) <= ALLOWED and seen["OK"] > MANY_BY_GRPC // 60, seen
    assert seen["INVALID_ARGUMENT"] > MANY_BY_GRPC // 3, seen


def exchange(address: str, sent: bytes) -> bytes:
    """The beginning of what comes back on a connection of its own; nothing, where the server waits for more."""
    with connected(address) as sock:
        sock.settimeout(0.1)
        try:
            sock.sendall(sent)
            return sock.recv(1 << 16)
        except (TimeoutError, ConnectionError):
            return b""


def good_http(address: str) -> None:
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("POST", "/v2/models/iris/infer", GOOD_JSON)
    assert orjson.loads(connection.getresponse().read())["outputs"][0]["data"] == [0]
    connection.close()


def good_grpc(address: str) -> None:
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer = channel.unary_unary(INFER)(GOOD, timeout=30)
    assert read_response(answer).tensors[0].array.tolist() == [0]


@pytest.mark.parametrize("transport", ["h2", "grpc"])
def test_damaged_bytes_of_http(tmp_path: Path, two_models: list[dict[str, Any]], transport: str) -> None:
    """HTTP/2 on the one port and HTTP/1.1 on the other, cut and bent anywhere: in frames, heads and bodies."""
    dice = random.Random(20261128)
    frames = half_streams(GOOD)
    requests = [post("/v2/models/iris/infer", JSON_SEEDS[1]) * 2, b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n",
                b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1]\r\n0\r\n\r\n"]
    seen: Counter[bytes] = Counter()
    with launch(make_root(tmp_path, models=two_models), arguments=["--transport", transport]) as replica:
        before = 0.0
        for n in range(MANY_CONNECTIONS):
            if n % 2:
                exchange(replica.grpc, frames[:24] + mutate(frames[24:], dice) if n % 10 > 1 else mutate(frames, dice))
            else:
                heard = exchange(replica.http, mutate(dice.choice(requests), dice))
                seen[heard[9:12]] += 1
                assert not heard or heard[9:12] in STATUSES, heard
            if n % 40 == 0:
                good_http(replica.http)
                good_grpc(replica.grpc)
            if n == MANY_CONNECTIONS // 4:
                before = resident_mib(replica)
        good_http(replica.http)
        good_grpc(replica.grpc)
        unharmed(replica, before)
    assert seen[b"400"] > MANY_CONNECTIONS // 20, seen
