"""The models that every server gets, as the same files, and what is asked of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from tests.benchmarks.peers.peer import load

LAYERS = (784, 1024, 256, 10)
SIZES = {"83 B": 4, "3 KB": 784, "64 KiB": 16_384}
"""Requests of the model that gives back what it gets: floats in a row."""


@dataclass(frozen=True)
class Model:
    """``rows`` is a call's input, ``answer`` what a right server says to it."""

    name: str
    file: Path
    framework: str
    rows: np.ndarray
    answer: np.ndarray


def make(folder: Path) -> dict[str, Model]:
    """``lr`` and ``rf`` (scikit-learn, on iris), ``mlp`` (ONNX, a million parameters), ``same`` (ONNX: its input)."""
    x, y = load_iris(return_X_y=True)
    joblib.dump(LogisticRegression(max_iter=200).fit(x, y), folder / "lr.joblib")
    joblib.dump(RandomForestClassifier(100, random_state=0, n_jobs=1).fit(x, y), folder / "rf.joblib")
    onnx.save(_mlp(), folder / "mlp.onnx")
    onnx.save(_same(), folder / "same.onnx")
    row = np.random.default_rng(0).random((1, LAYERS[0]), np.float32)
    given = {"lr": x[:1], "rf": x[:1], "mlp": row, "same": row}
    return {name: _model(folder / (f"{name}.joblib" if name in ("lr", "rf") else f"{name}.onnx"), rows)
            for name, rows in given.items()}


def of_size(same: Model, size: str) -> Model:
    """The model that gives back what it gets, asked with a request of this size."""
    rows = np.random.default_rng(1).random((1, SIZES[size]), np.float32)
    return Model(same.name, same.file, same.framework, rows, rows)


def _model(file: Path, rows: np.ndarray) -> Model:
    framework = "onnx" if file.suffix == ".onnx" else "scikit-learn"
    return Model(file.stem, file, framework, rows, np.asarray(load(file)(rows)))


def _mlp() -> onnx.ModelProto:
    random, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    for n, (wide, narrow) in enumerate(itertools.pairwise(LAYERS)):
        weights += [numpy_helper.from_array(random.normal(0, wide ** -0.5, (wide, narrow)).astype(np.float32), f"w{n}"),
                    numpy_helper.from_array(np.zeros(narrow, np.float32), f"b{n}")]
        end = "y" if n == len(LAYERS) - 2 else f"h{n}"
        nodes.append(helper.make_node("Gemm", [last, f"w{n}", f"b{n}"], [f"g{n}" if end != "y" else end]))
        if end != "y":
            nodes.append(helper.make_node("Relu", [f"g{n}"], [end]))
        last = end
    return _graph(nodes, LAYERS[0], LAYERS[-1], weights)


def _same() -> onnx.ModelProto:
    return _graph([helper.make_node("Identity", ["x"], ["y"])], "m", "m")


def _graph(nodes: list[onnx.NodeProto], wide: int | str, narrow: int | str,
           weights: list[onnx.TensorProto] | None = None) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
            for name, size in (("x", wide), ("y", narrow))]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], weights or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
