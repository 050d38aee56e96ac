"""Whether a file is an ONNX model, and its signature: a walk over protobuf's wire format that loads nothing.

Field numbers are those of onnx.proto: ModelProto.ir_version 1, graph 7; GraphProto.initializer 5, input 11, output 12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

DATATYPES = {1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES",
             9: "BOOL", 10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16"}
"""TensorProto.DataType → the datatype of the Open Inference Protocol."""
MOST_FIELDS = 1_000_000
WINDOW = 64 * 1024
MOST_TEXT = 64 * 1024


class NotOnnx(Exception):
    """Says why."""


@dataclass(frozen=True)
class Field:
    """One field: ``value`` of a number, or where the bytes of the others lie."""

    number: int
    wire: int
    value: int
    start: int
    end: int


class Walk:
    """Fields of messages within ``file``, each passed over unless somebody goes into it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.seen = file, size, 0
        self.window, self.base = b"", 0

    def fields(self, start: int, end: int) -> Iterator[Field]:
        at = start
        while at < end:
            self.seen += 1
            if self.seen > MOST_FIELDS:
                raise NotOnnx("it has too many fields")
            key, at = self.varint(at, end)
            field = self.field(key >> 3, key & 7, at, end)
            if field.number == 0 or field.end > end:
                raise NotOnnx(f"it is damaged or cut off at byte {at}")
            yield field
            at = field.end

    def field(self, number: int, wire: int, at: int, end: int) -> Field:
        if wire == 0:
            value, after = self.varint(at, end)
            return Field(number, wire, value, at, after)
        if wire == 2:
            length, at = self.varint(at, end)
            return Field(number, wire, 0, at, at + length)
        if wire in (1, 5):
            return Field(number, wire, 0, at, at + (8 if wire == 1 else 4))
        raise NotOnnx(f"it is no protobuf message at byte {at}")

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at ``at`` and where it ends. Bytes come by the window: most fields are near the one before."""
        if not self.base <= at <= self.base + len(self.window) - 10:
            self.file.seek(at)
            self.window, self.base = self.file.read(WINDOW), at
        value = shift = 0
        for byte in self.window[at - self.base:at - self.base + min(10, end - at)]:
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        raise NotOnnx(f"it is damaged or cut off at byte {at}")

    def text(self, field: Field) -> str:
        if field.wire != 2 or field.end - field.start > MOST_TEXT:
            raise NotOnnx(f"no text where a name should be, at byte {field.start}")
        self.file.seek(field.start)
        return self.file.read(field.end - field.start).decode("utf-8", "replace")

    def inside(self, outer: Field, number: int, wire: int = 2) -> Iterator[Field]:
        if outer.wire != 2:
            raise NotOnnx(f"no message where one should be, at byte {outer.start}")
        return (f for f in self.fields(outer.start, outer.end) if f.number == number and f.wire == wire)


def scan(file: BinaryIO, size: int) -> dict[str, Any]:
    """``{"inputs": [{"name", "datatype", "shape"}], "outputs": […]}``, unknown sizes as -1. Raises NotOnnx."""
    walk = Walk(file, size)
    version, graph = 0, None
    for field in walk.fields(0, size):
        if field.number == 1 and field.wire == 0:
            version = field.value
        elif field.number == 7 and field.wire == 2:
            graph = field
    if graph is None or not 1 <= version < 1000:
        raise NotOnnx("it has no graph" if graph is None else "it has no ir_version")
    inputs, outputs, constants = [], [], set()
    for field in walk.fields(graph.start, graph.end):
        if field.number == 11:
            inputs.append(_value_info(walk, field))
        elif field.number == 12:
            outputs.append(_value_info(walk, field))
        elif field.number == 5:
            constants |= {walk.text(name) for name in walk.inside(field, 8)}
    if not outputs:
        raise NotOnnx("its graph has no output")
    return {"inputs": [i for i in inputs if i["name"] not in constants], "outputs": outputs}


def _value_info(walk: Walk, field: Field) -> dict[str, Any]:
    """ValueInfoProto: name 1, type 2 → TypeProto.tensor_type 1 → elem_type 1, shape 2 → dim 1 → dim_value 1.
    What is no tensor (a sequence, a map) has the datatype OBJECT."""
    out: dict[str, Any] = {"name": "", "datatype": "OBJECT", "shape": []}
    for name in walk.inside(field, 1):
        out["name"] = walk.text(name)
    for kind in walk.inside(field, 2):
        for tensor in walk.inside(kind, 1):
            for element in walk.inside(tensor, 1, wire=0):
                out["datatype"] = DATATYPES.get(element.value, "OBJECT")
            for shape in walk.inside(tensor, 2):
                out["shape"] = [_size(walk, dim) for dim in walk.inside(shape, 1)]
    return out


def _size(walk: Walk, dim: Field) -> int:
    sizes = [value.value for value in walk.inside(dim, 1, wire=0)]
    return sizes[-1] if sizes and 0 < sizes[-1] < 2**63 else -1
