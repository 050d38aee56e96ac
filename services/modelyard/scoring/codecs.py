"""Codecs: gRPC (unary and stream), REST v2 JSON with the binary tensor extension, and ``/score``."""

from __future__ import annotations

from typing import Any

import orjson

from ..core.errors import Invalid, ModelyardError
from ..core.inference import (
    BINARY,
    JSON,
    PROTO,
    Inference,
    parse_request,
    read_tensors,
    request_from_json,
    response_bytes,
    streamed,
    to_json_parts,
)
from ..core.tensors import Tensor
from . import heads, results
from .arguments import parse
from .calls import Asked, Call, Codec, Served, Writer, statuses
from .parts import Rows

PROBLEM = "application/problem+json"
NOTHING: dict[str, Any] = {}


class GrpcCodec(Codec):
    """ModelInferRequest → ModelInferResponse; answers raw when the request was raw, typed when it was typed."""

    def __init__(self) -> None:
        self._heads = heads.Heads()

    def open(self, call: Call) -> Asked:
        body = call.body
        if (head := self._heads.find(body)) is not None:
            return Asked(head.model, head.version, head.id, None, None, head.outputs, True, body, head)
        message = parse_request(body)
        return Asked(message.model_name, message.model_version, message.id, wire=(message, body))

    def read(self, asked: Asked) -> None:
        if (head := asked.head) is not None:
            asked.tensors = [Tensor(head.name, head.array(asked.wire), head.datatype)]
            return
        message, body = asked.wire
        raws = message.raw_input_contents
        asked.raw = len(raws) > 0
        asked.tensors = read_tensors(message.inputs, raws, "raw_input_contents")
        if not asked.tensors:
            raise Invalid("inputs is empty; a request needs one tensor or more")
        if message.outputs:
            asked.outputs = tuple(output.name for output in message.outputs)
        self._heads.learn(body, message, asked)

    def write(self, asked: Asked, result: Any, served: Served) -> tuple[bytes, str]:
        return self._answer(asked, result, served), PROTO

    def writer(self, rows: Rows, served: Served) -> Writer | None:
        return heads.writer(rows, served)

    def _answer(self, asked: Asked, result: Any, served: Served) -> bytes:
        made = results.tensors(result, asked.outputs)
        return response_bytes(Inference(served.name, served.version, asked.id, NOTHING, made, raw=asked.raw))


class StreamCodec(GrpcCodec):
    """One message of a stream; failures travel inside it, so that the stream goes on."""

    def write(self, asked: Asked, result: Any, served: Served) -> tuple[bytes, str]:
        return streamed(self._answer(asked, result, served)), PROTO

    def writer(self, rows: Rows, served: Served) -> Writer | None:
        plain = super().writer(rows, served)
        if plain is None:
            return None

        def write(asked: Asked, start: int, end: int) -> tuple[bytes, str] | None:
            written = plain(asked, start, end)
            return None if written is None else (streamed(written[0]), PROTO)

        return write

    def write_error(self, call: Call, error: ModelyardError) -> tuple[bytes, str]:
        from ..wire.inference_pb2 import ModelInferResponse, ModelStreamInferResponse

        text = f"{statuses(error)[0]}: {error.message}"
        try:
            id_ = parse_request(call.body).id
        except Invalid:
            id_ = ""
        message = ModelStreamInferResponse(error_message=text, infer_response=ModelInferResponse(id=id_))
        return message.SerializeToString(), PROTO


class ProblemCodec(Codec):
    """What the REST codecs share: failures as problem+json, with ``error`` for clients of the protocol."""

    def write_error(self, call: Call, error: ModelyardError) -> tuple[bytes, str]:
        return problem(error, call.request_id), PROBLEM


class RestCodec(ProblemCodec):
    """``/v2/models/{m}/infer``. ``call.options`` is the length of the JSON part, or None: all of it."""

    def open(self, call: Call) -> Asked:
        return Asked(call.model, call.version, wire=call)

    def read(self, asked: Asked) -> None:
        call: Call = asked.wire
        size = len(call.body) if call.options is None else call.options
        if size > len(call.body):
            raise Invalid(f"Inference-Header-Content-Length {size} is more than the body's {len(call.body)} bytes")
        document = parse(call.body[:size])
        found = request_from_json(document, memoryview(call.body)[size:])
        asked.tensors, asked.outputs, asked.id = found.tensors, found.outputs, found.id
        asked.wire = _wants_binary(document, found)

    def write(self, asked: Asked, result: Any, served: Served) -> tuple[bytes, str]:
        made = results.tensors(result, asked.outputs)
        body, parts = to_json_parts(Inference(served.name, served.version, asked.id, {}, made), asked.wire)
        head = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        return (head + b"".join(parts), f"{BINARY}; header-length={len(head)}") if parts else (head, JSON)


def _wants_binary(document: Any, found: Inference) -> tuple[str, ...] | bool:
    """Which outputs go as binary data: those that ask for it, or all by the request's own parameter."""
    asked: dict[str, Any] = {}
    for entry in document.get("outputs", ()) if found.outputs else ():
        given = entry.get("parameters")
        asked[entry["name"]] = given.get("binary_data") if isinstance(given, dict) else None
    if found.parameters.get("binary_data_output") is True:
        no = tuple(name for name, wish in asked.items() if wish is False)
        return True if not no else tuple(name for name in asked if name not in no)
    return tuple(name for name, wish in asked.items() if wish is True) or False


class ScoreCodec(ProblemCodec):
    """``POST /score``: a JSON body in, the result as JSON out, unwrapped."""

    def open(self, call: Call) -> Asked:
        return Asked(body=call.body)

    def read(self, asked: Asked) -> None:
        return

    def write(self, asked: Asked, result: Any, served: Served) -> tuple[bytes, str]:
        return results.dump(result), JSON


def problem(error: ModelyardError, request_id: str = "") -> bytes:
    """An error as a problem document (RFC 9457)."""
    status, http = statuses(error)
    return orjson.dumps({"type": "about:blank", "title": status.replace("_", " ").capitalize(), "status": http,
                         "code": error.code, "detail": error.message, "error": error.message,
                         "request_id": request_id})
