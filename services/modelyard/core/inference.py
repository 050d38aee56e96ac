"""Inference messages: whole Open Inference Protocol v2 requests and responses, as protobuf and as JSON.

Shared by the scoring server, its clients and whoever reads captured bytes back:

>>> import numpy as np
>>> from modelyard.core.tensors import Tensor
>>> wire = write_request(Inference("iris", tensors=[Tensor("x", np.array([[5.1, 3.5]], np.float32))]))
>>> read_request(wire).tensors[0].array.tolist()
[[5.099999904632568, 3.5]]

Generated code is imported when the first message is read or written.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from .errors import Invalid
from .tensors import FIELDS, Tensor, bad, fill_typed, from_json, from_raw, from_typed, to_json, to_raw, varint

if TYPE_CHECKING:
    from ..wire.inference_pb2 import ModelInferRequest, ModelInferResponse

PROTO = "application/grpc+proto"
"""Captured gRPC bodies: a ModelInferRequest; the response a ModelInferResponse, or in a stream a
ModelStreamInferResponse."""
JSON = "application/json"
BINARY = "application/octet-stream"
"""A v2 REST body with the binary tensor extension; captured as ``BINARY; header-length=N``, N bytes of JSON first."""


@dataclass(slots=True)
class Inference:
    """A request or a response, whatever wire it came by. ``raw``: tensors were or are to be written raw.

    ``outputs`` are the names a request asks for (empty: all).
    """

    model: str = ""
    version: str = ""
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    outputs: tuple[str, ...] = ()
    raw: bool = True


@functools.cache
def _generated() -> tuple[Any, Any, Any, Any]:
    """The generated classes and what they raise; an import statement at every call would cost more than parsing."""
    from google.protobuf.message import DecodeError

    from ..wire import inference_pb2 as pb

    return pb.ModelInferRequest, pb.ModelInferResponse, pb.ModelStreamInferResponse, DecodeError


def parse_request(wire: bytes) -> ModelInferRequest:
    """The protobuf message. Raises Invalid for bytes that are none."""
    request_class, _, _, error = _generated()
    try:
        return cast("ModelInferRequest", request_class.FromString(wire))
    except error as exc:
        raise Invalid("the body is not a ModelInferRequest") from exc


def from_message(message: ModelInferRequest) -> Inference:
    """A parsed request → names, parameters and arrays. Raises Invalid, naming the tensor."""
    return Inference(
        message.model_name, message.model_version, message.id, parameters(message.parameters),
        read_tensors(message.inputs, message.raw_input_contents, "raw_input_contents"),
        tuple(o.name for o in message.outputs), bool(message.raw_input_contents))


def read_request(wire: bytes) -> Inference:
    """``parse_request`` and ``from_message`` in one."""
    return from_message(parse_request(wire))


def read_response(wire: bytes, stream: bool = False) -> Inference:
    """A ModelInferResponse's bytes, or with ``stream`` a ModelStreamInferResponse's."""
    _, response_class, stream_class, error = _generated()
    try:
        message = stream_class.FromString(wire).infer_response if stream else response_class.FromString(wire)
    except error as exc:
        raise Invalid("the body is not a ModelInferResponse") from exc
    tensors = read_tensors(message.outputs, message.raw_output_contents, "raw_output_contents")
    return Inference(message.model_name, message.model_version, message.id, parameters(message.parameters), tensors,
                     raw=bool(message.raw_output_contents))


def read_tensors(entries: Sequence[Any], raws: Sequence[bytes], where: str) -> list[Tensor]:
    """Tensor messages and their raw contents → tensors. Raw and typed contents exclude each other."""
    if raws and len(raws) != len(entries):
        raise Invalid(f"{where} has {len(raws)} entries for {len(entries)} tensors; it needs one for each")
    tensors: list[Tensor] = []
    for position, entry in enumerate(entries[:]):  # a slice is a list: faster to walk than protobuf's own container
        name = entry.name
        if tensors and any(tensor.name == name for tensor in tensors):
            raise bad(name, "is given twice")
        if raws:
            if entry.HasField("contents"):
                raise bad(name, f"has both contents and {where}; send one of the two")
            array = from_raw(name, entry.datatype, entry.shape, raws[position])
        else:
            array = from_typed(name, entry.datatype, entry.shape, entry.contents)
        tensors.append(Tensor(name, array, entry.datatype, parameters(entry.parameters) if entry.parameters else {}))
    return tensors


def parameters(entries: Mapping[str, Any]) -> dict[str, Any]:
    """InferParameter map → plain values; one without a choice is None."""
    found = {}
    for key, entry in entries.items():
        choice = entry.WhichOneof("parameter_choice")
        found[key] = getattr(entry, choice) if choice else None
    return found


def _put_parameters(values: Mapping[str, Any], into: Any) -> None:
    for key, value in values.items():
        if isinstance(value, bool):
            into[key].bool_param = value
        elif isinstance(value, int):
            into[key].int64_param = value
        elif isinstance(value, float):
            into[key].double_param = value
        else:
            into[key].string_param = str(value)


def _put_tensors(tensors: Sequence[Tensor], raw: bool, entries: Any, raws: Any) -> None:
    """Raw if asked for, or if one tensor has no typed form (the two exclude each other in one message)."""
    raw = raw or any(t.datatype not in FIELDS for t in tensors)
    for tensor in tensors:
        entry = entries.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape)
        if tensor.parameters:
            _put_parameters(tensor.parameters, entry.parameters)
        if raw:
            raws.append(to_raw(tensor))
        else:
            fill_typed(tensor, entry.contents)


def write_request(call: Inference) -> bytes:
    """A ModelInferRequest's bytes."""
    message = _generated()[0](model_name=call.model, model_version=call.version, id=call.id)
    _put_parameters(call.parameters, message.parameters)
    _put_tensors(call.tensors, call.raw, message.inputs, message.raw_input_contents)
    for name in call.outputs:
        message.outputs.add(name=name)
    return cast(bytes, message.SerializeToString())


def response_message(answer: Inference) -> ModelInferResponse:
    """A ModelInferResponse, its tensors raw or typed as ``answer.raw`` says."""
    message: ModelInferResponse = _generated()[1](model_name=answer.model, model_version=answer.version, id=answer.id)
    if answer.parameters:
        _put_parameters(answer.parameters, message.parameters)
    _put_tensors(answer.tensors, answer.raw, message.outputs, message.raw_output_contents)
    return message


def response_bytes(answer: Inference) -> bytes:
    """A ModelInferResponse's bytes. Of a raw answer without parameters they are put together from pieces, of which
    only ``id`` and the contents are new each time: serialized messages, one behind the other, are one message."""
    tensors = answer.tensors
    if not answer.raw or answer.parameters or any(t.parameters for t in tensors):
        return response_message(answer).SerializeToString()
    pieces = [names_bytes(answer.model, answer.version)]
    if answer.id:
        given = answer.id.encode()
        pieces += (b"\x1a", varint(len(given)), given)
    pieces.append(outputs_bytes(tuple([(t.name, t.datatype, t.array.shape) for t in tensors])))
    for tensor in tensors:
        raw = tensor.array.tobytes() if tensor.datatype != "BYTES" else to_raw(tensor)
        pieces += (b"\x32", varint(len(raw)), raw)
    return b"".join(pieces)


def contents_tag(field: int, size: int) -> bytes:
    """What stands before so many bytes of a field of bytes: 6 are a response's raw contents, 7 a request's."""
    return bytes((field << 3 | 2,)) + varint(size)


def streamed(response: bytes) -> bytes:
    """A ModelInferResponse's bytes inside those of a ModelStreamInferResponse."""
    return b"".join((b"\x12", varint(len(response)), response))


@functools.lru_cache(1024)
def names_bytes(model: str, version: str) -> bytes:
    """The part of a ModelInferResponse that says who answered."""
    return cast(bytes, _generated()[1](model_name=model, model_version=version).SerializeToString())


@functools.lru_cache(1024)
def outputs_bytes(tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """The part that says what tensors (name, datatype, shape) there are."""
    message = _generated()[1]()
    for name, datatype, shape in tensors:
        message.outputs.add(name=name, datatype=datatype, shape=shape)
    return cast(bytes, message.SerializeToString())


# JSON -----------------------------------------------------------------------------------------------------------

def request_from_json(body: Any, binary: bytes | memoryview = b"") -> Inference:
    """A parsed v2 JSON request (``{"inputs": […]}``) and the binary data behind it → arrays. Raises Invalid."""
    entries = _entries(body, "inputs")
    if not entries:
        raise Invalid("inputs is empty; a request needs one tensor or more")
    outputs = [_text(o, "name") for o in _entries(body, "outputs")]
    return Inference(id=_text(body, "id", ""), parameters=_object(body), tensors=_json_tensors(entries, binary),
                     outputs=tuple(outputs), raw=False)


def response_from_json(body: Any, binary: bytes | memoryview = b"") -> Inference:
    """A parsed v2 JSON response and the binary data behind it."""
    return Inference(_text(body, "model_name", ""), _text(body, "model_version", ""), _text(body, "id", ""),
                     _object(body), _json_tensors(_entries(body, "outputs"), binary), raw=False)


def _json_tensors(entries: list[Any], binary: bytes | memoryview) -> list[Tensor]:
    tensors: dict[str, Tensor] = {}
    at = 0
    for entry in entries:
        name, datatype, shape = _text(entry, "name"), _text(entry, "datatype"), entry.get("shape")
        if name in tensors:
            raise bad(name, "is given twice")
        if not isinstance(shape, list):
            raise bad(name, "shape must be a list of whole numbers")
        given = dict(_object(entry)) if "parameters" in entry else {}
        size = given.pop("binary_data_size", None)
        if size is None:
            array = from_json(name, datatype, shape, entry.get("data"))
        else:
            if isinstance(size, bool) or not isinstance(size, int) or size < 0 or at + size > len(binary):
                raise bad(name, f"binary_data_size {size} does not fit the {len(binary) - at} bytes left in the body")
            array = from_raw(name, datatype, shape, binary[at:at + size])
            at += size
        tensors[name] = Tensor(name, array, datatype, given)
    if at != len(binary):
        raise Invalid(f"{len(binary) - at} bytes of binary data belong to no tensor")
    return list(tensors.values())


def to_json_parts(answer: Inference, binary: Sequence[str] | bool = False) -> tuple[dict[str, Any], list[bytes]]:
    """A response as a JSON object and the raw data of the tensors named in ``binary`` (True: all), in order."""
    outputs, parts = [], []
    for tensor in answer.tensors:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.array.shape)}
        given = dict(tensor.parameters) if tensor.parameters else {}
        if binary is True or (binary is not False and tensor.name in binary):
            parts.append(to_raw(tensor))
            given["binary_data_size"] = len(parts[-1])
        else:
            entry["data"] = to_json(tensor)
        if given:
            entry["parameters"] = given
        outputs.append(entry)
    body: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
    if answer.id:
        body["id"] = answer.id
    if answer.parameters:
        body["parameters"] = dict(answer.parameters)
    body["outputs"] = outputs
    return body, parts


def _entries(body: Any, key: str) -> list[Any]:
    found = body.get(key, []) if isinstance(body, dict) else None
    if isinstance(found, list):
        for item in found:
            if not isinstance(item, dict):
                break
        else:
            return found
    raise Invalid(f"the body must be a JSON object with '{key}': a list of objects")


def _text(body: Mapping[str, Any], key: str, default: str | None = None) -> str:
    found = body.get(key, default)
    if not isinstance(found, str):
        raise Invalid(f"'{key}' must be text")
    return found


def _object(body: Mapping[str, Any]) -> Mapping[str, Any]:
    found = body.get("parameters", {})
    if not isinstance(found, dict):
        raise Invalid("'parameters' must be an object")
    return cast(Mapping[str, Any], found)
