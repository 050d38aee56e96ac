"""Numbers in JSON become the arrays that numpy would make of them, or are left to it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson
import pytest

from modelyard.core.numbers import MANY, numbers
from modelyard.core.tensors import Tensor, from_json, to_json

FLOATS = [0.1, -0.0, 1e308, 5e-324, 1.0, 3.25, math.pi] * 3
INTS = [0, -1, 2**62, -(2**63), 2**63 - 1, 7] * 3
TAKEN: list[list[Any]] = [FLOATS, INTS, [[*FLOATS]], [[1.5, 2.5]] * 20, [[n, n + 1] for n in range(20)],
                          [0.5, *range(20)], [0.5, True, 2**63] * 8, [1, True, False] * 8]
LEFT: list[list[Any]] = [[], [1.5] * (MANY - 1), [*range(20), 0.5], [True] * 20, [*FLOATS, None], [*FLOATS, "1"],
                         ["1"] * 20, [2**63] * 20, [1, 2**63] * 10, [[1.5] * 20, [1.5] * 19], [[1.5] * 20, 1.5],
                         [[1.5] * 20, "x" * 20], [[[1.5] * 20]], [{"a": 1}] * 20,
                         [[1.5] * 9, {str(n): n for n in range(9)}]]


@pytest.mark.parametrize("data", TAKEN)
def test_what_numpy_would_make(data: list[Any]) -> None:
    right, found = np.array(data), numbers(data)
    assert found is not None and found.dtype == right.dtype and found.shape == right.shape
    assert found.tobytes() == right.tobytes()


@pytest.mark.parametrize("data", LEFT)
def test_what_is_left_to_numpy(data: list[Any]) -> None:
    assert numbers(data) is None


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "INT8", "UINT16", "INT32", "INT64", "UINT64", "BOOL"])
@pytest.mark.parametrize("count", [1, MANY - 1, MANY, 100])
def test_json_of_many_reads_as_json_of_few(datatype: str, count: int) -> None:
    """The same digits, whether numpy's own array is written or a list of it."""
    rng = np.random.default_rng(count)
    from_, to = (0, 2) if datatype == "BOOL" else (0, 100)
    array = rng.integers(from_, to, count) if "FP" not in datatype else rng.normal(size=count)
    tensor = Tensor("x", array.astype({"BOOL": "?", "FP16": "f2", "FP32": "f4", "FP64": "f8"}.get(
        datatype, datatype.lower())))
    assert tensor.datatype == datatype
    wire = orjson.dumps(to_json(tensor), option=orjson.OPT_SERIALIZE_NUMPY)
    assert wire == orjson.dumps(tensor.array.tolist())
    back = from_json("x", datatype, [count], orjson.loads(wire))
    assert back.dtype == tensor.array.dtype and back.tobytes() == tensor.array.tobytes()


def test_what_is_no_number_in_json_is_null_either_way() -> None:
    for count in (3, 30):
        tensor = Tensor("x", np.full(count, np.nan, "f4"))
        assert orjson.loads(orjson.dumps(to_json(tensor), option=orjson.OPT_SERIALIZE_NUMPY)) == [None] * count
