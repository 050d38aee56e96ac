"""How the iris model answers: init() runs once per replica, run() once per call."""

import numpy as np
import skops.io

import modelyard

NAMES = ("setosa", "versicolor", "virginica")


def init() -> None:
    global model
    model = skops.io.load(modelyard.model_path("iris"))


def run(data: np.ndarray) -> dict[str, np.ndarray]:
    chances = model.predict_proba(data)
    return {
        "species": np.array([NAMES[i] for i in chances.argmax(axis=1)], dtype=object),
        "probability": chances.max(axis=1),
    }
