"""Captured bytes → inputs and outputs by name, for the telemetry service and the SDK.

Bodies that cannot be decoded give no names: capture keeps what was sent, also when it was nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import Invalid
from .inference import (
    BINARY,
    JSON,
    PROTO,
    Inference,
    read_request,
    read_response,
    request_from_json,
    response_from_json,
)
from .tensors import Tensor

if TYPE_CHECKING:
    import pyarrow as pa

BODIES = ("request", "request_type", "response", "response_type")
INPUT, OUTPUT = "data", "output-0"
"""Names for a plain JSON body that names nothing itself."""


def inputs(protocol: str, body: bytes, type_: str) -> dict[str, Any]:
    """Name → nested lists of a captured request.

    >>> inputs("score", b'{"data": [[5.1, 3.5]]}', "application/json")
    {'data': [[5.1, 3.5]]}
    """
    try:
        if type_.startswith(PROTO):
            return _named(read_request(body))
        if type_.startswith((JSON, BINARY)):
            head, rest = _split(body, type_)
            return _plain(head, INPUT) if protocol == "score" else _named(request_from_json(head, rest))
    except (Invalid, ValueError):
        pass
    return {}


def outputs(protocol: str, body: bytes, type_: str) -> dict[str, Any]:
    """Name → nested lists of a captured response; nothing for a failure's.

    >>> outputs("score", b'[0, 2]', "application/json")
    {'output-0': [0, 2]}
    """
    try:
        if type_.startswith(PROTO):
            return _named(read_response(body, stream=protocol == "stream"))
        if type_.startswith((JSON, BINARY)):
            head, rest = _split(body, type_)
            return _plain(head, OUTPUT) if protocol == "score" else _named(response_from_json(head, rest))
    except (Invalid, ValueError):
        pass
    return {}


def decode(table: pa.Table) -> pa.Table:
    """The columns of the capture files with the bodies replaced by ``inputs.<name>`` and ``outputs.<name>``, one row
    per call; null where a call had no such name. Values that do not share one type are written as JSON text."""
    import pyarrow as pa

    asked: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    for row in table.select(["protocol", "status", *BODIES]).to_pylist():
        asked.append(inputs(row["protocol"], row["request"] or b"", row["request_type"] or ""))
        answered.append(outputs(row["protocol"], row["response"] or b"", row["response_type"] or "")
                        if row["status"] == "OK" else {})
    kept = table.drop_columns(list(BODIES))
    for prefix, rows in (("inputs", asked), ("outputs", answered)):
        for name in dict.fromkeys(name for row in rows for name in row):
            kept = kept.append_column(f"{prefix}.{name}", _column(pa, [row.get(name) for row in rows]))
    return kept


def _column(pa: Any, values: Sequence[Any]) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.array([None if v is None else json.dumps(v, default=str) for v in values])


def _named(call: Inference) -> dict[str, Any]:
    return {tensor.name: _values(tensor) for tensor in call.tensors}


def _values(tensor: Tensor) -> Any:
    if tensor.datatype != "BYTES":
        return tensor.array.tolist()
    texts = _texts(tensor.array.tolist())
    if tensor.parameters.get("content_type") == JSON and tensor.array.size == 1:
        return json.loads(texts if isinstance(texts, str) else tensor.array.reshape(-1)[0])
    return texts


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _split(body: bytes, type_: str) -> tuple[Any, bytes]:
    """The JSON of a REST body, and the binary data behind it where there is some."""
    _, found, length = type_.partition("header-length=")
    at = int(length) if found else len(body)
    return json.loads(body[:at]), body[at:]


def _plain(value: Any, name: str) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
