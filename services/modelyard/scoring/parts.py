"""Rows of several calls in one prediction: when they may be joined, how they are joined, and taken apart again.

What can be joined by rows: an array (its first dimension), a dict of arrays of equally many rows, a data frame, and
JSON ``{"data": [row, …]}`` or a bare list. Two calls are joined only when everything but the number of rows is equal:
names, data types, the other dimensions, columns, and the rest of a JSON body.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import orjson

Arrays = Mapping[str, Any]
TOLERANCE = {"f2": 2e-2, "f4": 1e-3, "f8": 1e-5}
"""How far apart the same row's result may be, alone and in a batch: kernels for many rows add up in other orders."""


class Part(NamedTuple):
    """What one call gives the model. Parts of an equal ``key`` may be joined; None: with no other."""

    inputs: Any
    rows: int = 1
    key: Hashable = None


class NotByRows(Exception):
    """What a model returned for joined calls has no row for each row it was given."""


def measure(value: Any) -> Part:
    """The part that a value makes."""
    rows, key = _measured(value) or (0, None)
    return Part(value, rows, (type(value), key)) if rows else Part(value)


def measure_arrays(arrays: dict[str, Any], names: tuple[str, ...]) -> Part:
    """The part that named arrays make, and the outputs that are asked of them; as ``(arrays, names)``."""
    if len(arrays) == 1:
        ((name, array),) = arrays.items()
        shape = array.shape
        if shape and shape[0]:
            return Part((arrays, names), shape[0], (names, name, array.dtype.char, shape[1:]))
        return Part((arrays, names))
    rows, key = _measured_arrays(arrays) or (0, None)
    return Part((arrays, names), rows, (names, key)) if rows else Part((arrays, names))


def _measured(value: Any) -> tuple[int, Hashable] | None:
    """(rows, what must be equal), or None for what cannot be joined."""
    if type(value) is dict:
        if "data" in value and isinstance(value["data"], list):
            rest = {k: v for k, v in value.items() if k != "data"}
            return len(value["data"]), orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)
        return _measured_arrays(value)
    if type(value) is list:
        return len(value), None
    if _is_frame(value):
        return len(value), (tuple(value.columns), tuple(map(str, value.dtypes)))
    if _is_array(value):
        return value.shape[0], (value.dtype.char, value.shape[1:])
    return None


def _measured_arrays(value: Mapping[str, Any]) -> tuple[int, Hashable] | None:
    rows, keys = -1, []
    for name, array in value.items():
        if not _is_array(array) or (rows >= 0 and array.shape[0] != rows):
            return None
        rows = array.shape[0]
        keys.append((name, array.dtype.char, array.shape[1:]))
    return (rows, tuple(keys)) if keys else None


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and bool(getattr(value, "shape", ()))


def _is_frame(value: Any) -> bool:
    pandas = sys.modules.get("pandas")  # a frame exists only where pandas was imported
    return pandas is not None and isinstance(value, pandas.DataFrame)


def join(values: Sequence[Any]) -> Any:
    """Values of equal keys as one, in order."""
    first = values[0]
    if type(first) is dict:
        if isinstance(first.get("data"), list):
            return {**first, "data": [row for value in values for row in value["data"]]}
        return {name: _concatenate([value[name] for value in values]) for name in first}
    if type(first) is list:
        return [row for value in values for row in value]
    if _is_frame(first):
        return sys.modules["pandas"].concat(values, ignore_index=True)
    return _concatenate(values)


def aligned(arrays: Arrays) -> Arrays:
    """As a model may want them that is to have them alone; those that are joined are copied, and so aligned, anyway."""
    return {name: array if array.flags.aligned else array.copy() for name, array in arrays.items()}


def _concatenate(arrays: Sequence[Any]) -> Any:
    import numpy as np

    return np.concatenate(arrays)


class Rows:
    """What one prediction gave several calls: arrays by name, with a row for each row given. Iterates over what each
    call has of it. Raises NotByRows when there are other rows."""

    __slots__ = ("arrays", "edges")

    def __init__(self, arrays: Mapping[str, Any], sizes: Sequence[int]) -> None:
        self.arrays, self.edges = arrays, list(pairwise(accumulate(sizes, initial=0)))
        for name, value in arrays.items():
            _check(value, self.edges[-1][1], f"'{name}' ")

    def piece(self, start: int, end: int) -> Mapping[str, Any]:
        """What the call of these rows has."""
        made = type(self.arrays) if isinstance(self.arrays, dict) else dict
        return made((name, _rows(value, start, end)) for name, value in self.arrays.items())

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self.piece(start, end) for start, end in self.edges)


def split(result: Any, sizes: Sequence[int]) -> list[Any]:
    """A result's rows, given back to the calls they came from. Raises NotByRows when it has other rows."""
    if isinstance(result, Mapping) and result:
        return list(Rows(result, sizes))
    edges = list(pairwise(accumulate(sizes, initial=0)))
    _check(result, edges[-1][1], "")
    return [_rows(result, start, end) for start, end in edges]


def _check(value: Any, total: int, what: str) -> None:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        has: Any = value.shape[0] if len(value.shape) else "no"
    else:
        has = len(value) if isinstance(value, (list, tuple)) or _is_frame(value) else "no"
    if has != total:
        raise NotByRows(f"{what}has {has} rows for the {total} it was given")


def _rows(value: Any, start: int, end: int) -> Any:
    return value.iloc[start:end] if _is_frame(value) else value[start:end]


def row_wise(predict: Callable[[Arrays], Mapping[str, Any]], one: Arrays, other: Arrays) -> bool:
    """Whether a model's rows do not depend on each other, tried with a row of each of two calls: what it says of
    both together must be what it says of each alone. Equal rows prove nothing, so then one is changed."""
    a, b = ({name: array[:1] for name, array in inputs.items()} for inputs in (one, other))
    if all(_equal(a[name], b[name]) for name in a):
        changed = {name: _changed(array) for name, array in a.items()}
        try:
            predict(changed)
            b = changed
        except Exception:  # noqa: BLE001 - a row that nobody sent may be one that the model refuses
            b = a
    try:
        together = split(predict({name: _concatenate([a[name], b[name]]) for name in a}), (1, 1))
    except NotByRows:
        return False
    return all(_close(got[name], wanted[name]) for got, inputs in zip(together, (a, b), strict=True)
               for wanted in (predict(inputs),) for name in wanted)


def _equal(a: Any, b: Any) -> bool:
    import numpy as np

    return np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")


def _changed(array: Any) -> Any:
    """Another row like this one; of numbers and text that may be codes, the same ones in another order."""
    turned = array[..., ::-1] if array.ndim > 1 else array
    return (turned * 1.5 + 1).astype(array.dtype) if array.dtype.kind == "f" else turned.copy()


def _close(got: Any, wanted: Any) -> bool:
    import numpy as np

    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    if got.dtype.kind != "f":
        return bool(np.array_equal(got, wanted))
    tolerance = TOLERANCE.get(got.dtype.str[1:], 1e-5)
    with np.errstate(all="ignore"):
        scale = float(np.max(np.abs(wanted), initial=1.0, where=np.isfinite(wanted)))
        return bool(np.allclose(got, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
