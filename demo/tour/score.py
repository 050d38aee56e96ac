"""A scoring file: init() runs once per replica, run() once per call."""

import json
import os
from pathlib import Path

import numpy as np

weights: np.ndarray


def init() -> None:
    global weights
    folder = Path(os.environ["AZUREML_MODEL_DIR"])  # the folder of the image's only model
    weights = np.array(json.loads((folder / "weights.json").read_text()))


def run(data: np.ndarray) -> list[float]:
    return (data @ weights).tolist()
