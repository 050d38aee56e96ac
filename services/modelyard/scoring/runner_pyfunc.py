"""Runs an MLflow folder by its python_function: a custom ``PythonModel``, or any flavour that brings a loader.

What it is given, its signature says: columns become a data frame with their types, tensors arrays by name; without a
signature ``{"columns": …, "data": rows}`` or an object of columns is a data frame, and an array an array. Calls are
never joined: nobody says that such a model goes row by row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.errors import Invalid
from ..core.signatures import MLFLOW_COLUMNS
from ..core.tensors import DTYPES
from .arguments import as_array, body_of, data_of, frame, only, parse
from .calls import Asked
from .image import Model
from .results import OUTPUT, Outputs
from .runners import CannotStart, Runner, log_failure, named_inputs

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_TRACKING_URI": "file:///nonexistent"}
"""A scoring server calls nobody, and looks for nobody to call."""


class PyfuncRunner(Runner):
    """``mlflow.pyfunc.load_model``, which runs code that the folder holds: only when the model is ``trusted``."""

    platform = "mlflow"

    def __init__(self, model: Model) -> None:
        self._model = _load(model)
        schema = self._model.metadata.get_input_schema()
        self._tensors = schema is not None and schema.is_tensor_spec()
        self._columns: dict[str, str] = {}
        if schema is not None and not self._tensors and schema.has_input_names():
            self._columns = {str(spec.name): getattr(spec.type, "name", "object") for spec in schema.inputs}
        self._names = tuple(str(name) for name in schema.input_names()) if self._tensors and schema.has_input_names() \
            else ()
        self._types = [np.dtype(type_) for type_ in schema.numpy_types()] if self._tensors else []
        self.inputs, self.outputs = model.slots("inputs"), model.slots("outputs")

    def run(self, asked: Asked) -> Any:
        given = self._given(asked)
        try:
            result = self._model.predict(given)
        except BaseException as exc:  # user code, as in score.py: sys.exit and worse end the call, not the server
            if type(exc).__module__.startswith("mlflow.exceptions") and self._refused(exc):
                raise Invalid(f"the model refuses the input: {exc}") from exc
            raise log_failure() from None
        return self._outputs(result)

    def _refused(self, exc: BaseException) -> bool:
        """MLflow says so where the input is not what the signature wants; user code may raise its errors too."""
        return getattr(exc, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

    def _given(self, asked: Asked) -> Any:
        if self._tensors:
            return self._arrays(asked)
        body = body_of(asked)
        document = parse(body) if body is not None else None
        if self._columns:
            plain = {*MLFLOW_COLUMNS, "string", "binary", "datetime"}
            if isinstance(document, dict) and set(self._columns.values()) - plain:
                return document  # nested values: MLflow's own rules are the best
            return self._frame(asked)
        if document is None:
            tensors = asked.tensors or []
            return frame(asked) if len(tensors) > 1 else only(tensors).array
        table = isinstance(document, dict) and ("data" not in document or "columns" in document)
        return frame(asked) if table else as_array(data_of(document))

    def _arrays(self, asked: Asked) -> Any:
        if self._names:
            given = named_inputs(asked, self._names)
            return {name: _cast(given[name], type_, name) for name, type_ in zip(self._names, self._types, strict=True)}
        body = body_of(asked)
        array = only(asked.tensors or []).array if body is None else as_array(data_of(parse(body)))
        return _cast(array, self._types[0], "input-0")

    def _frame(self, asked: Asked) -> Any:
        """With the signature's names where the rows came without, and its types where the values allow it."""
        table = frame(asked)
        if list(table.columns) == list(range(len(self._columns))):
            table.columns = list(self._columns)
        for name, type_ in self._columns.items():
            if name in table and type_ in MLFLOW_COLUMNS:
                table[name] = _cast(table[name].to_numpy(), np.dtype(DTYPES[MLFLOW_COLUMNS[type_]]), name)
        return table

    def _outputs(self, result: Any) -> Any:
        """Arrays and frames as they are; a series, a list of numbers or text, or a tuple is an array, a sparse matrix a
        dense one."""
        if hasattr(result, "toarray"):
            result = result.toarray()
        elif type(result).__module__.startswith("pandas.") and type(result).__name__ == "Series":
            result = result.to_numpy()
        elif isinstance(result, list | tuple) and result and not any(isinstance(one, Mapping) for one in result):
            try:
                array = np.asarray(result)
            except ValueError:
                return result
            result = array if array.dtype.kind in "fiubU" else result
        if isinstance(result, np.ndarray):
            named = self.outputs[0].name if len(self.outputs) == 1 else OUTPUT
            return Outputs({named: result})
        return result


def _cast(array: Any, wanted: np.dtype, name: str) -> Any:
    """Numbers of another type, where that loses nothing but precision. What cannot be is left for MLflow to refuse."""
    if array.dtype == wanted or array.dtype.kind not in "fiub" or wanted.kind not in "fiub":
        return array
    with np.errstate(all="ignore"):
        made = array.astype(wanted)
    if wanted.kind == "f" or np.array_equal(made, array):
        return made
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        raise Invalid(f"'{name}': a value does not fit {wanted}")
    return array


def _load(model: Model) -> Any:
    """Raises CannotStart."""
    if not model.trusted:
        raise CannotStart(f"model {model.id}: its MLflow folder is loaded by python_function, which runs code that it "
                          "holds; register it with trusted: true if it is yours")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow.pyfunc
    except ImportError as exc:
        raise CannotStart(f"model {model.id} needs the package mlflow-skinny (or mlflow): add it to the requirements "
                          f"({exc})") from exc
    try:
        return mlflow.pyfunc.load_model(str(model.path))
    except BaseException as exc:
        raise CannotStart(f"model {model.id} cannot be loaded: {type(exc).__name__}: {exc}") from exc
