"""How a server comes and goes, on both transports: drain, GOAWAY, TLS, inherited sockets, and the choice itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modelyard.scoring import transport_h2
from modelyard.scoring.transport_h2 import H2Transport
from tests.contract.transports import INFER, SCORE, STREAM, ask, failed, outcome, serving, streamed, wait_for
from tests.raw_h2 import RawClient, framed, unframed
from tests.unit.scoring.planes import open_plane
from tests.unit.scoring.roots import Replica, command, make_root

pytestmark = pytest.mark.slow  # real programs are started and stopped
RETRY = [("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": {
    "maxAttempts": 5, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"]}}]}))]
TRANSPORTS = ("grpc", "h2")


def drain(replica: Replica) -> None:
    urllib.request.urlopen(urllib.request.Request(f"http://{replica.admin}/drain", method="POST"), timeout=10).close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_drain_sends_connections_away_and_fails_no_call(tmp_path: Path, transport: str) -> None:
    """GOAWAY: what is under way is answered, the watchers are told, and who comes anew is still served."""
    with serving(tmp_path, transport) as served, RawClient(served.address) as client, \
            grpc.insecure_channel(served.address, RETRY) as channel:
        answered, failures, stop = [], [], threading.Event()

        def call() -> None:
            infer = channel.unary_unary(INFER)
            while not stop.is_set():
                try:
                    answered.append(infer(ask(sleep=0.001), timeout=10))
                except grpc.RpcError as exc:
                    failures.append(str(exc))

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            wait_for(lambda: len(answered) > 20)
            under_way = client.call(INFER)
            client.send(under_way, framed(ask(mark="under-way", sleep=0.5)), end=True)
            wait_for(lambda: "under-way" in served.ran())
            drain(served.replica)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            client.until(lambda: client.goaway == 0, 8)
            assert client.answer(under_way).status == "0", "what was under way is answered"
            before = len(answered)
            wait_for(lambda: len(answered) > before + 20, what="calls on new connections")
        finally:
            stop.set()
            for caller in callers:
                caller.join(15)
        assert failures == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stop_answers_what_is_under_way_and_ends_what_only_waits(tmp_path: Path, transport: str) -> None:
    with serving(tmp_path, transport) as served, grpc.insecure_channel(served.address) as channel:
        waiting = threading.Event()

        def bodies() -> Iterator[bytes]:
            yield ask(id="0")
            waiting.wait(30)

        stream = channel.stream_stream(STREAM)(bodies())
        assert streamed(next(stream)).infer_response.id == "0"
        call = channel.unary_unary(INFER).future(ask(mark="last", sleep=0.5))
        wait_for(lambda: "last" in served.ran())
        status, took = served.replica.stop()
        assert status == 0 and took < 25
        assert outcome(call.result(1)).tolist() == [0]
        error = failed(lambda: next(stream))
        waiting.set()
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        if transport == "h2":
            assert "call again" in error.details() and took < 10


async def test_connections_end_by_age_without_a_failed_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that callers spread over replicas that come later. grpcio does so by an option of its own."""
    monkeypatch.setattr(transport_h2, "AGE_S", 0.3)
    async with open_plane(tmp_path, "def run(data):\n    return data\n") as plane:
        server = H2Transport("127.0.0.1:0", plane)
        address = await server.start()
        await server.loaded()
        made = 0
        async with grpc.aio.insecure_channel(address) as channel:
            with await asyncio.to_thread(RawClient, address) as client:
                while client.goaway is None or made < 100:
                    await channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=10)
                    await asyncio.to_thread(client.read, 0.001)
                    made += 1
                    assert made < 20_000, "the connection is never sent away"
        assert client.goaway == 0
        await server.stop(5)


@contextlib.contextmanager
def started(root: Path, arguments: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    given = {"PATH": os.environ["PATH"], "RUNS": str(root.parent / "runs"), "MODELYARD_DEPLOYMENT": "flower", **env}
    fds = [int(a[5:]) for a in arguments if a.startswith("fd://")]
    process = subprocess.Popen([*command(root), "serve", *arguments], stderr=subprocess.PIPE, text=True, env=given,
                               pass_fds=fds)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_inherited_sockets(tmp_path: Path) -> None:
    """Both protocols on sockets that we opened: callers who came before the server are served by it."""
    root = make_root(tmp_path, SCORE)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in (one, two)]
        arguments = ["--grpc", f"fd://{one.fileno()}", "--http", f"fd://{two.fileno()}", "--admin", "127.0.0.1:0"]
        with grpc.insecure_channel(addresses[0]) as channel:
            early = channel.unary_unary("/inference.GRPCInferenceService/ServerLive").future(b"", timeout=30)
            for _ in range(2):  # the sockets stay ours, and open, when a server ends
                with started(root, arguments, MODELYARD_TRANSPORT="h2"):
                    assert early.result(30) == b"\x08\x01"
                    infer = channel.unary_unary(INFER)
                    wait_for(lambda infer=infer: _answers(infer), 30)
                    with urllib.request.urlopen(f"http://{addresses[1]}/v2/health/live", timeout=30) as answer:
                        assert json.load(answer) == {"live": True}
        arguments[1] = f"fd://{one.fileno()}"
        with started(root, arguments, MODELYARD_TRANSPORT="grpc") as process:
            assert process.wait(30) == 1
            assert "grpcio takes no inherited socket; use --transport h2" in process.stderr.read()  # type: ignore[union-attr]


def _answers(infer: grpc.UnaryUnaryMultiCallable) -> bool:
    try:
        return outcome(infer(ask(), timeout=5)).tolist() == [0]
    except grpc.RpcError:
        return False


@pytest.mark.parametrize("given, library, rest", [
    ("grpc", "grpcio", "aiohttp"), *((name, "h2corn", "asyncio, aiohttp") for name in ("h2", "auto", ""))])
def test_the_log_says_which_transport_it_is(tmp_path: Path, given: str, library: str, rest: str) -> None:
    with serving(tmp_path, given) as served:
        log = served.replica.log.read_text()
        assert f"grpc {served.address} ({library})" in log and f"http {served.replica.http} ({rest})" in log


@pytest.mark.parametrize("arguments, why", [
    (["--transport", "carrier-pigeon"], "there is no transport 'carrier-pigeon'"),
    (["--tls-cert", "server.crt"], "TLS needs --tls-cert and --tls-key together"),
    (["--tls-cert", "no.crt", "--tls-key", "no.key"], "no.crt is not there"),
    (["--grpc", "fd://9"], "cannot listen on fd://9"), (["--grpc", "fd://x"], "'fd://x' is not an address"),
])
def test_what_cannot_be_is_said_at_the_start(tmp_path: Path, arguments: list[str], why: str) -> None:
    root = make_root(tmp_path, SCORE)
    done = subprocess.run([*command(root), "serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", *arguments],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2) and why in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_goaway_while_frames_of_a_stream_are_under_way(tmp_path: Path) -> None:
    """A stream that is open when its server drains goes on to its end."""
    with serving(tmp_path, "h2") as served, RawClient(served.address) as client:
        stream = client.call(STREAM)
        client.send(stream, framed(ask(id="0")))
        client.until(lambda: bool(client.heard[stream].body))
        drain(served.replica)
        client.until(lambda: client.goaway == 0)
        client.send(stream, framed(ask(id="1")), end=True)
        heard = client.answer(stream)
        assert heard.status == "0"
        assert [streamed(m).infer_response.id for m in unframed(heard.body)] == ["0", "1"]


def test_a_call_that_never_says_what_it_asks_is_let_go(tmp_path: Path) -> None:
    """As long as something comes it is waited for."""
    with serving(tmp_path, "h2", limits={"timeout_ms": 400}) as served, RawClient(served.address) as client:
        whole, began = framed(ask()), time.monotonic()
        silent, slow = client.call(INFER), client.call(INFER)
        client.send(silent, whole[:9])
        for at in range(8):
            client.send(slow, whole[at:at + 1])
            client.read(0.1)
        client.send(slow, whole[8:], end=True)
        assert client.answer(slow).status == "0" and time.monotonic() - began > 0.4
        heard = client.answer(silent)
        assert heard.status == "4" and "nothing of the call came for 0.4 s" in heard.message
