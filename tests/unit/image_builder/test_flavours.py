"""What serves a model where no scoring file does, what that needs, and what the image says of it."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from modelyard.core.archives import pack
from modelyard.image_builder import parts, serving
from modelyard.image_builder.model import ModelInput

from .conftest import Yard

TORCH = Path(__file__).parents[1] / "golden" / "torch"
PYFUNC = b"flavors: {python_function: {loader_module: mlflow.pyfunc.model}}\nmlflow_version: 3.1.4\n"
SIGNED = PYFUNC + b"""signature:
  inputs: '[{"type": "double", "name": "a", "required": true}, {"type": "long", "name": "b", "required": true}]'
  outputs: null
"""


def packed(folder: Path, files: dict[str, bytes]) -> bytes:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return b"".join(pack(folder))


async def flavoured(yard: Yard, *models: str) -> dict[str, Any]:
    """An image of the models' own flavours; without wheels, so it is never run."""
    doc = await yard.post(name="plain", models=list(models), lock=await yard.upload(b""))
    return await yard.over(doc["id"])


async def image_json(yard: Yard, id: str) -> dict[str, Any]:
    raw = (await yard.call("GET", f"/v1/images/{id}/context")).raw
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        found = archive.extractfile("opt/modelyard/image.json")
        assert found is not None
        return dict(json.load(found))


async def test_signatures_and_samples_are_in_the_document_and_in_the_image(yard: Yard, onnx: bytes) -> None:
    twice = await yard.register("twice", onnx, framework="onnx", filename="model.onnx", sample={"data": [[1, 2]]})
    script = await yard.register("script", (TORCH / "script.pt").read_bytes(), framework="pytorch", signature={
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]},
                   {"name": "bias", "datatype": "FP32", "shape": [-1, 1]}]})
    doc = await flavoured(yard, twice, script)
    assert doc["phase"] == "ready", doc["reason"]
    assert doc["signatures"] == {
        twice: {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}]},
        script: {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]},
                            {"name": "bias", "datatype": "FP32", "shape": [-1, 1]}],
                 "outputs": [{"name": "output-0"}, {"name": "output-1"}]}}
    assert doc["samples"] == {twice: {"data": [[1, 2]]}}
    inside = {f"{m['name']}:{m['version']}": m for m in (await image_json(yard, doc["id"]))["models"]}
    assert {id: m["signature"] for id, m in inside.items()} == doc["signatures"]
    assert inside[twice]["sample"] == {"data": [[1, 2]]} and "sample" not in inside[script]
    built = [e.data for e in await yard.events() if e.topic == "image.built"]
    assert "samples" not in built[0] and built[0]["signatures"] == doc["signatures"]


async def test_a_signature_that_is_not_the_files_fails_the_build(yard: Yard, onnx: bytes) -> None:
    wrong = {"inputs": [{"name": "x", "datatype": "FP64", "shape": [-1, 3]}], "outputs": [{"name": "q"}, {"name": "y"}]}
    model = await yard.register("twice", onnx, framework="onnx", filename="model.onnx", signature=wrong)
    doc = await flavoured(yard, model)
    assert doc["phase"] == "failed"
    for part in ("model 'twice:1'", "datatype FP64; the file says FP32", "shape [-1, 3]; the file says [-1, 2]",
                 "registered as q, y; the file has y"):
        assert part in doc["reason"]
    served = await yard.small("scored", models=[model])  # its scoring file decides what it takes
    assert served["phase"] == "ready" and served["signatures"] == {} == served["samples"]
    odd = await yard.register("odd", b"\x80\x04N.", framework="scikit-learn", filename="m.pkl", trusted=True,
                              signature={"mine": 1})
    assert (await flavoured(yard, odd))["signatures"] == {}


async def test_what_pytorch_files_are_is_seen_by_the_build(yard: Yard) -> None:
    script, program, weights = ((TORCH / name).read_bytes() for name in ("script.pt", "program.pt2", "weights.pt"))
    for name, data, trusted, told in (
            ("script", script, False, ""), ("program", program, True, ""), ("wild", program, False, "trusted: true"),
            ("weights", weights, True, "neither TorchScript"), ("junk", b"junk", True, "neither TorchScript")):
        model = await yard.register(name, data, framework="pytorch", filename="model.pt", trusted=trusted)
        doc = await flavoured(yard, model)
        assert doc["phase"] == ("failed" if told else "ready") and told in (doc["reason"] or "")
        assert not told or f"model '{name}:1'" in doc["reason"]
    assert (await flavoured(yard, "program"))["signatures"]["program:1"]["outputs"][1] == {
        "name": "best", "datatype": "INT64", "shape": [-1]}


async def test_pytorch_with_cuda_is_told(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    server = (Path(parts.__file__).parents[1] / "scoring" / "requirements.txt").read_text().splitlines()
    names = [line.partition(">")[0].partition("=")[0] for line in server if line]
    lock = "".join(f"{name}==1.0 --hash=sha256:{'0' * 64}\n" for name in (*names, "torch", "nvidia-cublas"))
    model = await yard.register("net", (TORCH / "script.pt").read_bytes(), framework="pytorch", filename="model.pt")
    doc = await yard.over((await yard.post(name="cuda", models=[model], lock=await yard.upload(lock.encode())))["id"])
    assert doc["phase"] == "failed"
    assert "UV_FIND_LINKS" in (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()


async def test_mlflow_folders(yard: Yard, tmp_path: Path) -> None:
    function, native, neither = [await asyncio.to_thread(packed, tmp_path / name, files) for name, files in (
        ("function", {"MLmodel": SIGNED, "python_model.pkl": b"x"}), ("native", {"MLmodel": SIGNED, "model.pkl": b"x"}),
        ("neither", {"MLmodel": b"flavors: {}", "model.h5": b"x"}))]
    for name, data, trusted, told in (
            ("function", function, True, ""), ("native", native, True, ""),
            ("wild", function, False, "python_function"),
            ("pickle", native, False, "a pickle"), ("neither", neither, True, "no python_function")):
        model = await yard.register(name, data, framework="mlflow", unpack=True, trusted=trusted)
        doc = await flavoured(yard, model)
        assert doc["phase"] == ("failed" if told else "ready") and told in (doc["reason"] or ""), (name, doc["reason"])
    assert [s["name"] for s in (await flavoured(yard, "function"))["signatures"]["function:1"]["inputs"]] == ["a", "b"]
    assert (await flavoured(yard, "native"))["signatures"]["native:1"]["inputs"] == [
        {"name": "input-0", "datatype": "FP64", "shape": [-1, 2], "columns": ["a", "b"]}]


def given(**fields: Any) -> ModelInput:
    return ModelInput(**{"name": "m", "version": 1, "artifact": "sha256:0", "trusted": True, **fields})


@pytest.mark.parametrize(("listed", "needs"), [
    (b"mlflow==3.17.2\ncloudpickle==3.1.2\npandas==2.3.0  # ours\n",
     {"mlflow-skinny==3.17.2", "mlflow-skinny", "numpy", "pandas", "cloudpickle==3.1.2", "pandas==2.3.0"}),
    (b"mlflow<4,>=3\n-r other.txt\n", {"mlflow-skinny<4,>=3", "mlflow-skinny", "numpy", "pandas"}),
    (b"", {"mlflow-skinny==3.1.4", "mlflow-skinny", "numpy", "pandas"}),
])
def test_what_python_functions_need(tmp_path: Path, listed: bytes, needs: set[str]) -> None:
    files = {"MLmodel": PYFUNC, "python_model.pkl": b"x", **({"requirements.txt": listed} if listed else {})}
    found = serving.look("mlflow", given(framework="mlflow", unpack=True), packed(tmp_path / "m", files))
    assert (found.kind, found.needs, found.problems) == ("pyfunc", needs, [])


def test_what_pytorch_needs() -> None:
    place = parts.Place.of(given(framework="pytorch", filename="net.pt"), False)
    assert (place.kind, parts.NEEDS[place.kind], place.path) == ("pytorch", {"torch"}, "models/m/1/net.pt")
    assert parts.Place.of(given(framework="pytorch"), False).path == "models/m/1/model.pt"
