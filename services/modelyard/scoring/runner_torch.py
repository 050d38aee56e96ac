"""Runs PyTorch models: TorchScript (``torch.jit.save``) and exported programs (``torch.export.save``), on CPUs.

Inputs have the names of ``forward``'s parameters; outputs the keys of a dict, else ``output-0``, ``output-1`` …, or the
names that were registered. A call's arrays become tensors without a copy, unless the model writes into them.
"""

from __future__ import annotations

import contextlib
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.errors import Invalid
from ..core.signatures import NUMPY
from ..core.tensors import DTYPES
from ..core.torch_files import exported
from .calls import Asked, ScoringFailed
from .cores import cores
from .image import Model, Slot
from .results import OUTPUT, Outputs
from .runners import CannotStart, RowRunner, named_inputs

WRITES = re.compile(r"::\w*[a-z]_(?=[(.\s])|::\w+_\.")
"""An operator that writes into its first argument: ``aten::relu_(``, ``aten.add_.Tensor``."""


class TorchRunner(RowRunner):
    """One module, called with its tensors in order, in inference mode."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._torch = torch = _torch(model)
        try:
            self.platform, self._module, self.inputs, self._writes = _loaded(torch, model)
        except CannotStart:
            raise
        except Exception as exc:
            raise CannotStart(f"model {model.id} cannot be loaded: {_first(exc)}") from exc
        told = model.slots("inputs")
        self.inputs = tuple(_typed(slot, told) for slot in self.inputs)
        self.outputs = model.slots("outputs")
        self._names = tuple(slot.name for slot in self.inputs)
        self._slots = {slot.name: slot for slot in self.inputs}
        first = next((p for p in self._module.parameters() if p.is_floating_point()), None)
        self._float = np.dtype("f8" if first is not None and first.dtype == torch.float64 else "f4")
        self.batched = all(slot.shape[:1] in ((), (-1,)) for slot in self.inputs)

    def arrays(self, asked: Asked) -> tuple[dict[str, Any], tuple[str, ...]]:
        given = named_inputs(asked, self._names)
        return {name: self._fit(self._slots[name], array) for name, array in given.items()}, tuple(asked.outputs)

    def predict(self, arrays: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        torch = self._torch
        tensors = [torch.from_numpy(_usable(arrays[name], self._writes)) for name in self._names]
        try:
            with torch.inference_mode():
                found = self._named(self._module(*tensors))
        except ScoringFailed:
            raise
        except Exception as exc:
            raise ScoringFailed(f"the model failed: {_first(exc)}") from exc
        missing = [name for name in names if name not in found]
        if missing:
            raise Invalid(f"there is no output '{missing[0]}'; there is: {', '.join(found)}")
        return Outputs((name, self._array(found[name])) for name in names or found)

    def _named(self, result: Any) -> dict[str, Any]:
        if isinstance(result, Mapping):
            found = {str(name): value for name, value in result.items()}
        else:
            each: Sequence[Any] = result if isinstance(result, list | tuple) else [result]
            told = [slot.name for slot in self.outputs]
            named = told if len(told) == len(each) else [f"{OUTPUT[:-1]}{n}" for n in range(len(each))]
            found = dict(zip(named, each, strict=True))
        for name, value in found.items():
            if not isinstance(value, self._torch.Tensor):
                raise ScoringFailed(f"the model's output '{name}' is a {type(value).__name__}, not a tensor; give the "
                                    "image a scoring file")
        return found

    def _array(self, tensor: Any) -> np.ndarray:
        """Shares the tensor's memory where it can."""
        plain = tensor.detach().cpu()
        array: np.ndarray = (plain.float() if plain.dtype == self._torch.bfloat16 else plain).resolve_conj().numpy()
        return array

    def _fit(self, slot: Slot, array: np.ndarray) -> np.ndarray:
        """The array as the model wants it. Raises Invalid, naming the tensor, when it does not fit."""
        shape = slot.shape
        if shape and (array.ndim != len(shape)
                      or any(w not in (-1, is_) for w, is_ in zip(shape, array.shape, strict=True))):
            raise Invalid(f"tensor '{slot.name}': shape {list(array.shape)} does not fit {list(shape)} (-1: any)")
        if array.dtype.kind not in "fiub":
            raise Invalid(f"tensor '{slot.name}': the model takes numbers, not text")
        wanted = np.dtype(DTYPES[slot.datatype]) if slot.datatype in DTYPES else \
            self._float if array.dtype.kind == "f" else array.dtype
        if array.dtype != wanted and not np.can_cast(array.dtype, wanted, "same_kind"):
            raise Invalid(f"tensor '{slot.name}': the model takes {slot.datatype}, not {array.dtype}")
        return array.astype(wanted, copy=False)


def _torch(model: Model) -> Any:
    """PyTorch, with as many threads as the replica was given cores. Raises CannotStart."""
    try:
        import torch
    except (ImportError, OSError) as exc:  # OSError: libraries of CUDA that the image does not have
        raise CannotStart(f"model {model.id} needs the package torch: add it to the requirements ({_first(exc)})") \
            from exc
    torch.set_num_threads(cores())
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(RuntimeError):  # another model of this image has used them already
            torch.set_num_interop_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
    return torch


def _loaded(torch: Any, model: Model) -> tuple[str, Any, tuple[Slot, ...], bool]:
    """(platform, what is called, its inputs, whether it writes into them). Raises CannotStart, and what PyTorch raises
    for a file that is none of its own."""
    with zipfile.ZipFile(model.path) as archive:
        if not exported(archive.namelist()):
            return _script(torch, model)
    if not model.trusted:
        raise CannotStart(f"model {model.id}: {model.path.name} is an exported program, and loading one may run code "
                          "it holds; register it with trusted: true if it is yours, or save it as TorchScript")
    program = torch.export.load(str(model.path))
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    shapes = [tuple(size if isinstance(size, int) else -1 for size in values[name].shape) for name in names]
    types = [NUMPY.get(str(values[name].dtype).removeprefix("torch."), "") for name in names]
    told = [slot.name for slot in model.slots("inputs")]
    named = told if len(told) == len(names) else list(names)
    writes = any(WRITES.search(f"::{node.target}") for node in program.graph.nodes if node.op == "call_function") \
        or bool(getattr(program.graph_signature, "user_inputs_to_mutate", None))
    return "pytorch_export", program.module(), tuple(map(Slot, named, types, shapes)), writes


def _script(torch: Any, model: Model) -> tuple[str, Any, tuple[Slot, ...], bool]:
    module = torch.jit.load(str(model.path), map_location="cpu").eval()
    slots = []
    for argument in module.forward.schema.arguments[1:]:
        if str(argument.type) == "Tensor":
            slots.append(Slot(argument.name, "", ()))
        elif not argument.has_default_value():
            raise CannotStart(f"model {model.id}: forward takes '{argument.name}', a {argument.type}, not a tensor; "
                              "give the image a scoring file")
        else:
            break  # what stands behind it cannot be given by place
    return "pytorch_libtorch", module, tuple(slots), bool(WRITES.search(str(module.inlined_graph)))


def _typed(slot: Slot, told: Sequence[Slot]) -> Slot:
    """With what was registered of it, where the module itself does not tell."""
    said = next((one for one in told if one.name == slot.name), told[0] if len(told) == 1 else Slot("", "", ()))
    return Slot(slot.name, slot.datatype or said.datatype, slot.shape or said.shape)


def _usable(array: np.ndarray, copy: bool) -> np.ndarray:
    """In the machine's byte order and in one piece; a copy where it is written to."""
    if copy or not array.flags.c_contiguous or not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
    return array


def _first(exc: BaseException) -> str:
    """PyTorch tells long stories; their last line that says something is the heart of it."""
    lines = [line.strip() for line in str(exc).strip().splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "Error:" in line), lines[0] if lines else "")
    return told or type(exc).__name__
