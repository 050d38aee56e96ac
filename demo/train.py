"""Two real models: iris flowers with scikit-learn (a hasty one and a better one), digits as ONNX."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skops.io
from skl2onnx import to_onnx
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split


@dataclass(frozen=True)
class Trained:
    """A model's file, how often it is right on data it has not seen, and rows to try it with."""

    path: Path
    accuracy: float
    rows: np.ndarray


def iris(path: Path, iterations: int) -> Trained:
    """Few ``iterations`` make a hasty model."""
    x, y = load_iris(return_X_y=True)
    seen, unseen, wanted, truth = train_test_split(x, y, test_size=0.4, random_state=7, stratify=y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # being hasty is the point
        model = LogisticRegression(max_iter=iterations).fit(seen, wanted)
    skops.io.dump(model, path)
    return Trained(path, float(model.score(unseen, truth)), unseen)


def digits(path: Path) -> Trained:
    """8x8 pixels to a digit; input ``X`` of shape [n, 64], 32-bit floats from 0 to 1."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype(np.float32)
    seen, unseen, wanted, truth = train_test_split(x, y, test_size=0.2, random_state=7)
    model = LogisticRegression(max_iter=200).fit(seen, wanted)
    graph = to_onnx(model, seen[:1], options={"zipmap": False})
    path.write_bytes(graph.SerializeToString())
    return Trained(path, float(model.score(unseen, truth)), unseen)
