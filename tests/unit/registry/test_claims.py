"""Files are what they claim, told without loading them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import pickle
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from modelyard.core.archives import pack
from tests.unit.registry.conftest import Registry


def zipped(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    return out.getvalue()


@pytest.mark.parametrize(("kind", "filename", "framework"), [
    ("onnx", "model.onnx", "onnx"), ("onnx", None, "onnx"), ("skops", "model.skops", "scikit-learn"),
    ("skops", None, "scikit-learn"), ("joblib", "model.joblib", "scikit-learn"), ("joblib", None, "custom"),
    ("joblib.gz", "model.joblib", "scikit-learn"), ("joblib", "model.pkl", "custom"),
])
async def test_the_framework_is_seen(registry: Registry, files: dict[str, bytes], kind: str, filename: str | None,
                                     framework: str) -> None:
    named = {"filename": filename} if filename else {}
    assert (await registry.register(data=files[kind], **named))["framework"] == framework


async def test_an_onnx_model_brings_its_signature(registry: Registry, files: dict[str, bytes]) -> None:
    doc = await registry.register(data=files["onnx"], filename="model.onnx")
    assert doc["signature"] == {
        "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "label", "datatype": "INT64", "shape": [-1]},
                    {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}]}
    given = {"inputs": [{"name": "mine"}]}
    assert (await registry.register(data=files["onnx"], signature=given))["signature"] == given


@pytest.mark.parametrize(("data", "spec", "told"), [
    (b"", {}, "empty"),
    (b"not a model", {"framework": "onnx"}, "not an ONNX model"),
    (b"not a model", {"filename": "model.onnx"}, "not an ONNX model"),
    (b"\x08\x08", {"framework": "onnx"}, "no graph"),
    (b"\x08\x08:\x05\xff\xff", {"framework": "onnx"}, "cut off"),
    (b"not a model", {"framework": "scikit-learn"}, "neither skops, nor joblib"),
    (b"not a model", {"filename": "model.joblib"}, "neither skops, nor joblib"),
    (b"not a model", {"filename": "model.skops"}, "no zip"),
    (zipped("other.json"), {"filename": "model.skops"}, "no schema.json"),
    (b"PK\x03\x04 and nothing else", {"filename": "model.skops"}, "directory is missing"),
    (zipped("schema.json")[:-8], {"filename": "model.skops"}, "zip"),
    (pickle.dumps([1, 2, 3])[:-1], {"filename": "model.joblib"}, "cut off"),
    (pickle.dumps([1]), {"framework": "mlflow"}, "folder with an MLmodel"),
    (b"no tar", {"unpack": True}, "not a tar"),
    (bytes(1024), {"unpack": True}, "no file"),
])
async def test_what_is_not_what_it_claims_is_refused(registry: Registry, data: bytes, spec: dict[str, Any],
                                                     told: str) -> None:
    problem = await registry.register(data=data, status=422, **spec)
    assert told in problem["detail"] and problem["errors"][0]["field"] == "artifact"
    assert (await registry.ask("GET", "/v1/models"))["items"] == []


async def test_a_truncated_onnx_model_is_refused_wherever_it_is_cut(registry: Registry,
                                                                    files: dict[str, bytes]) -> None:
    whole = files["onnx"]
    for cut in range(1, len(whole), max(1, len(whole) // 40)):
        await registry.register(data=whole[:cut], framework="onnx", status=422)


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


async def test_nothing_is_unpickled(registry: Registry, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    await registry.register(data=pickle.dumps(Trap(trap)), filename="model.joblib", framework="scikit-learn")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists(), "the trap itself works"


async def folder(root: Path, **files: bytes) -> bytes:
    return await asyncio.to_thread(_folder, root, files)


def _folder(root: Path, files: dict[str, bytes]) -> bytes:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return b"".join(pack(root))


async def test_folders(registry: Registry, tmp_path: Path, files: dict[str, bytes]) -> None:
    mlflow = await folder(tmp_path / "mlflow", MLmodel=b"flavors: {}", **{"data/model.pkl": b"x"})
    assert (await registry.register(data=mlflow, unpack=True))["framework"] == "mlflow"
    plain = await folder(tmp_path / "plain", **{"a.txt": b"x"})
    assert (await registry.register(data=plain, unpack=True))["framework"] == "custom"
    assert "MLmodel" in (await registry.register(data=plain, unpack=True, framework="mlflow", status=422))["detail"]
    assert ".onnx" in (await registry.register(data=plain, unpack=True, framework="onnx", status=422))["detail"]
    split = await folder(tmp_path / "split", **{"m/model.onnx": files["onnx"], "m/weights.bin": b"w" * 3_000_000})
    doc = await registry.register(data=split, unpack=True, framework="onnx")
    assert doc["signature"]["inputs"][0]["name"] == "X"
    junk = await folder(tmp_path / "junk", **{"model.onnx": b"junk"})
    await registry.register(data=junk, unpack=True, framework="onnx", status=422)


async def test_a_hostile_archive_is_refused_in_one_answer(registry: Registry) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("../outside")
        tar.addfile(info, io.BytesIO())
    problem = await registry.register(data=out.getvalue(), unpack=True, status=422)
    assert problem["code"] == "bad-archive" and "leads out" in problem["detail"]


@pytest.mark.slow
async def test_looking_into_files_leaves_the_service_responsive(registry: Registry) -> None:
    """A file made to be slow to scan is looked at in a thread of its own, and not for ever."""
    await registry.upload(slow := b"\x10\x01" * 6_000_000)
    slow_one = asyncio.create_task(registry.register(data=slow, framework="onnx", status=422))
    waits = []
    while not slow_one.done():
        asked = time.monotonic()
        await registry.ask("GET", "/v1/models", status=200)
        waits.append(time.monotonic() - asked)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(slow_one), 0.05)
    assert "too many fields" in slow_one.result()["detail"]
    assert sorted(waits)[len(waits) // 2] < 0.5, waits
