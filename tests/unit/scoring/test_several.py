"""One image with a model of every flavour: a real replica, each under its own name, by gRPC and REST."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from modelyard.scoring.serve import CANNOT_START
from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.unit.scoring.roots import Replica, launch, make_root
from tests.unit.scoring.test_pyfunc import entry
from tests.unit.scoring.test_server import http

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]])
EXPECTED: dict[str, tuple[str, tuple[str, str, list[int]], list[tuple[str, str, list[int]]]]] = {
    "graph": ("onnx_onnxv1", ("X", "FP32", [-1, 4]), [("label", "INT64", [-1]), ("probabilities", "FP32", [-1, 3])]),
    "estimator": ("sklearn", ("input-0", "FP64", [-1, 4]),
                  [("predict", "INT64", [-1]), ("predict_proba", "FP64", [-1, 3])]),
    "light": ("lightgbm", ("input-0", "FP64", [-1, 4]), [("predict", "FP64", [-1, 3])]),
    "extreme": ("xgboost", ("input-0", "FP64", [-1, 4]), [("predict", "FP32", [-1, 3])]),
    "function": ("mlflow", ("input-0", "FP64", [-1, 4]), [("output-0", "FP64", [-1])]),
}
"""Name → platform, input, outputs, as metadata tells of them."""


@pytest.fixture(scope="module")
def models(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore")
    import lightgbm
    import mlflow.pyfunc
    import xgboost
    from mlflow.models import infer_signature
    from sklearn.datasets import load_iris

    class Longest(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input):  # type: ignore[no-untyped-def]
            return model_input.max(axis=1)

    folder = tmp_path_factory.mktemp("several")
    x, y = load_iris(return_X_y=True)
    lightgbm.LGBMClassifier(n_estimators=3, verbose=-1, n_jobs=1).fit(x, y).booster_.save_model(folder / "light.txt")
    xgboost.XGBClassifier(n_estimators=3, n_jobs=1).fit(x, y).save_model(folder / "extreme.ubj")
    mlflow.pyfunc.save_model(folder / "function", python_model=Longest(), pip_requirements=["mlflow"],
                             input_example=x[:2],
                             signature=infer_signature(x, x.max(axis=1)))
    row = {"inputs": [{"name": "input-0", "datatype": "FP64", "shape": [-1, 4]}], "outputs": []}
    return [
        {"name": "graph", "version": 1, "file": files["onnx"], "framework": "onnx"},
        {"name": "estimator", "version": 2, "file": files["skops"], "framework": "scikit-learn", "signature": row,
         "sample": {"data": ROWS.tolist()}},
        {"name": "light", "version": 3, "file": folder / "light.txt", "framework": "lightgbm"},
        {"name": "extreme", "version": 4, "file": folder / "extreme.ubj", "framework": "xgboost"},
        {**entry(folder / "function"), "version": 5}]


@pytest.fixture(scope="module")
def several(models: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with launch(make_root(tmp_path_factory.mktemp("root"), models=models)) as replica:
        yield replica


def test_each_tells_of_itself(several: Replica) -> None:
    with grpc.insecure_channel(several.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        for name, (platform, given, outputs) in EXPECTED.items():
            told = stub.ModelMetadata(pb.ModelMetadataRequest(name=name), timeout=20)
            said = [[(t.name, t.datatype, list(t.shape)) for t in side] for side in (told.inputs, told.outputs)]
            assert (told.platform, said) == (platform, [[given], outputs]), name
            rest = json.loads(http(several, f"/v2/models/{name}")[2])
            assert [(t["name"], t["datatype"], t["shape"]) for t in rest["inputs"]] == [given]
            assert rest["versions"] == list(told.versions)


def test_each_answers_under_its_name_on_both_protocols(several: Replica) -> None:
    data = {"name": "x", "datatype": "FP64", "shape": [2, 4], "data": ROWS.ravel().tolist()}
    with grpc.insecure_channel(several.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        for name, (_, (_, datatype, _), outputs) in EXPECTED.items():
            rows = ROWS.astype("f4" if datatype == "FP32" else "f8")
            tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=rows.shape)
            answer = stub.ModelInfer(pb.ModelInferRequest(model_name=name, inputs=[tensor],
                                                          raw_input_contents=[rows.tobytes()]), timeout=20)
            first = outputs[0]
            assert (answer.outputs[0].name, answer.outputs[0].datatype) == first[:2], name
            assert list(answer.outputs[0].shape) == [2, *first[2][1:]]
            body = {"inputs": [{**data, "datatype": datatype}]}
            status, _, raw = http(several, f"/v2/models/{name}/infer", body)
            assert status == 200, raw
            dtype = {"INT64": "i8", "FP64": "f8", "FP32": "f4"}[first[1]]
            np.testing.assert_allclose(json.loads(raw)["outputs"][0]["data"],
                                       np.frombuffer(answer.raw_output_contents[0], dtype), rtol=1e-6)
        assert stub.ModelInfer(pb.ModelInferRequest(
            model_name="function", inputs=[tensor], raw_input_contents=[ROWS.tobytes()]), timeout=20) \
            .raw_output_contents[0] == ROWS.max(axis=1).tobytes()


def test_a_model_that_cannot_load_is_named(models: list[dict[str, Any]], tmp_path: Path) -> None:
    import skops.io  # takes seconds, and every worker reads every file

    (tmp_path / "bad.skops").write_bytes(skops.io.dumps(object()))
    bad = {"name": "bad", "version": 7, "file": tmp_path / "bad.skops", "framework": "scikit-learn"}
    with launch(make_root(tmp_path / "root", models=[models[0], bad, models[2]]), wait=False) as replica:
        assert replica.process.wait(60) == CANNOT_START
        assert "cannot start: model bad:7" in replica.log.read_text()


def test_the_sample_is_swaggers_example_and_scored_before_the_server_is_ready(
        models: list[dict[str, Any]], tmp_path: Path) -> None:
    with launch(make_root(tmp_path / "one", models=[models[1]])) as replica:
        for version in (2, 3):
            operation = json.loads(http(replica, f"/swagger.json?version={version}")[2])["paths"]["/score"]["post"]
            schema = operation["parameters"][0]["schema"] if version == 2 else \
                operation["requestBody"]["content"]["application/json"]["schema"]
            assert schema["example"] == {"data": ROWS.tolist()}
            assert json.loads(http(replica, "/score", schema["example"])[2]) == [0, 2]
    with launch(make_root(tmp_path / "two", models=[{**models[1], "sample": {"data": [[1]]}}])) as replica:
        assert "the sample of model estimator:2 does not fit it" in replica.log.read_text()
