"""Signatures: what a model takes and gives, in the words of the Open Inference Protocol, and samples of what it takes.

A signature is ``{"inputs": [slot, …], "outputs": [slot, …]}``; a slot is ``{"name", "datatype", "shape", "columns"}``,
-1 in a shape: any length. All but the name may be absent: not every file tells. ``columns`` names the numbers of a row.
A sample is a JSON body of ``/score``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .tensors import DTYPES

Slot = dict[str, Any]
Signature = dict[str, list[Slot]]
SIDES = ("inputs", "outputs")
SAMPLE_BYTES = 64 * 1024
MLFLOW_COLUMNS = {"double": "FP64", "float": "FP32", "long": "INT64", "integer": "INT32", "boolean": "BOOL"}
"""MLflow's types of columns → datatypes; the others (string, binary, datetime, array, object) travel as BYTES."""
NUMPY = {"float64": "FP64", "float32": "FP32", "float16": "FP16", "int64": "INT64", "int32": "INT32", "int16": "INT16",
         "int8": "INT8", "uint64": "UINT64", "uint32": "UINT32", "uint16": "UINT16", "uint8": "UINT8", "bool": "BOOL"}
OURS = re.compile(r"(input|output)-\d+|predict")
"""Names that we gave, not the model."""


def normal(given: Any) -> Signature | None:
    """A signature that somebody wrote, also as MLflow does (``ModelSignature.to_dict()``); None when it is no such
    thing."""
    if not isinstance(given, Mapping):
        return None
    try:
        out = {side: _slots(given.get(side), side[:-1]) for side in SIDES}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return out if any(out.values()) else None


def _slots(given: Any, what: str) -> list[Slot]:
    """Raises ValueError, TypeError or KeyError."""
    found = json.loads(given) if isinstance(given, str) else given or []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise TypeError
    if any("type" in one for one in found):
        return _mlflow(found, what)
    return [_slot(one) for one in found]


def _slot(given: Mapping[str, Any]) -> Slot:
    out: Slot = {"name": given["name"]}
    datatype, shape, columns = (given.get(key) for key in ("datatype", "shape", "columns"))
    if not isinstance(out["name"], str) or (datatype and datatype not in DTYPES and datatype != "OBJECT"):
        raise ValueError
    if datatype and datatype != "OBJECT":
        out["datatype"] = datatype
    if shape is not None:
        if not isinstance(shape, Sequence) or not all(type(n) is int and n >= -1 for n in shape):
            raise ValueError
        out["shape"] = list(shape)
    if columns:
        out["columns"] = [str(name) for name in columns]
    return out


def _mlflow(found: Sequence[Mapping[str, Any]], what: str) -> list[Slot]:
    """Slots of an MLflow schema: of tensors, or of columns. Columns without names are one row of numbers."""
    if all(one["type"] == "tensor" for one in found):
        return [{"name": str(one.get("name") or f"{what}-{n}"),
                 "datatype": NUMPY.get(str(one["tensor-spec"]["dtype"]), "BYTES"),
                 "shape": [int(size) for size in one["tensor-spec"]["shape"]]} for n, one in enumerate(found)]
    types = [MLFLOW_COLUMNS.get(str(one["type"]), "BYTES") for one in found]
    if all(one.get("name") is None for one in found):
        shape = [-1, len(found)] if len(found) > 1 else [-1]
        return [{"name": f"{what}-0", "datatype": _common(types), "shape": shape}]
    return [{"name": str(one.get("name", n)), "datatype": type_, "shape": [-1]}
            for n, (one, type_) in enumerate(zip(found, types, strict=True))]


def _common(types: Sequence[str]) -> str:
    return types[0] if len(set(types)) == 1 else "BYTES" if "BYTES" in types else "FP64"


def one_row(signature: Signature) -> Signature:
    """As a model takes it whose input is one array: columns become the numbers of a row, and keep their names there; an
    only output that has no name of its own is called as such a model calls it."""
    answers = signature["outputs"]
    if len(answers) == 1 and answers[0]["name"] == "output-0":
        signature = {**signature, "outputs": [{**answers[0], "name": "predict"}]}
    given = signature["inputs"]
    if not given or any(len(slot.get("shape") or [-1]) != 1 for slot in given):
        return signature
    types = [slot.get("datatype") or "FP64" for slot in given]
    row = {"name": "input-0", "datatype": _common(types), "shape": [-1, len(given)],
           "columns": [slot["name"] for slot in given]}
    return {**signature, "inputs": [row]}


def differences(given: Signature, found: Signature, *, any_number: bool = False) -> list[str]:
    """Where what was registered is not what the file says; a side that either leaves out says nothing.
    ``any_number``: the model takes and gives any type of number."""
    out: list[str] = []
    for side in SIDES:
        if not given[side] or not found[side]:
            continue
        pairs = _pairs(given[side], found[side])
        if pairs is None or (side == "inputs" and len(given[side]) != len(found[side])):
            out.append(f"the {side} are registered as {_names(given[side])}; the file has {_names(found[side])}")
            continue
        for said, is_ in pairs:
            out += [f"{side[:-1]} '{is_['name']}' is registered as {key} {said[key]}; the file says {is_[key]}"
                    for key in ("datatype", "shape") if _differ(key, said.get(key), is_.get(key), any_number)]
    return out


def _differ(key: str, said: Any, is_: Any, any_number: bool) -> bool:
    if said is None or is_ is None:
        return False
    if key == "shape":
        return len(said) != len(is_) or any(a != b and -1 not in (a, b) for a, b in zip(said, is_, strict=True))
    return bool(said != is_) and not (any_number and "BYTES" not in (said, is_))


def _pairs(given: Sequence[Slot], found: Sequence[Slot]) -> list[tuple[Slot, Slot]] | None:
    """What was given beside what was found: by name, or by place where a name is ours or there is one only."""
    by_name = {slot["name"]: slot for slot in found}
    if all(slot["name"] in by_name for slot in given):
        return [(slot, by_name[slot["name"]]) for slot in given]
    unnamed = len(found) == 1 or any(all(OURS.fullmatch(s["name"]) for s in side) for side in (given, found))
    return list(zip(given, found, strict=True)) if unnamed and len(given) == len(found) else None


def _names(slots: Sequence[Slot]) -> str:
    return ", ".join(slot["name"] for slot in slots)


def together(found: Signature, given: Signature) -> Signature:
    """What the file says, completed by what was registered: sizes that the file leaves open, types, whole sides."""
    out: Signature = {}
    for side in SIDES:
        pairs = _pairs(given[side], found[side]) if given[side] and found[side] else []
        said = {is_["name"]: told for told, is_ in pairs or ()}
        out[side] = [_completed(slot, said.get(slot["name"], {})) for slot in found[side]] or given[side]
    return out


def _completed(slot: Slot, said: Slot) -> Slot:
    out = {**said, **slot}
    shape, told = slot.get("shape"), said.get("shape")
    if shape and told and len(shape) == len(told):
        out["shape"] = [b if a == -1 else a for a, b in zip(shape, told, strict=True)]
    return out


def fitting(sample: Any) -> Any:
    """A sample that is small enough to keep: the whole, or its first row; None when that is too large as well, or when
    there is nothing in it."""
    if not isinstance(sample, dict | list) or not sample:
        return None
    if small(sample):
        return sample
    rows = sample.get("data") if isinstance(sample, dict) else sample
    if isinstance(rows, list):
        cut = {**sample, "data": rows[:1]} if isinstance(sample, dict) else rows[:1]
    elif isinstance(sample, dict) and all(isinstance(column, list) for column in sample.values()):
        cut = {name: column[:1] for name, column in sample.items()}
    else:
        return None
    return cut if small(cut) else None


def small(sample: Any) -> bool:
    """Whether a sample may be kept whole."""
    return len(json.dumps(sample, separators=(",", ":"))) <= SAMPLE_BYTES
