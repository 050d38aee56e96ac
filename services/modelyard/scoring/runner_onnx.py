"""Runs an ONNX graph, under the graph's own input and output names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.errors import Invalid
from .arguments import text_of
from .calls import Asked, ScoringFailed
from .cores import cores
from .image import Model, Slot
from .results import Outputs
from .runners import CannotStart, RowRunner, named_inputs

DATATYPES = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
MAPS = re.compile(r"seq\(map\((string|int64),tensor\(float\)\)\)")
"""The probabilities by class that skl2onnx gives out (zipmap)."""
SEQUENCE = re.compile(r"seq\((tensor\(\w+\))\)")


class OnnxRunner(RowRunner):
    """One session, with as many threads as the replica was given cores. Calls are joined where the graph leaves the
    first dimension of every input and output free."""

    platform = "onnx_onnxv1"

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._session = session(model)
        self.inputs = tuple(_input(model, node) for node in self._session.get_inputs())
        self.outputs = tuple(_output(model, node) for node in self._session.get_outputs())
        self._names = tuple(i.name for i in self.inputs)
        self._all = tuple(o.name for o in self.outputs)
        self._dtypes = {i.name: _dtype(i.datatype) for i in self.inputs}
        self._shapes = {i.name: i.shape for i in self.inputs}
        self.batched = all(i.shape[:1] == (-1,) for i in self.inputs) and \
            all(o.shape[:1] in ((), (-1,)) for o in self.outputs)

    def arrays(self, asked: Asked) -> tuple[dict[str, Any], tuple[str, ...]]:
        names = tuple(asked.outputs) or self._all
        for name in names:
            if name not in self._all:
                raise Invalid(f"there is no output '{name}'; there is: {', '.join(self._all)}")
        return {name: self._fit(name, array) for name, array in named_inputs(asked, self._names).items()}, names

    def predict(self, arrays: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        try:
            values = self._session.run(names, arrays)
        except Exception as exc:
            if type(exc).__name__ == "InvalidArgument":
                raise Invalid(f"the model refuses the input: {exc}") from exc
            raise ScoringFailed(f"the model failed: {exc}") from exc
        return Outputs(zip(names, map(_array, values), strict=True))

    def _fit(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array as the graph wants it. Raises Invalid, naming the tensor, when it does not fit."""
        wanted, shape = self._dtypes[name], self._shapes[name]
        if array.ndim != len(shape) or any(w not in (-1, is_) for w, is_ in zip(shape, array.shape, strict=True)):
            raise Invalid(f"tensor '{name}': shape {list(array.shape)} does not fit {list(shape)} (-1: any)")
        if wanted.kind == "O":
            if array.dtype.kind not in "OUS":
                raise Invalid(f"tensor '{name}': the model takes text, not {array.dtype}")
            return text_of(name, array)
        if array.dtype != wanted and not np.can_cast(array.dtype, wanted, "same_kind"):
            raise Invalid(f"tensor '{name}': the model takes {wanted}, not {array.dtype}")
        return array.astype(wanted, copy=False)


def session(model: Model) -> Any:
    """The graph, ready to run. Raises CannotStart."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError as exc:
        raise CannotStart(f"model {model.id} needs the package onnxruntime: add it to the requirements") from exc
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = cores()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other models use the cores as well
    try:
        return ort.InferenceSession(str(model.path), options, providers=ort.get_available_providers())
    except Exception as exc:
        raise CannotStart(f"model {model.id} is not an ONNX graph that can be run: {exc}") from exc


def _input(model: Model, node: Any) -> Slot:
    if node.type not in DATATYPES:
        raise _cannot_carry(model, "input", node)
    return _slot(node)


def _output(model: Model, node: Any) -> Slot:
    if node.type in DATATYPES:
        return _slot(node)
    if MAPS.fullmatch(node.type):
        return Slot(node.name, "FP64", (-1, -1))  # as _array makes of it
    if (found := SEQUENCE.fullmatch(node.type)) and found[1] in DATATYPES:
        return Slot(node.name, "", ())  # an array where its tensors are alike, and who knows whether they are
    raise _cannot_carry(model, "output", node)


def _cannot_carry(model: Model, side: str, node: Any) -> CannotStart:
    return CannotStart(f"model {model.id}: its {side} '{node.name}' is a {node.type}, which calls cannot carry; export "
                       f"the graph with another type there, float32 perhaps (a Cast node behind or before it will do)")


def _slot(node: Any) -> Slot:
    shape = tuple(d if isinstance(d, int) and d > 0 else -1 for d in node.shape)
    return Slot(node.name, DATATYPES[node.type], shape)


def _dtype(datatype: str) -> np.dtype:
    from ..core.tensors import DTYPES

    return np.dtype(DTYPES[datatype])


def _array(value: Any) -> np.ndarray:
    """A graph's value as an array; a sequence of maps (zipmap) as one row each, in the maps' order."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return np.array([list(row.values()) for row in value])
    return np.asarray(value)
