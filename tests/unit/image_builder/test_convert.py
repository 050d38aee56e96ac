"""Small scikit-learn models as ONNX: taken where they answer the same, and scikit-learn's own server where not."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from modelyard.image_builder import convert
from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.unit.scoring.roots import launch

from .conftest import Yard, check_bill, running
from .packages import sandboxed  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sandboxed")]
ROWS = [[5.1, 3.5, 1.4, 0.2], [6.0, 2.9, 4.5, 1.5], [6.9, 3.1, 5.1, 2.3]]
REPORT = {"outputs": {"predict": {"dtype": "<i8", "row": []}}, "precision": "float64", "columns": 4,
          "names": ["a"], "rows": 9, "classes": 3, "refusals": {}}


class Evil:
    """A pickle that leaves a mark wherever it is loaded."""

    def __init__(self, canary: str) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return exec, (f"open({self._canary!r}, 'w').close()",)


async def model(yard: Yard, data: bytes, file: str = "model.skops", **more: Any) -> str:
    import sklearn

    return await yard.register("iris", data, **{"framework": "scikit-learn", "framework_version": sklearn.__version__,
                                                "filename": file, **more})


def iris() -> bytes:
    import skops.io
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    x, y = load_iris(return_X_y=True)
    return skops.io.dumps(LogisticRegression(max_iter=500).fit(x, load_iris().target_names[y]))


async def built(yard: Yard, **spec: Any) -> tuple[dict[str, Any], str]:
    doc = await yard.over((await yard.post(**{"name": "scorer", "models": ["iris"], **spec}))["id"])
    log = (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()
    assert doc["phase"] == "ready", log
    return doc, log


async def unpacked(yard: Yard, id: str, into: Path) -> Path:
    raw = (await yard.call("GET", f"/v1/images/{id}/context")).raw
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        await asyncio.to_thread(archive.extractall, into, filter="data")
    return into / "opt" / "modelyard"


def request(rows: np.ndarray, datatype: str, *outputs: str) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=rows.shape)
    asked = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]
    return pb.ModelInferRequest(model_name="iris", inputs=[tensor], outputs=asked, raw_input_contents=[rows.tobytes()])


def answers(root: Path) -> list[Any]:
    """What a server of an image says to the same calls: names, datatypes, shapes and values, or why not."""
    rows, both = np.array(ROWS), ("predict", "predict_proba")
    bad = rows.copy()
    bad[0, 1] = np.nan
    asked = [request(rows, "FP64"), request(rows, "FP64", *both), request(rows.astype("<f4"), "FP32", *both),
             request(rows.astype("<i8"), "INT64", *both), request(bad, "FP64"), request(bad.astype("<f4"), "FP32"),
             request(rows * np.inf, "FP64"), request((rows * np.inf).astype("<f4"), "FP32"), request(rows[:0], "FP64"),
             request(rows[:, :3], "FP64"), request(rows, "FP64", "wrong")]
    out: list[Any] = []
    with launch(root) as replica, grpc.insecure_channel(replica.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        for one in asked:
            try:
                said = stub.ModelInfer(one, timeout=20)
                out.append([(o.name, o.datatype, tuple(o.shape)) for o in said.outputs])
                out.append(list(said.raw_output_contents))
            except grpc.RpcError as exc:
                out.append((exc.code(), exc.details()))
        about = stub.ModelMetadata(pb.ModelMetadataRequest(name="iris"), timeout=20)
        out.append((about.platform, [(o.name, o.datatype, tuple(o.shape)) for o in (*about.inputs, *about.outputs)]))
    return out


async def test_the_graph_answers_as_the_model_and_is_the_same_bytes(tmp_path: Path) -> None:
    data, sample = iris(), {"data": ROWS[:1]}
    async with running(tmp_path / "one") as yard:
        await model(yard, data, sample=sample)
        plain, log = await built(yard)
        assert "could be served as ONNX" in log and plain["served_as"] == {} and plain["onnx"] is False, log
        doc, log = await built(yard, onnx=True)
        assert doc["served_as"] == {"iris:1": "onnx"} and "is served as ONNX (float64, onnxruntime==" in log, log
        assert "is converted to ONNX and the two are compared, for 300 seconds at most" in log, log
        again, log = await built(yard, onnx=True)
        assert again["digest"] == doc["digest"] != plain["digest"] and "making the build" not in log
        lock = (await yard.call("GET", f"/v1/images/{doc['id']}/lock")).raw.decode()
        assert "onnxruntime==" in lock and "scikit-learn" not in lock and "skl2onnx" not in lock
        bill = json.loads((await yard.call("GET", f"/v1/images/{doc['id']}/sbom")).raw)
        (told,) = [c for c in bill["components"] if c["type"] == "machine-learning-model"]
        (origin,) = told["pedigree"]["ancestors"]
        assert check_bill(bill) is None
        roots = [await unpacked(yard, one["id"], tmp_path / one["tag"]) for one in (
            {**plain, "tag": "plain"}, {**doc, "tag": "onnx"})]
        artifact = (await yard.call("GET", "/v1/models/iris:1")).json["artifact"]
    async with running(tmp_path / "two") as yard:  # from the start, in another place
        await model(yard, data, sample=sample)
        assert (await built(yard, onnx=True))[0]["digest"] == doc["digest"]
    (entry,) = json.loads((roots[1] / "image.json").read_text())["models"]
    assert (entry["framework"], entry["path"]) == ("onnx", "models/iris/1/model.onnx")
    assert entry["converted_from"]["artifact"] == artifact == f"sha256:{origin['hashes'][0]['content']}"
    assert convert.parts.Graph((roots[1] / entry["path"]).read_bytes(), "", {}).digest.endswith(
        told["hashes"][0]["content"])
    same(*[await asyncio.to_thread(answers, root) for root in roots])


def same(one: list[Any], two: list[Any]) -> None:
    assert (one[-1][0], two[-1][0]) == ("sklearn", "onnx_onnxv1") and one[-1][1] == two[-1][1]
    assert len(one) == len(two) and sum(isinstance(said, tuple) for said in one) == 8, one
    for ours, theirs in zip(two[:-1], one[:-1], strict=True):
        if not isinstance(theirs, list) or not isinstance(theirs[0], bytes):
            assert ours == theirs
            continue
        assert ours[0] == theirs[0] and len(ours) == len(theirs)  # the labels
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            np.testing.assert_allclose(np.frombuffer(a), np.frombuffer(b), rtol=1e-6, atol=1e-9)


async def test_what_is_in_the_way_is_told_and_scikit_learn_serves(yard: Yard, tmp_path: Path) -> None:
    import joblib
    from sklearn.datasets import load_iris
    from sklearn.neighbors import NearestCentroid

    await model(yard, iris())
    doc, log = await built(yard, onnx=True)
    assert doc["served_as"] == {} and f"not as ONNX: {convert.SAMPLE}" in log, log
    canary = tmp_path / "canary"
    joblib.dump(Evil(str(canary)), tmp_path / "evil.joblib")
    evil = await model(yard, (tmp_path / "evil.joblib").read_bytes(), "model.joblib", trusted=True,
                       sample={"data": ROWS[:1]})
    doc, log = await built(yard, models=[evil], onnx=True)
    assert doc["served_as"] == {} and "is served by scikit-learn, not as ONNX: " in log, log
    assert "FileNotFoundError" in log and not canary.exists(), log  # it ran, where there is no such folder
    joblib.dump(NearestCentroid().fit(*load_iris(return_X_y=True)), tmp_path / "other.joblib")
    other = await model(yard, (tmp_path / "other.joblib").read_bytes(), "model.joblib", trusted=True,
                        sample={"data": ROWS[:1]})
    doc, log = await built(yard, models=[other], onnx=True)
    assert doc["served_as"] == {} and "it does not convert" in log, log
    doc, log = await built(yard, models=[other], onnx=True)
    assert "the same as of a build" in log and "  uv: " not in log, log  # remembered


@pytest.mark.parametrize("wrong", [
    {"outputs": {"run": {"dtype": "<i8", "row": []}}}, {"outputs": {"predict": {"dtype": "V8", "row": []}}},
    {"precision": "float16"}, {"outputs": {}}, {"columns": "many"}])
def test_a_report_that_a_model_wrote_is_not_taken_at_its_word(wrong: dict[str, Any]) -> None:
    assert convert.told(REPORT)["columns"] == 4
    with pytest.raises((KeyError, TypeError, ValueError)):
        convert.told({**REPORT, **wrong})
