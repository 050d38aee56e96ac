"""Runners: the thing that turns tensors into a result. One instance for each model, opened in its own thread."""

from __future__ import annotations

import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from ..core.errors import Invalid
from .arguments import as_array, body_of, columns_of, data_of, only, parse
from .calls import Asked, ScoringFailed
from .context import CURRENT
from .image import Image, Model


class Slot(NamedTuple):
    """An input or an output as metadata tells of it. -1 in ``shape``: any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Runner(ABC):
    """Opened once, then asked. ``run`` is called by one thread at a time, unless ``inline`` allows the event loop."""

    platform = "python"
    inline = False
    """The runner is ours and safe from two threads: short predictions may run on the event loop."""
    asynchronous = False
    """``run`` returns an awaitable."""
    inputs: tuple[Slot, ...] = ()
    outputs: tuple[Slot, ...] = ()

    @abstractmethod
    def run(self, asked: Asked) -> Any:
        """The result (see ``results``). Raises Invalid for bad input, ScoringFailed when scoring code raised."""


class CannotStart(Exception):
    """A model that cannot be loaded or an ``init`` that raised: the process ends with the message."""


def openers(image: Image) -> list[tuple[tuple[Model, ...], Callable[[], Runner]]]:
    """Which runners an image needs: models → the function that opens their runner in the thread it will live in."""
    score = image.score
    if score is not None:
        from .runner_score import ScoreRunner

        return [(image.models, lambda: ScoreRunner(score))]
    if not image.models:
        raise CannotStart("the image has neither a scoring file nor a model")
    return [((model,), partial(_flavour, model)) for model in image.models]


def _flavour(model: Model) -> Runner:
    framework, suffix = model.framework, model.path.suffix
    if framework == "mlflow" or (model.path.is_dir() and (model.path / "MLmodel").is_file()):
        return _mlflow(model)
    if framework == "onnx" or (not framework and suffix == ".onnx"):
        return _onnx(model)
    if framework == "scikit-learn" or (not framework and suffix in (".skops", ".joblib", ".pkl")):
        return _sklearn(model)
    raise CannotStart(f"model {model.id} of framework '{framework or 'none'}' needs a scoring file: only onnx and "
                      "scikit-learn models answer without one")


def _onnx(model: Model) -> Runner:
    from .runner_onnx import OnnxRunner

    return OnnxRunner(model)


def _sklearn(model: Model) -> Runner:
    from .runner_sklearn import SklearnRunner

    return SklearnRunner(model)


def _mlflow(model: Model) -> Runner:
    """An MLflow folder by the file that its flavour leaves in it."""
    for name, make in (("model.onnx", _onnx), ("model.skops", _sklearn), ("model.pkl", _sklearn)):
        if (model.path / name).is_file():
            return make(replace(model, path=model.path / name))
    raise CannotStart(f"model {model.id}: the MLflow folder holds none of model.onnx, model.skops, model.pkl; give the "
                      "image a scoring file")


def the_input(asked: Asked) -> Any:
    """The one array of a call, whatever it came as. Raises Invalid."""
    body = body_of(asked)
    return as_array(data_of(parse(body))) if body is not None else only(asked.tensors or []).array


def named_inputs(asked: Asked, names: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of a call by input name; an only input may have any name."""
    body = body_of(asked)
    if body is None:
        tensors = asked.tensors or []
        found = {t.name: t.array for t in tensors}
        if len(names) == 1 and len(tensors) == 1:
            return {names[0]: tensors[0].array}
    else:
        document = parse(body)
        if len(names) == 1 and (isinstance(document, list) or (isinstance(document, dict) and "data" in document)):
            return {names[0]: as_array(data_of(document))}
        found = {str(name): as_array(value, str(name)) for name, value in columns_of(document).items()}
    if set(found) != set(names):
        raise Invalid(f"the model takes {', '.join(names)}; it was given {', '.join(found) or 'nothing'}")
    return found


def log_failure() -> ScoringFailed:
    """The exception being handled, as the caller may see it; its traceback goes to the log only."""
    error = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
    text = "".join(traceback.format_exception(error)) if error is not None else ""
    current = CURRENT.get()
    call = f"request {current.request_id}, prediction {current.prediction_id}" if current else "a call"
    sys.stderr.write(f"modelyard: scoring failed, {call}\n{text}")
    sys.stderr.flush()
    said = str(error)
    return ScoringFailed(f"{type(error).__name__}: {said}" if said else type(error).__name__)
