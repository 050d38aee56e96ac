"""Small real models, trained once, and one replica that serves several of them."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before anything imports onnxruntime

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.scoring.roots import Replica, launch, make_root


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A logistic regression on iris as skops, joblib and ONNX."""
    import joblib
    import skops.io
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    folder = tmp_path_factory.mktemp("models")
    x, y = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=200).fit(x, y)
    found = {name: folder / f"model.{name}" for name in ("skops", "joblib", "onnx")}
    skops.io.dump(model, found["skops"])
    joblib.dump(model, found["joblib"])
    graph = to_onnx(model, x[:1].astype(np.float32), options={"zipmap": False})
    found["onnx"].write_bytes(graph.SerializeToString())
    return found


@pytest.fixture(scope="session")
def two_models(files: dict[str, Path]) -> list[dict[str, Any]]:
    return [
        {"name": "iris", "version": 4, "file": files["skops"], "framework": "scikit-learn"},
        {"name": "iris-onnx", "version": 2, "file": files["onnx"], "framework": "onnx"},
    ]


@pytest.fixture(scope="module")
def replica(two_models: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """iris:4 (scikit-learn) and iris-onnx:2, capture on, messages up to 64 KiB."""
    folder = tmp_path_factory.mktemp("two")
    root = make_root(folder, models=two_models)
    with launch(root, spool=folder / "spool", capture={"enabled": True}, limits={"max_message_bytes": 65_536}) as it:
        yield it
