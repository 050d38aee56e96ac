"""Runs LightGBM and XGBoost models: one input of any name, ``predict`` out, and ``predict_proba`` of a classifier that
was saved as a scikit-learn estimator. A native file (LightGBM's text; XGBoost's JSON or UBJSON) gives what the
library's own ``Booster.predict`` gives: probabilities, values or ranks, as its objective says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import Invalid
from .arguments import wrong_rows
from .calls import Asked, ScoringFailed
from .cores import cores
from .image import Model, Slot
from .results import Outputs
from .runner_sklearn import SklearnRunner, load_pickle
from .runners import CannotStart, RowRunner, Runner, the_input

PICKLES = (".joblib", ".pkl", ".pickle")
ESTIMATOR = re.compile(r"^\s+model_class:\s*xgboost\.sklearn\.(XGB\w+)\s*$", re.MULTILINE)
Predict = Callable[[np.ndarray], Any]


class BoosterRunner(RowRunner):
    """A native booster."""

    def __init__(self, platform: str, features: int, predict: Predict, width: int = 1,
                 columns: Sequence[str] | None = None) -> None:
        super().__init__()
        self.columns = tuple(columns or ())
        self.platform = platform
        self._features, self._predict = features, predict
        self.inputs = (Slot("input-0", "FP64", (-1, features or -1)),)
        self.outputs = (Slot("predict", "FP64" if platform == "lightgbm" else "FP32",
                             (-1, width) if width > 1 else (-1,)),)

    def arrays(self, asked: Asked) -> tuple[dict[str, Any], tuple[str, ...]]:
        unknown = [name for name in asked.outputs if name != "predict"]
        if unknown:
            raise Invalid(f"there is no output '{unknown[0]}'; there is: predict")
        name, rows = the_input(asked)
        if rows.ndim != 2 or (self._features and rows.shape[1] != self._features):
            raise wrong_rows(name, rows, self._features)
        if rows.dtype.kind not in "fiub":
            raise Invalid(f"tensor '{name}': the model takes numbers, not "
                          f"{'text' if rows.dtype.kind in 'OUS' else rows.dtype}")
        return {"input-0": rows if rows.dtype.kind == "f" and rows.dtype.itemsize > 2 else rows.astype("f8")}, \
            ("predict",)

    def predict(self, arrays: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        try:
            return Outputs(predict=np.asarray(self._predict(arrays["input-0"])))
        except (ValueError, TypeError) as exc:
            raise Invalid(f"the model refuses the input: {_first_line(exc)}") from exc
        except Exception as exc:
            raise ScoringFailed(f"the model failed: {_first_line(exc)}") from exc


def lightgbm_runner(model: Model) -> Runner:
    """Raises CannotStart."""
    try:
        import lightgbm
    except ImportError as exc:
        raise CannotStart(f"model {model.id} needs the package lightgbm: add it to the requirements") from exc
    except OSError as exc:  # it brings no copy of the OpenMP library, and slim bases have none
        raise CannotStart(f"model {model.id}: LightGBM cannot be loaded: {exc}; use a base image that has libgomp") \
            from exc
    loaded = _loaded(model, lambda path: lightgbm.Booster(model_file=path))
    if not isinstance(loaded, lightgbm.Booster):
        return _estimator(model, loaded, "lightgbm")
    threads = cores()
    return BoosterRunner("lightgbm", loaded.num_feature(), lambda rows: loaded.predict(rows, num_threads=threads),
                         loaded.num_model_per_iteration(), loaded.feature_name())


def xgboost_runner(model: Model) -> Runner:
    """Raises CannotStart."""
    try:
        import xgboost
    except ImportError as exc:
        raise CannotStart(f"model {model.id} needs the package xgboost-cpu (or xgboost): add it to the "
                          "requirements") from exc
    name = _mlflow_class(model.path.parent)
    loaded = _loaded(model, lambda path: _booster(xgboost, path) if not name else _wrapped(xgboost, name, path))
    if not isinstance(loaded, xgboost.Booster):
        return _estimator(model, loaded, "xgboost")
    loaded.set_param({"nthread": cores()})
    return BoosterRunner("xgboost", loaded.num_features(), loaded.inplace_predict, _width(loaded),
                         loaded.feature_names)


def _width(booster: Any) -> int:
    """How many numbers it gives for a row."""
    learner = json.loads(booster.save_config())["learner"]
    said = learner["learner_model_param"]
    by_class = learner["objective"]["name"] == "multi:softprob"
    return int(said.get("num_class" if by_class else "num_target", 1))


def _booster(xgboost: Any, path: str) -> Any:
    """By the file's content: told only the name, XGBoost goes by its ending."""
    booster = xgboost.Booster()
    booster.load_model(bytearray(Path(path).read_bytes()))
    return booster


def _mlflow_class(folder: Path) -> str:
    """Which of XGBoost's scikit-learn estimators an MLflow folder says it holds; "" for a booster, and elsewhere. The
    file of both is the same, and what they answer is not."""
    said = folder / "MLmodel"
    found = ESTIMATOR.search(said.read_text(errors="replace")) if said.is_file() else None
    return found[1] if found else ""


def _wrapped(xgboost: Any, name: str, path: str) -> Any:
    estimator = getattr(xgboost, name)(n_jobs=cores())
    estimator.load_model(bytearray(Path(path).read_bytes()))
    return estimator


def _loaded(model: Model, native: Callable[[str], Any]) -> Any:
    if model.path.suffix.lower() in PICKLES:
        return load_pickle(model)
    try:
        return native(str(model.path))
    except Exception as exc:
        raise CannotStart(f"model {model.id} cannot be loaded: {_first_line(exc)}") from exc


def _first_line(exc: Exception) -> str:
    """Both libraries append stack traces of their own to what they say."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]


def _estimator(model: Model, loaded: Any, platform: str) -> Runner:
    runner = SklearnRunner(model, loaded)
    runner.platform = platform
    return runner
