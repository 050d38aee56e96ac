"""Small real models for the journeys, trained once per run: iris (two qualities) and the digits as ONNX."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # every worker of every lane reads this file, few train a model
    from sklearn.linear_model import LogisticRegression

SCORE = '''\
import json
import modelyard
import skops.io

def init():
    global model
    model = skops.io.load(modelyard.model_path("iris"))

def run(data):
    return [int(c) for c in model.predict(data["data"])]
'''


@functools.cache
def iris(max_iter: int) -> LogisticRegression:
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    x, y = load_iris(return_X_y=True)
    return LogisticRegression(max_iter=max_iter).fit(x, y)


def save_iris(path: Path, max_iter: int = 200) -> Path:
    """A skops file; a small ``max_iter`` gives another (worse) model."""
    import skops.io

    skops.io.dump(iris(max_iter), path)
    return path


def save_digits(path: Path) -> Path:
    """LogisticRegression on the 8x8 digits as ONNX: input ``X`` [n, 64] float32."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    x, y = load_digits(return_X_y=True)
    model = LogisticRegression(max_iter=300).fit(x / 16.0, y)
    graph = to_onnx(model, (x[:1] / 16.0).astype(np.float32), options={"zipmap": False})
    path.write_bytes(graph.SerializeToString())
    return path
