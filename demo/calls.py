"""Calls as any client of the Open Inference Protocol makes them: the generated gRPC stubs, and HTTP with JSON."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub

RETRIES = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": {
    "maxAttempts": 5, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"]}}]})
"""The standard retry policy of gRPC: all that a client needs to ride through an upgrade."""
PAUSE_S = 0.01
"""Between two calls of one client: steady traffic that leaves the machine to the upgrade."""
DATATYPES = {"float32": "FP32", "float64": "FP64"}


def channel(address: str) -> grpc.Channel:
    """A gRPC channel with the standard retries."""
    return grpc.insecure_channel(address, [("grpc.service_config", RETRIES)])


def request(model: str, rows: np.ndarray, *, typed: bool = False) -> pb.ModelInferRequest:
    """A ModelInfer request: the tensor as raw bytes, or as typed contents."""
    message = pb.ModelInferRequest(model_name=model)
    tensor = message.inputs.add(name="X", datatype=DATATYPES[str(rows.dtype)], shape=rows.shape)
    if typed:
        field = tensor.contents.fp32_contents if rows.dtype == np.float32 else tensor.contents.fp64_contents
        field.extend(rows.ravel().tolist())
    else:
        message.raw_input_contents.append(rows.tobytes())
    return message


def values(answer: pb.ModelInferResponse) -> dict[str, Any]:
    """The outputs by name, whether they came raw or typed."""
    return {o.name: _values(answer, i) for i, o in enumerate(answer.outputs)}


def _values(answer: pb.ModelInferResponse, i: int) -> list[Any]:
    tensor = answer.outputs[i]
    if not answer.raw_output_contents:
        found = next(v for _, v in tensor.contents.ListFields())
        return [v.decode() if isinstance(v, bytes) else v for v in found]
    raw = answer.raw_output_contents[i]
    if tensor.datatype == "BYTES":
        texts, at = [], 0
        while at < len(raw):
            size = int.from_bytes(raw[at:at + 4], "little")
            texts.append(raw[at + 4:at + 4 + size].decode())
            at += 4 + size
        return texts
    kinds = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT32": "<i4"}
    flat: list[Any] = np.frombuffer(raw, kinds[tensor.datatype]).tolist()
    return flat


def post(url: str, body: Mapping[str, Any]) -> Any:
    """JSON there and back."""
    raw = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(raw, timeout=30) as answer:
        return json.load(answer)


class Callers:
    """Clients that keep calling, each on a channel of its own, until ``stop``; they count what happened."""

    def __init__(self, address: str, model: str, rows: np.ndarray, count: int) -> None:
        self._address, self._model, self._rows = address, model, rows
        self._stop, self._lock = threading.Event(), threading.Lock()
        self.served: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.slowest_ms = 0.0
        self._threads = [threading.Thread(target=self._call, daemon=True) for _ in range(count)]

    @property
    def made(self) -> int:
        """Calls made so far."""
        return self.served.total() + self.failed.total()

    def _call(self) -> None:
        with channel(self._address) as open_channel:
            stub = GRPCInferenceServiceStub(open_channel)
            message = request(self._model, self._rows)
            while not self._stop.wait(PAUSE_S):
                began = time.perf_counter()
                try:
                    _, call = stub.ModelInfer.with_call(message, timeout=20)
                    told = dict(call.initial_metadata()) | dict(call.trailing_metadata())
                    outcome, into = str(told.get("x-modelyard-model", "?")), self.served
                except grpc.RpcError as exc:
                    outcome, into = f"{exc.code().name}: {exc.details()}", self.failed
                with self._lock:
                    into[outcome] += 1
                    self.slowest_ms = max(self.slowest_ms, 1000 * (time.perf_counter() - began))

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
