"""Named values are taken out of bodies before they reach the disk. What cannot be read is not kept at all.

A gRPC or v2 body is decoded and written again without the named tensors, so nothing that a decoder passes over stays
in it. In a JSON document the names are fields at any depth, tensors in lists, and columns beside ``data``.

Callers may call a model's input otherwise than the model does, or not at all. So, of a model of which it is known what
it takes and gives, and of which something there is redacted, nothing is kept but what surely is something else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.decode import INPUT, OUTPUT
from ..core.inference import (
    BINARY,
    JSON,
    PROTO,
    Inference,
    read_request,
    read_response,
    request_from_json,
    response_bytes,
    response_from_json,
    streamed,
    to_json_parts,
    write_request,
)
from ..core.tensors import Tensor
from .records import Names

WITHHELD = "; withheld"
"""Behind the type of a body that was not kept."""
Body = tuple[bytes, str]


@dataclass(frozen=True)
class _Side:
    """What may stay of a model's inputs, or of its outputs. ``only``: tensors of these names, None: of all that are
    not redacted; ``fields``: the same of a JSON document; ``alone``: something that bears no name may stay;
    ``any``: an only tensor is redacted whatever its name."""

    only: frozenset[str] | None = None
    fields: frozenset[str] | None = None
    columns: tuple[str, ...] = ()
    alone: bool = True
    any: bool = False


FREE = _Side()


def _side(redact: frozenset[str], own: Sequence[str], unnamed: str, columns: Sequence[str] = (),
          alone: str = "") -> _Side:
    """``own``: the model's names; ``unnamed``: what the only one is called in a body that names nothing; ``columns``:
    those of the only one; ``alone``: which one it is that stands in a body by itself."""
    if not own:
        return _Side(any=unnamed in redact)
    one = len(own) == 1
    whole = bool(redact & {*own, *((unnamed,) if one else ())})
    if not whole and not redact & set(columns):
        return FREE
    inside = tuple(own if not one else columns if not whole else ())
    kept = frozenset(inside) - redact
    alone = alone or (own[0] if one else "")
    return _Side(frozenset() if one else kept, kept, inside,
                 bool(alone) and alone not in redact and not (one and unnamed in redact) and not redact & set(columns))


class Redactor:
    """Takes ``names`` out. Never raises: a body that makes trouble is withheld."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._sides: dict[str, tuple[_Side, _Side]] = {}

    def learn(self, model: str, own: Names) -> None:
        """What a model calls its inputs and outputs. Of others the names are what callers write."""
        self._sides[model] = (_side(self._names, own.inputs, INPUT, own.columns),
                              _side(self._names, own.outputs, OUTPUT, alone=own.alone))

    def request(self, protocol: str, body: bytes, type_: str, model: str = "") -> Body:
        """A call's request as it may be kept, and its type."""
        try:
            side = self._of(model)[0]
            if type_.startswith(PROTO):
                return write_request(self._tensors(read_request(body), side)), type_
            if protocol == "rest":
                head, rest = _split(body, type_)
                return _v2(self._tensors(request_from_json(head, rest), side), "inputs")
            return self._plain(body, INPUT, side), type_
        except Exception:  # noqa: BLE001 - also what runs too deep; nothing that was not understood is kept
            return b"", type_ + WITHHELD

    def response(self, protocol: str, status: str, body: bytes, type_: str, model: str = "") -> Body:
        """As ``request``. A failure's body is withheld: its message may quote what was sent."""
        try:
            side = self._of(model)[1]
            if status != "OK":
                return b"", type_ + WITHHELD if body else type_
            if type_.startswith(PROTO):
                wire = response_bytes(self._tensors(read_response(body, stream=protocol == "stream"), side))
                return streamed(wire) if protocol == "stream" else wire, type_
            if protocol == "rest":
                head, rest = _split(body, type_)
                return _v2(self._tensors(response_from_json(head, rest), side), "outputs")
            return self._plain(body, OUTPUT, side), type_
        except Exception:  # noqa: BLE001 - as above
            return b"", type_ + WITHHELD

    def _of(self, model: str) -> tuple[_Side, _Side]:
        return self._sides.get(model, (FREE, FREE))

    def rows(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[Any]]]:
        """Collected rows without the named columns. Raises ValueError for rows that are not as wide as the columns."""
        kept = [n for n, column in enumerate(columns) if column not in self._names]
        if any(len(row) != len(columns) for row in rows):
            raise ValueError("rows are not as wide as their columns")
        return [columns[n] for n in kept], [[self._clean(row[n]) for n in kept] for row in rows]

    def _tensors(self, call: Inference, side: _Side) -> Inference:
        """Without the named tensors and parameters; JSON that a tensor holds is cleaned inside."""
        call.parameters = self._fields(call.parameters)
        kept = [tensor for tensor in call.tensors
                if tensor.name not in self._names and (side.only is None or tensor.name in side.only)]
        call.tensors = [] if side.any and len(call.tensors) == 1 else [self._embedded(tensor) for tensor in kept]
        return call

    def _embedded(self, tensor: Tensor) -> Tensor:
        given = self._fields(tensor.parameters)
        array = tensor.array
        if tensor.datatype == "BF16":  # it was read as float32, and nothing writes it
            return Tensor(tensor.name, array, "FP32", given)
        if tensor.datatype == "BYTES" and given.get("content_type") == JSON:
            cleaned = [self._plain(_bytes(value), "", FREE) for value in array.reshape(-1).tolist()]
            array = np.array([*cleaned, None], dtype=object)[:-1].reshape(array.shape)
        return Tensor(tensor.name, array, tensor.datatype, given)

    def _fields(self, values: Any) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in self._names}

    def _plain(self, body: bytes, name: str, side: _Side) -> bytes:
        """A JSON document; ``name`` is what one that names nothing itself is called."""
        value = json.loads(body)
        if side.fields is not None:
            value = _within(value, side, side.fields)
        elif name in self._names and not isinstance(value, dict):
            raise ValueError(f"all of it is '{name}'")
        return json.dumps(self._clean(value), separators=(",", ":"), ensure_ascii=False).encode()

    def _clean(self, value: Any) -> Any:
        if isinstance(value, dict):
            if isinstance(name := value.get("name"), str) and name in self._names:
                return {"name": name}
            if isinstance(value.get("columns"), list):
                value = self._frame(value)
            return {key: self._clean(item) for key, item in self._fields(value).items()}
        if isinstance(value, list):
            return [self._clean(item) for item in value]
        return value

    def _frame(self, value: dict[str, Any]) -> dict[str, Any]:
        """``{"columns": names, "data": rows}`` without the named columns."""
        columns, rows = value["columns"], value.get("data")
        named = {column for column in columns if isinstance(column, str)} & self._names
        if not named or "data" in self._names:
            return value
        if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
            raise ValueError("rows are not as wide as their columns")
        kept = [n for n, column in enumerate(columns) if not (isinstance(column, str) and column in named)]
        return {**value, "columns": [columns[n] for n in kept], "data": [[row[n] for n in kept] for row in rows]}


def _within(value: Any, side: _Side, fields: frozenset[str]) -> Any:
    """What of a document may stay. Raises ValueError where something redacted may stand in it under no name."""
    if isinstance(value, dict):
        if _is_table(value, side):
            return {key: value[key] for key in ("columns", "data")}
        return {key: item for key, item in value.items() if key in fields}
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return [_within(row, side, fields) for row in value]
    if not side.alone:
        raise ValueError("it names nothing")
    return value


def _is_table(value: dict[str, Any], side: _Side) -> bool:
    """Rows under columns that are known, each as wide. A model of one input takes them by their places, so there they
    are only what they are called when all of them stand in the model's own order."""
    columns, rows = value.get("columns"), value.get("data")
    if not isinstance(columns, list) or not isinstance(rows, list) or not side.columns:
        return False
    known = set(side.columns).issuperset(map(str, columns)) if side.only else columns == list(side.columns)
    return known and all(isinstance(row, list) and len(row) == len(columns) for row in rows)


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _split(body: bytes, type_: str) -> tuple[Any, bytes]:
    _, found, length = type_.partition("header-length=")
    at = int(length) if found else len(body)
    return json.loads(body[:at]), body[at:]


def _v2(call: Inference, tensors: str) -> Body:
    """A v2 body. Tensors travel in binary: each datatype has such a form, and no JSON form loses a bit."""
    body, parts = to_json_parts(call, True)
    if tensors == "inputs":
        body = {key: body[key] for key in ("id", "parameters") if key in body} | {"inputs": body["outputs"]}
    head = json.dumps(body, separators=(",", ":")).encode()
    return (head + b"".join(parts), f"{BINARY}; header-length={len(head)}") if parts else (head, JSON)
