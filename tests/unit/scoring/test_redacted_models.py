"""What a model takes as a redacted input is redacted, whatever its caller called it: looked for on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.decode import inputs, outputs
from modelyard.core.segments import RECORD
from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Call
from modelyard.scoring.codecs import StreamCodec
from modelyard.scoring.dataplane import DataPlane
from tests.unit.scoring.planes import grpc_call, rest_call, score_call
from tests.unit.scoring.test_capture_policy import planned, spooled
from tests.unit.scoring.test_joined_flavours import graph

SECRET = 12_345.678
ROW = [SECRET, -SECRET]
MARKS = [f(v) for v in ROW for f in (lambda v: np.float32(v).tobytes(), lambda v: np.float64(v).tobytes())]
MARKS += [b"12345.6"]


def shown(folder: Path) -> list[bytes]:
    """Which of the secret's forms are on the disk."""
    return [mark for path in (folder / "spool").iterdir() for mark in MARKS if mark in path.read_bytes()]


def tensor(name: str, values: Any = ROW, type_: type = np.float32) -> Tensor:
    return Tensor(name, np.array([values], type_))


def rest(model: str, *names: str) -> Call:
    return rest_call(model, {"inputs": [{"name": name, "datatype": "FP32", "shape": [1, 2], "data": ROW}
                                        for name in names]})


def stream(model: str, *tensors: Tensor) -> Call:
    return Call("stream", "ModelStreamInfer", grpc_call(model, *tensors).body, "application/grpc", StreamCodec())


async def asked(plane: DataPlane, calls: list[Call]) -> list[str]:
    """The statuses of calls one after the other: so they are recorded."""
    return [(await plane.handle([call]))[0].status for call in calls]


def estimator(folder: Path, names: list[str] | None = None) -> dict[str, Any]:
    """A classifier of two columns; with ``names`` it was fitted with a frame of these."""
    import skops.io
    from sklearn.linear_model import LogisticRegression

    rows: Any = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 2.0], [2.0, 0.1]])
    if names:
        import pandas as pd

        rows = pd.DataFrame(rows, columns=names)
    skops.io.dump(LogisticRegression().fit(rows, [0, 1, 0, 1]), folder / "m.skops")
    return {"name": "m", "version": 1, "file": folder / "m.skops", "framework": "scikit-learn"}


ONE: dict[str, Callable[[], Call]] = {
    "its own name": lambda: grpc_call("m", tensor("x")),
    "a foreign name": lambda: grpc_call("m", tensor("whatever")),
    "typed": lambda: grpc_call("m", tensor("whatever"), raw=False),
    "a stream": lambda: stream("m", tensor("whatever")),
    "v2": lambda: rest("m", "whatever"),
    "data": lambda: score_call({"data": [ROW]}),
    "bare": lambda: score_call([ROW]),
    "own field": lambda: score_call({"x": [ROW]}),
    "JSON in a tensor": lambda: grpc_call("m", Tensor("b", np.array([json.dumps([ROW]).encode()], object), "BYTES",
                                                      {"content_type": "application/json"})),
    "refused": lambda: score_call({"note": [ROW]}),
    "refused, several": lambda: grpc_call("m", tensor("a"), tensor("b")),
}


@pytest.mark.parametrize("how", ONE)
async def test_an_only_input_whatever_it_is_called(tmp_path: Path, how: str) -> None:
    model = graph(tmp_path / "m.onnx", [("Identity", ["x"], {})], {"x": ["n", 2]}, ["n", 2])
    async with planned(tmp_path, None, models=[model], redact=["x", "y"]) as (plane, log):
        answer = (await plane.handle([ONE[how]()]))[0]
        assert answer.status == ("INVALID_ARGUMENT" if how.startswith("refused") else "OK"), answer.error
        assert log.totals["recorded"] == 1
    assert shown(tmp_path) == []


@pytest.mark.parametrize("word", ["input-0", "data"])
async def test_both_names_of_an_only_input_are_one(tmp_path: Path, word: str) -> None:
    calls = [grpc_call("m", tensor("input-0")), grpc_call("m", tensor("z")), score_call({"data": [ROW]}),
             rest("m", "a")]
    async with planned(tmp_path, None, models=[estimator(tmp_path)], redact=[word]) as (plane, _):
        assert set(await asked(plane, calls)) == {"OK"}
    assert shown(tmp_path) == []
    answers = [outputs(f.text()[3], f.response, f.text()[7]) for f in spooled(tmp_path) if f.kind == RECORD]
    assert answers == [{"predict": [1]}] * 2 + [{"output-0": [1]}] + [{"predict": [1]}], "and the answers are kept"


async def test_columns_that_an_estimator_knows(tmp_path: Path) -> None:
    """Named ones go alone; where rows name none, all of them go."""
    model = estimator(tmp_path, ["age", "salary"])
    rows = [[SECRET, 1.5]]
    calls = [score_call({"columns": ["age", "salary"], "data": rows}), score_call({"data": rows}),
             score_call({"columns": ["x", "y"], "data": rows}), grpc_call("m", tensor("input-0", rows[0])),
             score_call({"columns": ["salary", "age"], "data": rows}),
             score_call({"columns": ["salary"], "data": rows})]
    async with planned(tmp_path, None, models=[model], redact=["age"]) as (plane, _):
        assert set(await asked(plane, calls)) == {"OK"}
    assert shown(tmp_path) == []
    kept = [inputs(f.text()[3], f.request, f.text()[6]) for f in spooled(tmp_path) if f.kind == RECORD]
    assert kept[0] == {"columns": ["salary"], "data": [[1.5]]} and not any(kept[1:])


async def test_of_several_inputs_only_what_surely_is_another_is_kept(tmp_path: Path) -> None:
    model = graph(tmp_path / "m.onnx", [("Add", ["a", "b"], {})], {"a": ["n", 2], "b": ["n", 2]}, ["n", 2])
    calls = [grpc_call("m", tensor("a"), tensor("b", [1, 2])), score_call({"a": [ROW], "b": [[1, 2]]}),
             score_call({"data": {"a": [ROW], "b": [[1, 2]]}}), grpc_call("m", tensor("A"), tensor("b", [1, 2])),
             rest("m", "A", "c")]
    async with planned(tmp_path, None, models=[model], redact=["a", "y"]) as (plane, _):
        assert await asked(plane, calls) == ["OK"] * 3 + ["INVALID_ARGUMENT"] * 2
    assert shown(tmp_path) == []
    kept = [inputs(f.text()[3], f.request, f.text()[6]) for f in spooled(tmp_path) if f.kind == RECORD]
    b = {"b": [[1.0, 2.0]]}
    assert kept == [b, {"b": [[1, 2]]}, {}, b, {}]


async def test_an_answer_that_names_nothing_is_its_output(tmp_path: Path) -> None:
    """And another output's redaction does not take it away."""
    for redact, kept in (("predict", False), ("predict_proba", True)):
        folder = tmp_path / redact
        folder.mkdir()
        async with planned(folder, None, models=[estimator(folder)], redact=[redact]) as (plane, _):
            assert (await plane.handle([score_call([[1, 0]])]))[0].body == b"[1]"
            asked = grpc_call("m", tensor("x", [1, 0]), outputs=("predict", "predict_proba"))
            assert (await plane.handle([asked]))[0].status == "OK"
        plain, named = [f for f in spooled(folder) if f.kind == RECORD]
        assert plain.response == (b"[1]" if kept else b"")
        assert set(outputs("grpc", named.response, named.text()[7])) == {"predict", "predict_proba"} - {redact}


async def test_each_model_has_its_own_names(tmp_path: Path) -> None:
    both = [graph(tmp_path / "m.onnx", [("Identity", ["x"], {})], {"x": ["n", 2]}, ["n", 2]),
            {**graph(tmp_path / "o.onnx", [("Identity", ["z"], {})], {"z": ["n", 2]}, ["n", 2]), "name": "o"}]
    async with planned(tmp_path, None, models=both, redact=["x", "y"]) as (plane, _):
        calls = [grpc_call("m", tensor("foreign")), grpc_call("o", tensor("foreign", [1, 2]))]
        assert set(await asked(plane, calls)) == {"OK"}
    assert shown(tmp_path) == []
    kept = [inputs(f.text()[3], f.request, f.text()[6]) for f in spooled(tmp_path) if f.kind == RECORD]
    assert kept == [{}, {"foreign": [[1.0, 2.0]]}]


async def test_a_scoring_files_only_tensor_is_data(tmp_path: Path) -> None:
    score = "import numpy as np\ndef run(data: np.ndarray):\n    return 1\n"
    calls = [grpc_call("flower", tensor("any")), score_call({"data": [ROW]}), score_call([ROW]), rest("flower", "any")]
    async with planned(tmp_path, score, redact=["data"]) as (plane, _):
        assert set(await asked(plane, calls)) == {"OK"}
    assert shown(tmp_path) == []
