"""An ONNX graph that was made of a scikit-learn model, in that model's place: it takes, gives and refuses what the
model does. What that is was asked of the model when the image was built (``image_builder/onnx_hook.py``)."""

from __future__ import annotations

from functools import partial

import numpy as np

from .image import Model
from .runner_onnx import session


class GraphEstimator:
    """What ``SklearnRunner`` asks of an estimator. Refuses with ValueError, in the model's own words."""

    def __init__(self, model: Model) -> None:
        said = model.answers
        self._session = session(model)
        self._precision = np.dtype(said["precision"])
        self._refusals: dict[str, str] = said["refusals"]
        self._graph_outputs = [one.name for one in self._session.get_outputs()]
        self._outputs = {name: (at, np.dtype(one["dtype"]), tuple(one["row"]))
                         for at, (name, one) in enumerate(said["outputs"].items())}
        self.n_features_in_: int = said["columns"]
        self.feature_names_in_: list[str] = said.get("names", [])
        if said["classes"] is not None:
            self.classes_ = np.empty(said["classes"], self._outputs["predict"][1])
        for name in self._outputs:
            setattr(self, name, partial(self._answer, name))

    def _answer(self, name: str, rows: np.ndarray) -> np.ndarray:
        at, dtype, row = self._outputs[name]
        (value,) = self._session.run([self._graph_outputs[at]], {"input_0": self._taken(rows)})
        return np.asarray(value).astype(dtype, copy=False).reshape((len(rows), *row))

    def _taken(self, rows: np.ndarray) -> np.ndarray:
        if rows.dtype.kind in "US":
            self._refuse("text")
        if rows.dtype.kind not in "biuf":
            rows = rows.astype(np.float64)
        if not len(rows):
            self._refuse("none")
        if rows.dtype.kind == "f" and not np.isfinite(rows).all():
            if np.isnan(rows).any():
                self._refuse("nan")
            if np.isinf(rows).any():
                self._refuse("inf of float32" if rows.dtype == np.float32 else "inf")
        if "large" in self._refusals:
            with np.errstate(over="ignore"):
                narrow = rows.astype(np.float32)
            if np.isinf(narrow).any():
                self._refuse("large")
        return rows.astype(self._precision, copy=False)

    def _refuse(self, what: str) -> None:
        if what in self._refusals:
            raise ValueError(self._refusals[what])
