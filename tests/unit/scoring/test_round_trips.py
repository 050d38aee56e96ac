"""Any tensor, in every form that the protocol has, comes back as it was; what does not fit is named."""

from __future__ import annotations

import math
import struct

import hypothesis.strategies as st
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis.extra import numpy as arrays

from modelyard.core.errors import Invalid
from modelyard.core.inference import (
    Inference,
    from_message,
    parse_request,
    read_request,
    read_response,
    request_from_json,
    response_bytes,
    response_from_json,
    response_message,
    streamed,
    to_json_parts,
    write_request,
)
from modelyard.core.tensors import DATATYPES, FIELDS, ITEM, Tensor, from_raw, objects
from modelyard.wire import inference_pb2 as pb

slower = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
NUMBERS = [dtype for dtype in DATATYPES if dtype != "O"]


@st.composite
def tensors(draw: st.DrawFn, name: str = "x", finite: bool = False, text: bool = False) -> Tensor:
    """A tensor of any datatype and shape; ``text``: BYTES that are UTF-8."""
    shape = draw(SHAPES)
    if draw(st.booleans()) and draw(st.booleans()):
        element = st.text(st.characters(exclude_categories=("Cs",)), max_size=6).map(str.encode) if text else \
            st.binary(max_size=200)
        items = draw(st.lists(element, min_size=math.prod(shape), max_size=math.prod(shape)))
        return Tensor(name, objects(name, items, shape), "BYTES")
    dtype = draw(st.sampled_from(NUMBERS))
    elements = {"allow_nan": False, "allow_infinity": False} if finite and dtype[0] == "f" else None
    array = draw(arrays.arrays(np.dtype(dtype), shape, elements=elements))
    if array.ndim > 1 and draw(st.booleans()):
        array = array.T  # another memory layout
    if draw(st.booleans()):
        array = array.astype(array.dtype.newbyteorder())
    return Tensor(name, array)


@st.composite
def many(draw: st.DrawFn, finite: bool = False, text: bool = False) -> list[Tensor]:
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    return [draw(tensors(name, finite, text)) for name in names]


def same(back: list[Tensor], given_: list[Tensor]) -> None:
    assert [(t.name, t.datatype, t.array.shape) for t in back] == [(t.name, t.datatype, t.array.shape) for t in given_]
    for got, wanted in zip(back, given_, strict=True):
        assert got.array.dtype == wanted.array.dtype
        if wanted.datatype == "BYTES":
            assert got.array.tolist() == wanted.array.tolist()
        else:
            assert got.array.tobytes() == wanted.array.tobytes(), "bit by bit, NaN and the sign of zero as well"


@given(many(), st.booleans())
@slower
def test_requests(given_: list[Tensor], raw: bool) -> None:
    back = read_request(write_request(Inference("m", "3", "id", tensors=given_, raw=raw)))
    same(back.tensors, given_)
    assert back.raw == (raw or any(t.datatype not in FIELDS for t in given_))


@given(many(), st.booleans(), NAMES, NAMES, NAMES)
@slower
def test_responses(given_: list[Tensor], raw: bool, model: str, version: str, id_: str) -> None:
    answer = Inference(model, version, id_, {}, given_, raw=raw)
    wire = response_bytes(answer)
    message = response_message(answer)
    assert wire == message.SerializeToString(deterministic=True), "put together from pieces or not"
    same(read_response(wire).tensors, given_)
    inside = pb.ModelStreamInferResponse(infer_response=message)
    assert streamed(wire) == inside.SerializeToString(deterministic=True)


@given(many(finite=True, text=True), st.booleans())
@example([Tensor("x", np.array([0, 2**63], np.uint64))], False)
@slower
def test_json(given_: list[Tensor], binary: bool) -> None:
    body, parts = to_json_parts(Inference("m", "1", tensors=given_), binary)
    said = orjson.loads(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
    same(response_from_json(said, b"".join(parts)).tensors, given_)
    assert not (parts and not binary)


@given(many(text=True), st.data())
@slower
def test_json_with_some_binary(given_: list[Tensor], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from([t.name for t in given_]), unique=True))
    finite = [t for t in given_ if t.name in chosen or t.array.dtype.kind != "f" or np.isfinite(t.array).all()]
    body, parts = to_json_parts(Inference("m", "1", tensors=finite), chosen)
    body["inputs"] = body.pop("outputs")
    if finite:
        said = orjson.loads(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
        same(request_from_json(said, b"".join(parts)).tensors, finite)


@given(st.sampled_from(sorted(ITEM)), SHAPES, st.integers(-9, 9))
@slower
def test_raw_contents_of_another_length_are_named(datatype: str, shape: tuple[int, ...], more: int) -> None:
    wanted = math.prod(shape) * ITEM[datatype]
    raw = bytes(max(wanted + more, 0))
    if len(raw) == wanted:
        assert from_raw("x", datatype, shape, raw).shape == shape
        return
    with pytest.raises(Invalid, match=r"tensor 'x'") as error:
        from_raw("x", datatype, shape, raw)
    assert f"{list(shape)} needs {wanted} raw bytes, not {len(raw)}" in error.value.message


@given(st.sampled_from(sorted(FIELDS)), SHAPES, st.integers(-3, 3))
@slower
def test_typed_contents_of_another_length_are_named(datatype: str, shape: tuple[int, ...], more: int) -> None:
    wanted = math.prod(shape)
    number = max(wanted + more, 0)
    contents = pb.InferTensorContents(**{FIELDS[datatype]: [b"" if datatype == "BYTES" else 0] * number})
    message = pb.ModelInferRequest(inputs=[
        pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=shape, contents=contents)])
    if number == wanted:
        assert from_message(message).tensors[0].array.shape == shape
        return
    with pytest.raises(Invalid, match=r"tensor 'x'") as error:
        from_message(message)
    assert f"needs {wanted} elements, not {number}" in error.value.message


def test_typed_contents_with_fields_that_nobody_knows() -> None:
    values = np.array([1.5, -2.0], np.float32)
    wire = pb.InferTensorContents(fp32_contents=values.tolist()).SerializeToString()
    for unknown in (b"\xa2\x01\x03abc", b"\xa0\x01\x05"):
        for mixed in (wire + unknown, unknown + wire, wire[:2] + wire[2:] + unknown * 3):
            tensor = pb.ModelInferRequest.InferInputTensor(
                name="x", datatype="FP32", shape=[2], contents=pb.InferTensorContents.FromString(mixed))
            found = from_message(pb.ModelInferRequest(inputs=[tensor])).tensors[0].array
            assert found.tolist() == values.tolist() and found.dtype == np.float32


@given(st.lists(st.binary(max_size=9), max_size=6), st.integers(0, 60), st.binary(max_size=5))
@slower
def test_cut_bytes_elements_are_named(items: list[bytes], cut: int, more: bytes) -> None:
    raw = b"".join(struct.pack("<I", len(item)) + item for item in items)
    assert from_raw("x", "BYTES", [len(items)], raw).tolist() == items
    changed = raw[:cut] + more
    try:
        found = from_raw("x", "BYTES", [len(items)], changed)
    except Invalid as exc:
        assert "tensor 'x'" in exc.message
    else:
        assert b"".join(struct.pack("<I", len(item)) + item for item in found.tolist()) == changed


@given(st.binary(max_size=300))
@slower
def test_any_bytes_are_a_request_or_invalid(wire: bytes) -> None:
    try:
        found = from_message(parse_request(wire))
    except Invalid:
        return
    assert all(t.array.dtype is not None for t in found.tensors)
