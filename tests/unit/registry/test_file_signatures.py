"""What files say of what they take and give, read without loading any."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.unit.registry.conftest import Registry
from tests.unit.registry.test_claims import folder

if TYPE_CHECKING:  # what makes models is read by the tests that make one: every worker reads this file
    import xgboost

TORCH = Path(__file__).parents[1] / "golden" / "torch"
X = np.arange(90.0).reshape(30, 3) % 7
CLASSES, NAMES = np.arange(30) % 3, ["length", "width", "colour"]
ROW = {"name": "input-0", "datatype": "FP64", "shape": [-1, 3]}


def out(datatype: str, *shape: int) -> list[dict[str, Any]]:
    return [{"name": "predict", "datatype": datatype, "shape": [-1, *shape]}]


def booster(objective: str, y: Any, names: list[str] | None = None, **more: Any) -> xgboost.Booster:
    import xgboost

    return xgboost.train({"objective": objective, "nthread": 1, **more}, xgboost.DMatrix(X, y, feature_names=names), 3)


def light(objective: str, y: Any, names: Any = "auto", **more: Any) -> bytes:
    import lightgbm

    given = {"objective": objective, "verbose": -1, "num_threads": 1, "min_data_in_leaf": 2, **more}
    return lightgbm.train(given, lightgbm.Dataset(X, y, feature_name=names), 3).model_to_string().encode()


@pytest.mark.parametrize(("form", "filename"), [("json", "model.json"), ("ubj", "model.ubj"), ("json", None),
                                                ("ubj", None)])
async def test_xgboost(registry: Registry, form: str, filename: str | None) -> None:
    named = {"filename": filename} if filename else {}
    for objective, y, names, expected in (
            ("multi:softprob", CLASSES, NAMES, out("FP32", 3)), ("multi:softmax", CLASSES, None, out("FP32")),
            ("reg:squarederror", X[:, 0], NAMES, out("FP32")), ("reg:squarederror", X[:, :2], None, out("FP32", 2))):
        more = {"num_class": 3} if objective.startswith("multi") else {}
        data = bytes(booster(objective, y, names, **more).save_raw(form))
        doc = await registry.register(data=data, **named)
        assert doc["framework"] == "xgboost"
        columns = {"columns": NAMES} if names else {}
        assert doc["signature"] == {"inputs": [{**ROW, **columns}], "outputs": expected}


async def test_lightgbm(registry: Registry) -> None:
    doc = await registry.register(data=light("multiclass", CLASSES, NAMES, num_class=3))
    assert doc["framework"] == "lightgbm"
    assert doc["signature"] == {"inputs": [{**ROW, "columns": NAMES}], "outputs": out("FP64", 3)}
    doc = await registry.register(data=light("regression", X[:, 0]), framework="lightgbm", filename="model.txt")
    assert doc["signature"] == {"inputs": [ROW], "outputs": out("FP64")}


async def test_skops(registry: Registry) -> None:
    import skops.io
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for model, outputs in ((LogisticRegression().fit(X, CLASSES), out("INT64")),
                           (make_pipeline(StandardScaler(), LogisticRegression()).fit(X, CLASSES), out("INT64")),
                           (LogisticRegression().fit(X, np.array(["a", "b", "c"])[CLASSES]), out("BYTES")),
                           (LinearRegression().fit(X, X[:, 0]), [])):
        doc = await registry.register(data=skops.io.dumps(model), filename="model.skops")
        assert doc["signature"] == {"inputs": [ROW], "outputs": outputs}


async def test_torchscript_and_exported_programs(registry: Registry) -> None:
    script, program, weights = ((TORCH / name).read_bytes() for name in ("script.pt", "program.pt2", "weights.pt"))
    exported = {"inputs": [{"name": "x", "shape": [-1, 2], "datatype": "FP32"}],
                "outputs": [{"name": "logits", "shape": [-1, 1], "datatype": "FP32"},
                            {"name": "best", "shape": [-1], "datatype": "INT64"}]}
    for named in ({}, {"filename": "model.pt2"}):
        doc = await registry.register(data=program, **named)
        assert (doc["framework"], doc["signature"]) == ("pytorch", exported)
        doc = await registry.register(data=script, **named)
        assert (doc["framework"], doc["signature"]) == (
            "pytorch", {"inputs": [{"name": "x"}, {"name": "bias"}], "outputs": [{"name": "output-0"},
                                                                                 {"name": "output-1"}]})
    assert (await registry.register(data=weights))["framework"] == "custom"
    doc = await registry.register(data=weights, filename="weights.pth")
    assert (doc["framework"], doc["signature"]) == ("pytorch", None)
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        graph = archive.read("serialized_exported_program.json")
    doc = await registry.register(data=zipped({"m/archive_format": b"pt2", "m/models/model.json": graph}))
    assert (doc["framework"], doc["signature"]) == ("pytorch", exported)


def zipped(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


MLMODEL = """
flavors: {python_function: {loader_module: mlflow.pyfunc.model, python_model: python_model.pkl}}
saved_input_example_info: {artifact_path: input_example.json, pandas_orient: split, type: %s}
signature:
  inputs: '%s'
  outputs: '[{"type": "double", "name": "total", "required": true}]'
  params: null
"""
COLUMNS = '[{"type": "double", "name": "a", "required": true}, {"type": "integer", "name": "b", "required": true}]'
TENSOR = '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 3]}}]'


async def test_mlflow_folders(registry: Registry, tmp_path: Path, files: dict[str, bytes]) -> None:
    made = await folder(tmp_path / "columns", MLmodel=(MLMODEL % ("dataframe", COLUMNS)).encode(),
                        **{"input_example.json": b'{"columns": ["a", "b"], "data": [[1.5, 2]]}'})
    doc = await registry.register(data=made, unpack=True)
    assert doc["signature"] == {
        "inputs": [{"name": "a", "datatype": "FP64", "shape": [-1]}, {"name": "b", "datatype": "INT32", "shape": [-1]}],
        "outputs": [{"name": "total", "datatype": "FP64", "shape": [-1]}]}
    assert doc["sample"] == {"columns": ["a", "b"], "data": [[1.5, 2]]} and doc["file_signature"] is None
    made = await folder(tmp_path / "tensor", MLmodel=(MLMODEL % ("ndarray", TENSOR)).encode(),
                        **{"input_example.json": b"[[1.0, 2.0, 3.0]]", "model.onnx": files["onnx"]})
    doc = await registry.register(data=made, unpack=True)
    assert doc["signature"]["inputs"] == [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}]  # as it is served
    assert doc["sample"] == {"data": [[1.0, 2.0, 3.0]]}
    assert (await registry.register(data=made, unpack=True, sample={}))["sample"] == {}


DEEP = b"[" * 20_000
BOMB = b"a: &a [x]\nb: &b [*a, *a]\nsignature: *b\nsaved_input_example_info: *b\n"


@pytest.mark.parametrize(("data", "spec"), [
    (zipped({"schema.json": DEEP}), {"filename": "m.skops"}), (zipped({"schema.json": b"[]"}), {"filename": "m.skops"}),
    (zipped({"schema.json": b'{"content": {"content": {"steps": {"content": 3}}}}'}), {"filename": "m.skops"}),
    (zipped({"serialized_exported_program.json": DEEP}), {"filename": "m.pt2"}),
    (zipped({"models/m.json": b'{"graph_module": 3}'}), {}), (zipped({"models/m.json": b" " * 40_000_000}), {}),
    (zipped({"m/constants.pkl": b"", "m/code/x.py": b""}), {}),
    (zipped({"m/constants.pkl": b"", "m/code/x.py": b"", "m/data.pkl": b"\x80\x02c__torch__\nNet\n"}), {}),
    (b"tree\nversion=v4\nmax_feature_idx=none\n", {}), (b"tree\nversion=v4\n", {}),
    (b'{"learner": {"feature_names": ' + DEEP, {}), (b'{"learner": {"learner_model_param"', {}),
    (b"{L" + bytes(7) + b"\x07learner" + b"feature_names[#L" + b"\xff" * 8 + b"learner_model_param", {}),
])
async def test_odd_files_say_nothing_and_break_nothing(registry: Registry, data: bytes, spec: dict[str, Any]) -> None:
    assert (await registry.register(data=data, **spec))["signature"] is None


@pytest.mark.parametrize("said", [DEEP, BOMB, b"signature: {inputs: '[[', outputs: 3}", b"[1, 2]", b"\xff\xfe{",
                                  b"!!x y",
                                  b"saved_input_example_info: {artifact_path: '../../etc/passwd', type: ndarray}"])
async def test_odd_mlflow_folders(registry: Registry, tmp_path: Path, said: bytes) -> None:
    made = await folder(tmp_path / "odd", MLmodel=said, **{"input_example.json": b"{"})
    doc = await registry.register(data=made, unpack=True)
    assert (doc["framework"], doc["signature"], doc["sample"]) == ("mlflow", None, None)


async def test_what_is_given_stands_beside_what_the_file_says(registry: Registry, files: dict[str, bytes]) -> None:
    given = {"inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}]}
    doc = await registry.register(data=files["onnx"], signature=given, sample={"data": [[1, 2, 3, 4]]})
    assert doc["signature"] == given and doc["file_signature"]["outputs"][0]["name"] == "label"
    again = await registry.ask("GET", "/v1/models/iris:1", status=200)
    assert again["sample"] == {"data": [[1, 2, 3, 4]]}
    await registry.ask("PATCH", "/v1/models/iris:1", status=200, json={"tags": {"a": "b"}})
    refused = await registry.ask("PATCH", "/v1/models/iris:1", status=422, json={"sample": {"data": [[0]]}})
    assert refused["code"] == "write-once"
    data = [e.data for e in await registry.events() if e.subject == "iris:1"]
    assert len(data) == 2 and not any("sample" in one for one in data), "a sample may be somebody's data"
    large = await registry.register(data=files["onnx"], sample={"data": [["x" * 70_000]]}, status=422)
    assert "sample" in json.dumps(large["errors"])
