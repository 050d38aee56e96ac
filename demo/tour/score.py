"""A scoring file: init() runs once per replica, run() once per call."""

import json
from pathlib import Path

import numpy as np

weights: np.ndarray


def init() -> None:
    global weights
    weights = np.array(json.loads(Path(__file__).with_name("weights.json").read_text()))


def run(data: np.ndarray) -> list[float]:
    return (data @ weights).tolist()
