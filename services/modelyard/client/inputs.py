"""What a caller gives as ModelInferRequest bytes, and answers as arrays by name.

An array's memory is copied once on its way into the request, and not at all on its way out of the answer: arrays of
fixed-size types share the answer's bytes and are read-only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from ..core.errors import Invalid, ModelyardError
from ..core.inference import Inference, read_response, read_tensors, write_request
from ..core.tensors import Tensor, to_raw, varint
from ..wire import inference_pb2 as pb
from .oip import error_from, holds_json, to_tensors

Inputs = Any
"""``{name: array}``, one array, rows (nested lists), a pandas frame, or JSON text."""
Outputs = dict[str, "np.ndarray[Any, Any]"]
"""The outputs by name. BYTES outputs are object arrays of ``bytes``; of those that the server marks as JSON, of what
the JSON holds."""
ID, RAW_CONTENTS = b"\x1a", b"\x3a"
"""Tags of ModelInferRequest's ``id`` and ``raw_input_contents``."""
STREAMED_ERROR = b"\x0a"
"""What a ModelStreamInferResponse with an ``error_message`` begins with."""
LARGEST_MESSAGE = 2**31 - 1


class Encoder:
    """Requests of one model. What does not change from call to call is serialized once: serialized messages, one
    behind the other, are one message."""

    def __init__(self, model: str, version: str = "", outputs: Sequence[str] = ()) -> None:
        if not model:
            raise Invalid("model is empty; name the model or the deployment", field="model")
        if isinstance(outputs, str):
            raise Invalid(f"outputs is a list of names: ['{outputs}']", field="outputs")
        head = pb.ModelInferRequest(model_name=model, model_version=version)
        for name in outputs:
            head.outputs.add(name=name)
        self._call = Inference(model, version, outputs=tuple(outputs))
        self._head = head.SerializeToString()

    def tensors(self, inputs: Inputs, declared: Mapping[str, str]) -> list[Tensor]:
        """Raises Invalid, naming the tensor. ``declared``: what the model says of what the inputs leave out."""
        plain = type(inputs) is dict and all(type(value) is np.ndarray for value in inputs.values())
        tensors = [Tensor(str(name), value) for name, value in inputs.items()] if plain else to_tensors(
            inputs, declared)
        if not tensors:
            raise Invalid("there are no inputs; a request needs one tensor or more", field="inputs")
        return tensors

    def encode(self, tensors: Sequence[Tensor], id_: str = "") -> bytes:
        """Raises Invalid for a message of 2 GiB or more, which protobuf cannot carry."""
        if sum(t.array.nbytes for t in tensors) >= LARGEST_MESSAGE:
            raise Invalid("the tensors are 2 GiB or more together, which one message cannot carry", field="inputs")
        if any(t.parameters for t in tensors):
            call = self._call
            return write_request(Inference(call.model, call.version, id_, {}, list(tensors), call.outputs))
        pieces: list[Any] = [self._head]
        if id_:
            given = id_.encode()
            pieces += (ID, varint(len(given)), given)
        pieces.append(_described(tuple([(t.name, t.datatype, t.array.shape) for t in tensors])))
        for tensor in tensors:
            raw = to_raw(tensor) if tensor.datatype == "BYTES" else tensor.array.data
            pieces += (RAW_CONTENTS, varint(memoryview(raw).nbytes), raw)
        return b"".join(pieces)


@functools.lru_cache(1024)
def _described(tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    message = pb.ModelInferRequest()
    for name, datatype, shape in tensors:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
    return message.SerializeToString()


def read_unary(answer: bytes) -> Outputs:
    """A ModelInferResponse's bytes → arrays. Raises Invalid for bytes that are none."""
    return _arrays(read_response(answer).tensors)


def read_streamed(answer: bytes, address: str) -> Outputs:
    """A ModelStreamInferResponse's bytes → arrays. Raises the error that it holds."""
    message = pb.ModelStreamInferResponse.FromString(answer)
    if message.error_message:
        raise streamed_error(message.error_message, address)
    response = message.infer_response
    return _arrays(read_tensors(response.outputs, response.raw_output_contents, "raw_output_contents"))


def _arrays(tensors: Sequence[Tensor]) -> Outputs:
    return {t.name: _values(t) if t.parameters and holds_json(t) else t.array for t in tensors}


def _values(tensor: Tensor) -> np.ndarray[Any, Any]:
    values = np.empty(tensor.array.size, object)
    for place, text in enumerate(tensor.array.ravel().tolist()):
        values[place] = json.loads(text)
    return values.reshape(tensor.array.shape)


def failure_in(answer: bytes, address: str) -> ModelyardError | None:
    """The error that a ModelStreamInferResponse holds, or None; looks at the first byte only, where that will do."""
    if not answer.startswith(STREAMED_ERROR):
        return None
    message = pb.ModelStreamInferResponse.FromString(answer).error_message
    return streamed_error(message, address) if message else None


def streamed_error(message: str, address: str) -> ModelyardError:
    """``NOT_FOUND: there is no model …`` → NotFound. A message without a status is the scoring code's own."""
    name, colon, text = message.partition(": ")
    code = grpc.StatusCode.__members__.get(name) if colon else None
    return error_from(code or grpc.StatusCode.INTERNAL, message if code is None else text, address)
