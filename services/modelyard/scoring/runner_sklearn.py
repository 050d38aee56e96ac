"""Runs a scikit-learn estimator: one input of any name, ``predict`` out, ``predict_proba`` where it is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.errors import Invalid
from ..core.tensors import to_wire
from .arguments import text_of, wrong_rows
from .calls import Asked, ScoringFailed
from .image import Model, Slot
from .results import Outputs
from .runners import CannotStart, RowRunner, the_input

METHODS = ("predict", "predict_proba")


class SklearnRunner(RowRunner):
    """``.skops`` with types that skops trusts; joblib and pickle only when the model says ``trusted``."""

    platform = "sklearn"
    alone = "predict"

    def __init__(self, model: Model, loaded: Any = None) -> None:
        super().__init__()
        # Tensors have one name and columns none: said by scikit-learn at every call otherwise.
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        self._model = _load(model) if loaded is None else loaded
        if not hasattr(self._model, "predict"):
            raise CannotStart(f"model {model.id} is a {type(self._model).__name__}, which has no predict")
        self._features: int | None = getattr(self._model, "n_features_in_", None)
        self._methods = tuple(name for name in METHODS if hasattr(self._model, name))
        self.columns = tuple(map(str, getattr(self._model, "feature_names_in_", ())))
        self.inputs = (Slot("input-0", "FP64", (-1, self._features or -1)),)
        self.outputs = tuple(self._slot(name) for name in self._methods)

    def _slot(self, name: str) -> Slot:
        classes = getattr(self._model, "classes_", None)
        if name == "predict_proba":
            return Slot(name, "FP64", (-1, len(classes) if isinstance(classes, np.ndarray) else -1))
        return Slot(name, to_wire(name, classes)[1] if isinstance(classes, np.ndarray) else "FP64", (-1,))

    def arrays(self, asked: Asked) -> tuple[dict[str, Any], tuple[str, ...]]:
        names = tuple(asked.outputs) or ("predict",)
        for name in names:
            if name not in self._methods:
                raise Invalid(f"there is no output '{name}'; there is: {', '.join(self._methods)}")
        return {"input-0": self._fit(*the_input(asked))}, names

    def predict(self, arrays: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        rows = arrays["input-0"]
        try:
            return Outputs({name: np.asarray(getattr(self._model, name)(rows)) for name in names})
        except (ValueError, TypeError) as exc:
            raise Invalid(f"the model refuses the input: {exc}") from exc
        except Exception as exc:
            raise ScoringFailed(f"the model failed: {type(exc).__name__}: {exc}") from exc

    def _fit(self, name: str, rows: np.ndarray) -> np.ndarray:
        if rows.dtype.kind == "O":
            rows = text_of(name, rows)
        if self._features is not None and (rows.ndim != 2 or rows.shape[1] != self._features):
            raise wrong_rows(name, rows, self._features)
        return rows


def _load(model: Model) -> Any:
    return _load_skops(model) if model.path.suffix == ".skops" else load_pickle(model)


def load_pickle(model: Model) -> Any:
    """What a joblib or pickle file holds. Raises CannotStart, also when the model is not ``trusted``."""
    if not model.trusted:
        raise CannotStart(f"model {model.id}: {model.path.name} is a pickle, and loading one runs code it may hold; "
                          "register it with trusted: true if it is yours, or save it with skops")
    try:
        import joblib

        return joblib.load(model.path)
    except BaseException as exc:
        raise CannotStart(f"model {model.id} cannot be loaded: {type(exc).__name__}: {exc}") from exc


def _load_skops(model: Model) -> Any:
    try:
        import skops.io
    except ImportError as exc:
        raise CannotStart(f"model {model.id} needs the package skops: add it to the requirements") from exc
    try:
        untrusted = skops.io.get_untrusted_types(file=model.path)
        if untrusted and not model.trusted:
            raise CannotStart(f"model {model.id} holds types that are not trusted: {', '.join(untrusted)}; register it "
                              "with trusted: true if it is yours")
        return skops.io.load(model.path, trusted=untrusted)
    except CannotStart:
        raise
    except Exception as exc:
        raise CannotStart(f"model {model.id} cannot be loaded: {type(exc).__name__}: {exc}") from exc
