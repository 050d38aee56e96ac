"""Open Inference Protocol v2 over gRPC: a channel with the standard retries, raw tensors, our errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
import numpy as np

from ..core import inference
from ..core.errors import Denied, Invalid, ModelyardError, NotFound, TooLarge, Unavailable
from ..core.inference import Inference
from ..core.tensors import DTYPES, Tensor
from ..wire import inference_pb2 as pb
from .reasons import is_too_large, reason_in

SERVICE = "/inference.GRPCInferenceService/"
RETRY = {
    "maxAttempts": 5, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
UNARY = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
SERVICE_CONFIG = json.dumps({"methodConfig": [{
    "name": [{"service": "inference.GRPCInferenceService", "method": name} for name in UNARY], "retryPolicy": RETRY,
}]})
"""Any gRPC client that sets this rides through upgrades and restarts without a failed call. Streams are not repeated
by the library: it would send again what was scored already."""
OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.service_config", SERVICE_CONFIG), ("grpc.enable_retries", 1),
    ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
    ("grpc.min_reconnect_backoff_ms", 50), ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
JSON_PARAMETER = {"content_type": "application/json"}


class Channel:
    """A gRPC channel to one deployment."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._infer = self._channel.unary_unary(SERVICE + "ModelInfer")
        self._metadata = self._channel.unary_unary(SERVICE + "ModelMetadata")
        self._inputs: dict[str, dict[str, str]] = {}

    async def score(self, model: str, data: Any, timeout_s: float) -> Any:
        """Rows, a dict, an array or a frame as tensors; the outputs by name, or the JSON that a lone output held."""
        tensors = to_tensors(data, await self._declared(model, timeout_s) if asks(data) else {})
        answer = await self.infer(Inference(model, tensors=tensors), timeout_s)
        if len(answer.tensors) == 1 and holds_json(answer.tensors[0]):
            return json.loads(answer.tensors[0].array.reshape(-1)[0])
        return {t.name: t.array for t in answer.tensors}

    async def infer(self, call: Inference, timeout_s: float) -> Inference:
        """One ModelInfer as it stands. Raises as ``AsyncScorer.score`` says."""
        return inference.read_response(await self._call(self._infer, inference.write_request(call), timeout_s))

    async def _declared(self, model: str, timeout_s: float) -> dict[str, str]:
        if model not in self._inputs:
            raw = await self._call(self._metadata, pb.ModelMetadataRequest(name=model).SerializeToString(), timeout_s)
            self._inputs[model] = {i.name: i.datatype for i in pb.ModelMetadataResponse.FromString(raw).inputs}
        return self._inputs[model]

    async def _call(self, method: Any, request: bytes, timeout_s: float) -> bytes:
        try:
            answer: bytes = await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            raise error_of(exc, self._address) from exc
        return answer

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()


def error_of(exc: Any, address: str) -> ModelyardError:
    """A call's RpcError as an error of our own tree."""
    return error_from(exc.code(), exc.details() or "", address, reason_in(exc.trailing_metadata()))


def error_from(code: grpc.StatusCode, details: str, address: str, reason: str = "") -> ModelyardError:
    """A gRPC status as an error of our own tree; ``detail["status"]`` is its name. ``reason``: see ``reasons``."""
    error = _error(code, details, address, reason)
    error.detail["status"] = code.name
    return error


def _error(code: grpc.StatusCode, details: str, address: str, reason: str) -> ModelyardError:
    status = grpc.StatusCode
    if code in (status.INVALID_ARGUMENT, status.UNIMPLEMENTED, status.OUT_OF_RANGE):
        return Invalid(details or code.name)
    if code is status.NOT_FOUND:
        return NotFound(details)
    if code in (status.UNAUTHENTICATED, status.PERMISSION_DENIED):
        return Denied(details or code.name)
    if code is status.RESOURCE_EXHAUSTED:
        return TooLarge(details) if is_too_large(reason, details) else Unavailable(details)
    if code is status.DEADLINE_EXCEEDED:
        return Unavailable(details or "past the deadline", code="deadline-exceeded")
    if code in (status.UNAVAILABLE, status.CANCELLED):
        return Unavailable(f"the deployment at {address} does not answer: {details}")
    return ModelyardError(details or code.name, code="scoring-failed")


def asks(data: Any) -> bool:
    """Whether the data leaves a name or a datatype to what the model declares: rows, an array, a dict of lists."""
    if isinstance(data, Mapping):
        return any(isinstance(v, (list, tuple)) for v in data.values())
    return isinstance(data, (list, tuple, np.ndarray))


def holds_json(tensor: Tensor) -> bool:
    return tensor.datatype == "BYTES" and tensor.parameters.get("content_type") == "application/json"


def to_tensors(data: Any, declared: Mapping[str, str]) -> list[Tensor]:
    """Tensors for what a caller gave. Plain lists take the datatype that the model declares, a lone array its name.

    >>> [(t.name, t.datatype, t.array.shape) for t in to_tensors([[5.1, 3.5]], {"x": "FP32"})]
    [('x', 'FP32', (1, 2))]
    """
    if isinstance(data, (str, bytes)):
        return [_json_tensor(data if isinstance(data, bytes) else data.encode())]
    if hasattr(data, "columns") and hasattr(data, "to_numpy"):
        return [_tensor(str(c), data[c].to_numpy(), declared) for c in data.columns]
    if isinstance(data, Mapping):
        if set(data) == {"data"} and "data" not in declared:
            return to_tensors(data["data"], declared)
        return [_tensor(str(name), value, declared) for name, value in data.items()]
    name = next(iter(declared)) if len(declared) == 1 else "input-0"
    return [_tensor(name, data, declared)]


def _json_tensor(body: bytes) -> Tensor:
    array = np.empty(1, object)
    array[0] = body
    return Tensor("input-0", array, "BYTES", JSON_PARAMETER)


def _tensor(name: str, value: Any, declared: Mapping[str, str]) -> Tensor:
    if isinstance(value, np.ndarray):
        return Tensor(name, value)
    try:
        array = np.asarray(value)
        if array.dtype.kind in "biuf" and (datatype := declared.get(name, "")) in DTYPES and datatype != "BYTES":
            array = array.astype(DTYPES[datatype])
    except ValueError as exc:
        raise Invalid(f"'{name}' is not an array: every row needs the same length ({exc})", field=name) from exc
    if array.dtype == object:
        raise Invalid(f"'{name}' is not an array of numbers or text; send it over rest", field=name)
    return Tensor(name, array)
