"""A program that calls a deployment without pause, as its users do, until its input ends; then it prints what it saw.

    python load.py GRPC_ADDRESS REST_URL [REST_S [EVERY_S]]
    → {"grpc": {"calls": …, "failed": [...], "answers": {…}, "p50_ms": …}, …}

``grpc``: long-lived channels; ``channel``: a channel per call; both with gRPC's standard retry. ``kept``: HTTP
connections that are kept; ``once``: one per call; both try again when a connection was closed before any byte.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import grpc

from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub

RETRY = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": {
    "maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"]}}]})
OPTIONS = [("grpc.service_config", RETRY), ("grpc.use_local_subchannel_pool", 1)]
BODY = json.dumps({"data": [1, 2, 3]}).encode()
CLOSED = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
TIMEOUT_S = 20.0


def infer(channel: grpc.Channel) -> str:
    tensor = pb.ModelInferRequest.InferInputTensor(name="data", datatype="INT64", shape=[3])
    tensor.contents.int64_contents.extend([1, 2, 3])
    reply = GRPCInferenceServiceStub(channel).ModelInfer(
        pb.ModelInferRequest(model_name="iris", inputs=[tensor]), timeout=TIMEOUT_S)
    raw = reply.raw_output_contents[0][4:] if reply.raw_output_contents else \
        reply.outputs[0].contents.bytes_contents[0]
    return raw.decode()


def post(connection: http.client.HTTPConnection) -> str:
    for attempt in range(5):
        try:
            connection.request("POST", "/score", BODY, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {text[:100]}")
            return text
        except CLOSED:
            connection.close()
            if attempt == 4:
                raise
            time.sleep(0.05 * 2 ** attempt)
    raise AssertionError


class Clients:
    """Threads that call; each kind has its own tally."""

    def __init__(self, address: str, url: str) -> None:
        self.address, self.host = address, urlsplit(url).netloc
        self.stop = threading.Event()
        self.seen: dict[str, list[tuple[float, str, str]]] = {}
        self.threads: list[threading.Thread] = []

    def start(self, kind: str, count: int, make: Callable[[], Callable[[], str]], rest_s: float,
              every_s: float = 0.0) -> None:
        self.seen[kind] = []
        for _ in range(count):
            thread = threading.Thread(target=self._call, args=(kind, make, rest_s, every_s))
            thread.start()
            self.threads.append(thread)

    def _call(self, kind: str, make: Callable[[], Callable[[], str]], rest_s: float, every_s: float) -> None:
        once = make()
        while not self.stop.is_set():
            began = time.perf_counter()
            try:
                outcome = (once(), "")
            except Exception as exc:  # noqa: BLE001 - every failure of a call is what is counted here
                code = exc.code().name + " " + str(exc.details()) if isinstance(exc, grpc.RpcError) else repr(exc)
                outcome = ("", code)
            took = time.perf_counter() - began
            self.seen[kind].append((took, *outcome))
            time.sleep(max(rest_s, every_s - took))

    def kept_channel(self) -> Callable[[], str]:
        channel = grpc.insecure_channel(self.address, OPTIONS)
        return lambda: infer(channel)

    def channel_per_call(self) -> Callable[[], str]:
        def once() -> str:
            with grpc.insecure_channel(self.address, OPTIONS) as channel:
                return infer(channel)

        return once

    def kept_connection(self) -> Callable[[], str]:
        connection = http.client.HTTPConnection(self.host, timeout=TIMEOUT_S)
        return lambda: post(connection)

    def connection_per_call(self) -> Callable[[], str]:
        def once() -> str:
            connection = http.client.HTTPConnection(self.host, timeout=TIMEOUT_S)
            try:
                return post(connection)
            finally:
                connection.close()

        return once

    def report(self) -> dict[str, Any]:
        self.stop.set()
        for thread in self.threads:
            thread.join()
        return {kind: self._summary(seen) for kind, seen in self.seen.items()}

    @staticmethod
    def _summary(seen: list[tuple[float, str, str]]) -> dict[str, Any]:
        times = sorted(t for t, _, failed in seen if not failed) or [0.0]
        return {
            "calls": len(seen), "failed": [failed for _, _, failed in seen if failed][:20],
            "failures": sum(bool(failed) for _, _, failed in seen),
            "answers": Counter(answer for _, answer, failed in seen if not failed),
            "p50_ms": round(times[len(times) // 2] * 1000, 2), "p99_ms": round(times[len(times) * 99 // 100] * 1000, 2),
            "max_ms": round(times[-1] * 1000, 2),
        }


def main() -> None:
    clients = Clients(sys.argv[1], sys.argv[2])
    rest_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.01
    every_s = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    clients.start("grpc", 4, clients.kept_channel, rest_s, every_s)
    clients.start("channel", 2, clients.channel_per_call, rest_s, every_s)
    clients.start("kept", 4, clients.kept_connection, rest_s, every_s)
    clients.start("once", 2, clients.connection_per_call, rest_s, every_s)
    sys.stdin.read()
    print(json.dumps(clients.report()))


if __name__ == "__main__":
    main()
