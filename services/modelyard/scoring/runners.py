"""Runners: the thing that turns tensors into a result. One instance for each model, opened in its own thread."""

from __future__ import annotations

import contextlib
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import orjson

from ..core.errors import Invalid
from .arguments import as_array, body_of, columns_of, data_of, only, parse
from .calls import Asked, ScoringFailed
from .context import CURRENT
from .image import Image, Model, Slot
from .parts import NotByRows, Part, Rows, aligned, join, measure_arrays, row_wise
from .records import Names


class Runner(ABC):
    """Opened once, then asked. Called by one thread at a time.

    A plain runner is asked by ``run``. One that is ``batched`` makes a part of each call (``prepare``), and is asked
    by ``one`` or, for parts of equal keys, by ``many``. Where ``asynchronous``, these three return awaitables.
    """

    platform = "python"
    inline = False
    """The runner is ours and safe from two threads: short predictions may run on the event loop."""
    asynchronous = False
    batched = False
    """Whether rows of several calls may be joined. A runner that finds out that they may not sets it to False."""
    inputs: tuple[Slot, ...] = ()
    outputs: tuple[Slot, ...] = ()
    sample: Any = None
    """An input that it takes, as a body of ``/score``, where somebody gave one."""
    columns: tuple[str, ...] = ()
    """What the columns of the only input are called, where the model knows."""
    alone = ""
    """Which of several outputs an answer of ``/score`` is, where it is one."""

    @property
    def names(self) -> Names:
        """What is called how in its calls."""
        takes, gives = (tuple(slot.name for slot in slots) for slots in (self.inputs, self.outputs))
        return Names(takes, gives, self.columns, self.alone)

    @abstractmethod
    def run(self, asked: Asked) -> Any:
        """The result (see ``results``). Raises Invalid for bad input, ScoringFailed when scoring code raised."""

    def known(self, asked: Asked) -> Part | None:
        """What ``prepare`` gives, of a call that is not read yet, if what is known of its ``head`` is enough."""
        return None

    def prepare(self, asked: Asked) -> Part:
        """What the call gives the model. Raises Invalid."""
        raise NotImplementedError

    def one(self, part: Part) -> Any:
        """As ``run``, of a part."""
        raise NotImplementedError

    def many(self, parts: Sequence[Part]) -> Any:
        """The results of parts that have one key, in order, by one prediction. Raises WrongRows when all of them have
        failed; anything else means that fewer are to be asked at a time."""
        raise NotImplementedError


class RowRunner(Runner):
    """A flavour: named arrays in, named arrays out, each row by itself. That this is so is tried before calls are
    joined for the first time."""

    inline = True
    batched = True

    def __init__(self) -> None:
        self._tried: set[frozenset[str]] = set()  # callers choose outputs: in any order, and twice if they like

    @abstractmethod
    def arrays(self, asked: Asked) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The call's arrays as the model wants them, and the outputs that it asks for. Raises Invalid."""

    @abstractmethod
    def predict(self, arrays: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        """The outputs of these names. Raises Invalid when the model refuses the arrays, ScoringFailed."""

    def run(self, asked: Asked) -> Any:
        return self.predict(*self.arrays(asked))

    def known(self, asked: Asked) -> Part | None:
        head = asked.head
        if head is None or (found := head.parts.get(self)) is None:
            return None
        name, names, rows, key = found
        return Part(({name: head.view(asked.wire)}, names), rows, key)

    def prepare(self, asked: Asked) -> Part:
        part = measure_arrays(*self.arrays(asked))
        arrays, names = part.inputs
        if asked.head is not None and asked.tensors and len(arrays) == 1:
            ((name, array),) = arrays.items()
            if array is asked.tensors[0].array:  # the model takes it as it is
                asked.head.parts[self] = name, names, part.rows, part.key
        return part

    def one(self, part: Part) -> Any:
        arrays, names = part.inputs
        return self.predict(aligned(arrays), names)

    def many(self, parts: Sequence[Part]) -> Any:
        names = parts[0].inputs[1]
        if frozenset(names) not in self._tried:
            self._try(parts, names)
        given = self.predict(join([part.inputs[0] for part in parts]), names)
        try:
            return Rows(given, [part.rows for part in parts])
        except NotByRows:
            self._by_itself(names)
            raise

    def _try(self, parts: Sequence[Part], names: tuple[str, ...]) -> None:
        current = CURRENT.get()
        token = CURRENT.set(current and current._replace(tried=True))
        try:
            by_rows = row_wise(lambda arrays: self.predict(aligned(arrays), names), parts[0].inputs[0],
                               parts[1].inputs[0])
        finally:
            CURRENT.reset(token)
        if not by_rows:
            self._by_itself(names)
            raise NotByRows("rows depend on each other")
        self._tried.add(frozenset(names))

    def _by_itself(self, names: tuple[str, ...]) -> None:
        self.batched = False
        sys.stderr.write(f"modelyard: the model's outputs ({', '.join(names)}) do not go row by row: calls are not "
                         "joined into batches\n")


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
    return [((model,), partial(_opened, model)) for model in image.models]


def _opened(model: Model) -> Runner:
    """The model's runner, which tells what its signature tells where it does not know itself. It has scored the model's
    sample once, if there is one: a model that cannot score does not start."""
    try:
        runner = _flavour(model)
    except CannotStart:
        raise
    except Exception as exc:
        raise CannotStart(f"model {model.id} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    runner.inputs = _told(runner.inputs, model.slots("inputs"))
    runner.outputs = _told(runner.outputs, model.slots("outputs"))
    runner.sample = model.sample
    if model.sample is not None:
        _try_sample(runner, model)
    return runner


def _told(own: tuple[Slot, ...], said: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """A runner's own slots, completed."""
    by_name = {slot.name: slot for slot in said}
    alone = said[0] if len(own) == len(said) == 1 else None
    return tuple(_filled(slot, by_name.get(slot.name, alone)) for slot in own) or said


def _filled(slot: Slot, said: Slot | None) -> Slot:
    if said is None:
        return slot
    shape = slot.shape or said.shape
    if len(shape) == len(said.shape):
        shape = tuple(b if a == -1 else a for a, b in zip(shape, said.shape, strict=True))
    return Slot(slot.name, slot.datatype or said.datatype, shape)


def _try_sample(runner: Runner, model: Model) -> None:
    try:
        runner.run(Asked(body=orjson.dumps(model.sample)))
    except Invalid as exc:
        sys.stderr.write(f"modelyard: the sample of model {model.id} does not fit it: {exc.message}\n")
    except ScoringFailed as exc:
        raise CannotStart(f"model {model.id} cannot score its own sample: {exc.message}") from exc


def _flavour(model: Model) -> Runner:
    framework, suffix = model.framework, model.path.suffix
    if framework == "mlflow" or (model.path.is_dir() and (model.path / "MLmodel").is_file()):
        return _mlflow(model)
    framework = framework or BY_SUFFIX.get(suffix, "none")
    if framework in FLAVOURS:
        return FLAVOURS[framework](model)
    raise CannotStart(f"model {model.id} of framework '{framework}' needs a scoring file: only {', '.join(FLAVOURS)} "
                      "models answer without one")


def _onnx(model: Model) -> Runner:
    from .runner_onnx import OnnxRunner

    if model.answers:
        from .graph_estimator import GraphEstimator
        from .runner_sklearn import SklearnRunner

        runner = SklearnRunner(model, GraphEstimator(model))
        runner.platform = OnnxRunner.platform
        return runner
    return OnnxRunner(model)


def _sklearn(model: Model) -> Runner:
    from .runner_sklearn import SklearnRunner

    return SklearnRunner(model)


def _lightgbm(model: Model) -> Runner:
    from .runner_trees import lightgbm_runner

    return lightgbm_runner(model)


def _xgboost(model: Model) -> Runner:
    from .runner_trees import xgboost_runner

    return xgboost_runner(model)


def _pytorch(model: Model) -> Runner:
    from .runner_torch import TorchRunner

    return TorchRunner(model)


FLAVOURS = {"onnx": _onnx, "scikit-learn": _sklearn, "lightgbm": _lightgbm, "xgboost": _xgboost, "pytorch": _pytorch}
BY_SUFFIX = {".onnx": "onnx", ".skops": "scikit-learn", ".joblib": "scikit-learn", ".pkl": "scikit-learn",
             ".ubj": "xgboost", ".pt": "pytorch", ".pt2": "pytorch"}
MLFLOW = (("model.onnx", _onnx), ("model.lgb", _lightgbm), ("model.ubj", _xgboost), ("model.xgb", _xgboost),
          ("model.skops", _sklearn), ("model.pkl", _sklearn))


def _mlflow(model: Model) -> Runner:
    """An MLflow folder by the file that its flavour leaves in it, else by its python_function."""
    for name, make in MLFLOW:
        if (model.path / name).is_file():
            return make(replace(model, path=model.path / name))
    from .runner_pyfunc import PyfuncRunner

    return PyfuncRunner(model)


def the_input(asked: Asked) -> tuple[str, Any]:
    """The one array of a call, whatever it came as, and what its caller calls it. Raises Invalid."""
    body = body_of(asked)
    if body is not None:
        return "data", as_array(data_of(parse(body)))
    tensor = only(asked.tensors or [])
    return tensor.name, tensor.array


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
    """The exception being handled, as the caller may see it; its traceback goes to the log only. Never raises, though
    what is raised may be anything, also something that cannot be told, and the log may be closed."""
    error = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
    current = CURRENT.get()
    call = f"request {current.request_id}, prediction {current.prediction_id}" if current else "a call"
    with contextlib.suppress(Exception):
        text = "".join(traceback.format_exception(error)) if error is not None else ""
        sys.stderr.write(f"modelyard: scoring failed, {call}\n{text}")
        sys.stderr.flush()
    try:
        said = str(error).encode("utf-8", "replace").decode()
    except Exception:  # noqa: BLE001 - user code's own __str__
        said = ""
    name = type(error).__name__
    return ScoringFailed(f"{name}: {said}" if said else name)
