"""Every datatype in every form, and a clear error for every misfit."""

import json

import numpy as np
import pytest

from modelyard.core.errors import Invalid
from modelyard.core.inference import (
    Inference,
    read_request,
    read_response,
    request_from_json,
    response_from_json,
    response_message,
    to_json_parts,
    write_request,
)
from modelyard.core.tensors import DATATYPES, Tensor
from modelyard.wire import inference_pb2 as pb

DTYPES = [dtype for dtype in DATATYPES if dtype != "O"]


def sample(dtype: str) -> Tensor:
    return Tensor("x", np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype))


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_protobuf_round_trip(dtype: str, raw: bool) -> None:
    tensor = sample(dtype)
    back = read_request(
        write_request(Inference("m", "3", "id", {"a": 1, "b": True, "c": "t", "d": 0.5}, [tensor], raw=raw))
    )
    assert (back.model, back.version, back.id) == ("m", "3", "id")
    assert back.parameters == {"a": 1, "b": True, "c": "t", "d": 0.5}
    assert back.raw == (raw or dtype == "f2"), "FP16 has no typed form"
    assert back.tensors[0].datatype == DATATYPES[dtype]
    np.testing.assert_array_equal(back.tensors[0].array, tensor.array)
    assert back.tensors[0].array.dtype == tensor.array.dtype


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_bytes_round_trip(raw: bool) -> None:
    tensor = Tensor("t", np.array([["a", ""], ["ü", "xyz"]]))
    answer = response_message(Inference("m", tensors=[tensor], raw=raw)).SerializeToString()
    assert read_response(answer).tensors[0].array.tolist() == [[b"a", b""], ["ü".encode(), b"xyz"]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_json_round_trip(dtype: str, binary: bool) -> None:
    tensor = sample(dtype)
    body, parts = to_json_parts(Inference("m", "1", tensors=[tensor]), binary)
    back = response_from_json(json.loads(json.dumps(body)), b"".join(parts))
    np.testing.assert_array_equal(back.tensors[0].array, tensor.array)
    assert back.tensors[0].array.dtype == tensor.array.dtype


def test_bf16_is_read_as_float32() -> None:
    wide = np.array([1.5, -2.0], "<f4")
    raw = (wide.view("<u4") >> 16).astype("<u2").tobytes()
    entry = pb.ModelInferRequest.InferInputTensor(name="x", datatype="BF16", shape=[2])
    back = read_request(pb.ModelInferRequest(inputs=[entry], raw_input_contents=[raw]).SerializeToString())
    assert back.tensors[0].array.tolist() == [1.5, -2.0]


def test_scalars_empty_and_far_memory_layouts() -> None:
    for array in (np.array(3.5), np.empty((0, 4), "f4"), np.arange(6.0).reshape(2, 3).T, np.arange(4, dtype=">i4")):
        back = read_request(write_request(Inference("m", tensors=[Tensor("x", array)]))).tensors[0].array
        assert back.shape == array.shape
        np.testing.assert_array_equal(back, array)


Input = pb.ModelInferRequest.InferInputTensor
BAD = {
    "needs 8 raw bytes, not 4": ({"datatype": "FP32", "shape": [2]}, b"1234"),
    "'FP8' is unknown": ({"datatype": "FP8", "shape": [2]}, b"12"),
    "whole numbers of 0 or more": ({"datatype": "FP32", "shape": [-1]}, b"1234"),
    "too many elements": ({"datatype": "BOOL", "shape": [2**62, 2**62]}, b""),
    "does not fit": ({"datatype": "BYTES", "shape": [1]}, b"\xff\xff\xff\x7fa"),
    "end inside a length": ({"datatype": "BYTES", "shape": [1]}, b"\x01\x00"),
    "needs 2 elements, not 1": ({"datatype": "BYTES", "shape": [2]}, b"\x01\x00\x00\x00a"),
    "both contents and raw": ({"datatype": "FP32", "shape": [1], "contents": {"fp32_contents": [1]}}, b"1234"),
    "belongs in fp32_contents": ({"datatype": "FP32", "shape": [1], "contents": {"fp64_contents": [1]}}, None),
    "needs 3 elements, not 1": ({"datatype": "FP32", "shape": [3], "contents": {"fp32_contents": [1]}}, None),
    "does not fit UINT8": ({"datatype": "UINT8", "shape": [1], "contents": {"uint_contents": [256]}}, None),
    "no typed contents": ({"datatype": "FP16", "shape": [1], "contents": {"fp32_contents": [1]}}, None),
}


@pytest.mark.parametrize("said", BAD)
def test_misfits_name_the_tensor(said: str) -> None:
    fields, raw = BAD[said]
    request = pb.ModelInferRequest(
        inputs=[Input(name="petal", **fields)], raw_input_contents=[] if raw is None else [raw]
    )
    with pytest.raises(Invalid, match="petal") as error:
        read_request(request.SerializeToString())
    assert said in error.value.message


def test_misfitting_messages() -> None:
    two = [Input(name="x", datatype="FP32", shape=[1])] * 2
    with pytest.raises(Invalid, match="given twice"):
        read_request(pb.ModelInferRequest(inputs=two, raw_input_contents=[b"1234"] * 2).SerializeToString())
    with pytest.raises(Invalid, match="1 entries for 2 tensors"):
        read_request(pb.ModelInferRequest(inputs=two, raw_input_contents=[b"1234"]).SerializeToString())
    with pytest.raises(Invalid, match="not a ModelInferRequest"):
        read_request(b"\xff\xff\xff")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"shape": [2], "datatype": "INT8", "data": [1, 300]}, "does not fit INT8"),
        ({"shape": [2], "datatype": "FP32", "data": [1, [2]]}, "not an array"),
        ({"shape": [1], "datatype": "INT64", "data": [1.5]}, "what is not INT64"),
        ({"shape": [1], "datatype": "FP32", "data": ["a"]}, "what is not FP32"),
        ({"shape": [1], "datatype": "BOOL", "data": [1]}, "what is not BOOL"),
        ({"shape": [1], "datatype": "BYTES", "data": [1]}, "text or bytes"),
        ({"shape": [3], "datatype": "FP32", "data": [1, 2]}, "needs 3 elements"),
        ({"shape": [1.5], "datatype": "FP32", "data": [1]}, "whole numbers"),
        ({"shape": "3", "datatype": "FP32", "data": [1]}, "must be a list"),
        ({"shape": [1], "datatype": "FP32"}, "must be a list"),
        ({"shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 9}}, "does not fit"),
        ({"shape": [1], "datatype": "FP32", "data": [None]}, "what is not FP32"),
        ({"shape": [1], "datatype": 3, "data": [1]}, "'datatype' must be text"),
    ],
)
def test_misfitting_json(entry: dict, said: str) -> None:
    with pytest.raises(Invalid) as error:
        request_from_json({"inputs": [{"name": "petal", **entry}]}, b"1234" if "parameters" in entry else b"")
    assert said in error.value.message


@pytest.mark.parametrize("body", [[], 3, {}, {"inputs": 3}, {"inputs": [3]}, {"inputs": []}, {"inputs": [{}]}, None])
def test_json_that_is_no_request(body: object) -> None:
    with pytest.raises(Invalid):
        request_from_json(body)
