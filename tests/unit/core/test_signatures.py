"""Signatures: read in either form, compared, completed; samples that are kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modelyard.core.signatures import SAMPLE_BYTES, differences, fitting, normal, one_row, small, together


def slot(name: str, datatype: str | None = None, shape: list[int] | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, **({"datatype": datatype} if datatype else {}),
            **({"shape": shape} if shape is not None else {}), **more}


def signature(inputs: list[Any], outputs: list[Any] | None = None) -> dict[str, Any]:
    return {"inputs": inputs, "outputs": outputs or []}


def test_mlflows_form_is_read() -> None:
    columns = [{"type": "double", "name": "a", "required": True}, {"type": "string", "name": "b"}]
    tensor = [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 3]}}]
    assert normal({"inputs": json.dumps(columns), "outputs": json.dumps(tensor), "params": None}) == signature(
        [slot("a", "FP64", [-1]), slot("b", "BYTES", [-1])], [slot("output-0", "FP32", [-1, 3])])
    unnamed = [{"type": "long"}, {"type": "double"}]
    assert normal({"inputs": unnamed}) == signature([slot("input-0", "FP64", [-1, 2])])


@pytest.mark.parametrize("given", [
    None, {}, [], "x", {"inputs": 3}, {"inputs": "no json"}, {"inputs": ["x"]}, {"inputs": [{"datatype": "FP32"}]},
    {"inputs": [{"name": "x", "datatype": "float"}]}, {"inputs": [{"name": "x", "shape": ["n"]}]},
    {"inputs": [{"name": "x", "shape": [-2]}]}, {"inputs": [{"name": 1}]}, {"inputs": [{"type": "tensor"}]},
    {"inputs": "[" * 100_000},
])
def test_what_is_no_signature(given: Any) -> None:
    assert normal(given) is None


FILE = signature([slot("x", "FP32", [-1, 4]), slot("y", "INT64", [-1])], [slot("z", "FP32", [-1, 2])])


@pytest.mark.parametrize(("given", "told"), [
    (FILE, []),
    (signature([slot("y"), slot("x")]), []),
    (signature([], [slot("score")]), []),
    (signature([slot("x"), slot("q")]), ["registered as x, q; the file has x, y"]),
    (signature([slot("x")]), ["registered as x; the file has x, y"]),
    (signature([slot("x", "FP64"), slot("y", "INT64", [-1, 1])]),
     ["'x' is registered as datatype FP64; the file says FP32", "'y' is registered as shape [-1, 1]"]),
    (signature([slot("x", None, [8, 5]), slot("y")]), ["shape [8, 5]; the file says [-1, 4]"]),
    (signature([slot("x", None, [8, 4]), slot("y")]), []),
])
def test_what_is_registered_against_what_the_file_says(given: dict[str, Any], told: list[str]) -> None:
    found = differences(given, FILE)
    assert len(found) == len(told) and all(part in line for part, line in zip(told, found, strict=True))


def test_any_number_is_any_number_but_no_text() -> None:
    row = signature([slot("input-0", "FP64", [-1, 4])])
    assert differences(signature([slot("features", "FP32", [-1, 4])]), row, any_number=True) == []
    assert differences(signature([slot("features", "BYTES", [-1, 4])]), row, any_number=True) != []
    assert differences(signature([slot("features", "FP32", [-1, 5])]), row, any_number=True) != []


def test_what_a_file_leaves_open_is_completed() -> None:
    script = signature([slot("x"), slot("bias")], [slot("output-0")])
    given = signature([slot("bias", "FP32", [-1, 1]), slot("x", "FP32", [-1, 2])], [slot("total", "FP32", [-1, 1])])
    assert differences(given, script) == []
    assert together(script, given) == signature(
        [slot("x", "FP32", [-1, 2]), slot("bias", "FP32", [-1, 1])], [slot("output-0", "FP32", [-1, 1])])
    assert together(signature([slot("x", "FP32", [-1, -1])]), signature([slot("q", "INT8", [-1, 4])], [slot("o")])) == \
        signature([slot("x", "FP32", [-1, 4])], [slot("o")])


def test_columns_become_a_row() -> None:
    given = signature([slot("a", "FP64", [-1]), slot("b", "INT64", [-1])])
    assert one_row(given)["inputs"] == [slot("input-0", "FP64", [-1, 2], columns=["a", "b"])]
    assert one_row(FILE) == FILE and one_row(signature([])) == signature([])
    unnamed = {"inputs": [], "outputs": [slot("output-0", "INT64", [-1])]}
    assert one_row(unnamed)["outputs"] == [slot("predict", "INT64", [-1])], "as it is answered"


def test_samples_that_are_kept() -> None:
    assert fitting({"data": [[1, 2]]}) == {"data": [[1, 2]]} and fitting([[1]]) == [[1]]
    rows = [[0.5] * 100 for _ in range(1000)]
    for large in ({"columns": ["a"], "data": rows}, rows, {"a": rows, "b": rows}):
        cut = fitting(large)
        assert small(cut) and not small(large)
        kept = cut if isinstance(cut, list) else cut.get("a") or cut["data"]
        assert len(kept) == 1
    assert fitting({"data": [["x" * SAMPLE_BYTES]]}) is None
    assert fitting("text") is None and fitting({}) is None and fitting({"a": "x" * SAMPLE_BYTES}) is None
