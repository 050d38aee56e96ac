"""What callers give, as tensors and as JSON."""

import numpy as np
import pytest

from modelyard.client.oip import to_tensors
from modelyard.client.scoring import json_body, loopback
from modelyard.core.errors import Invalid


def described(data: object, **declared: str) -> list[tuple[str, str, list[int]]]:
    return [(t.name, t.datatype, list(t.array.shape)) for t in to_tensors(data, declared)]


def test_rows_take_the_declared_name_and_datatype() -> None:
    assert described([[5.1, 3.5]], X="FP32") == [("X", "FP32", [1, 2])]
    assert described([[5, 3]]) == [("input-0", "INT64", [1, 2])]
    assert described({"data": [[5.1, 3.5]]}, X="FP32") == [("X", "FP32", [1, 2])]


def test_arrays_frames_and_columns_keep_their_own() -> None:
    import pandas as pd

    assert described(np.zeros((2, 3), np.float16), X="FP32") == [("X", "FP16", [2, 3])], "no cast"
    frame = pd.DataFrame({"a": [1.5], "b": ["x"]})
    assert described(frame) == [("a", "FP64", [1]), ("b", "BYTES", [1])]
    assert described({"a": [1, 2], "b": [True, False]}) == [("a", "INT64", [2]), ("b", "BOOL", [2])]


def test_text_travels_as_json() -> None:
    (tensor,) = to_tensors('{"anything": [1, {"goes": null}]}', {})
    assert tensor.datatype == "BYTES" and tensor.parameters == {"content_type": "application/json"}


@pytest.mark.parametrize("data", [[[1, 2], [3]], {"a": [{}]}, [[None]]])
def test_what_is_no_array_is_refused(data: object) -> None:
    with pytest.raises(Invalid, match="is not an array"):
        to_tensors(data, {})


def test_json_bodies() -> None:
    import pandas as pd

    assert json_body([[1, 2]]) == {"data": [[1, 2]]}
    assert json_body(np.ones((1, 2))) == {"data": [[1.0, 1.0]]}
    assert json_body(pd.DataFrame({"a": [1], "b": ["x"]})) == {"a": [1], "b": ["x"]}
    assert json_body({"data": np.ones(2)}) == {"data": [1.0, 1.0]}


def test_loopback() -> None:
    assert all(map(loopback, (None, "localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(loopback, ("example.org", "10.0.0.1", "0.0.0.0")))
