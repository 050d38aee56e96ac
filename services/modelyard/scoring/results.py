"""What becomes of what ``run`` returns: tensors for gRPC and ``/v2``, plain JSON for ``/score``.

An array is tensor ``output-0``; a dict of arrays one tensor a key; a frame one tensor a column; anything else one
BYTES tensor ``output-0`` of shape [1] that holds JSON, with parameter ``content_type=application/json``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from ..core.errors import Invalid
from ..core.inference import JSON
from ..core.tensors import Tensor, nested, objects
from .calls import ScoringFailed

if TYPE_CHECKING:
    import numpy as np

OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
OUTPUT = "output-0"


class Outputs(dict[str, Any]):
    """Arrays by output name, made by a flavour: as plain JSON an only output stands alone."""


def tensors(result: Any, outputs: Sequence[str] = ()) -> list[Tensor]:
    """A result as tensors; with ``outputs`` only those, in that order. Raises Invalid for a name that is not there,
    ScoringFailed for a result that cannot be said."""
    try:
        made = _tensors(result)
    except Invalid as exc:
        raise ScoringFailed(f"what run returned cannot be answered: {exc.message}") from exc
    if not outputs:
        return made
    by_name = {t.name: t for t in made}
    missing = [name for name in outputs if name not in by_name]
    if missing:
        raise Invalid(f"there is no output '{missing[0]}'; there is: {', '.join(by_name)}")
    return [by_name[name] for name in outputs]


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Outputs):
        return [Tensor(name, value) for name, value in result.items()]
    if _is_array(result):
        return [Tensor(OUTPUT, result)]
    if isinstance(result, Mapping) and result and all(isinstance(k, str) and _is_array(v) for k, v in result.items()):
        return [Tensor(name, value) for name, value in result.items()]
    if _is_frame(result):
        return [Tensor(str(name), _cells(result[name].to_numpy())) for name in result.columns]
    return [Tensor(OUTPUT, objects(OUTPUT, [dump(result)], [1]), "BYTES", {"content_type": JSON})]


def _cells(column: np.ndarray) -> np.ndarray:
    """A frame's column of objects: as text where it is text, else as the numbers it holds."""
    if column.dtype.kind != "O" or all(isinstance(v, (str, bytes)) for v in column):
        return column
    import numpy as np

    return np.array([str(v) for v in column]) if any(isinstance(v, str) for v in column) else np.array(column.tolist())


def _is_array(result: Any) -> bool:
    numpy = sys.modules.get("numpy")  # as below
    return numpy is not None and isinstance(result, numpy.ndarray)


def _is_frame(result: Any) -> bool:
    pandas = sys.modules.get("pandas")  # a frame exists only where pandas was imported
    return pandas is not None and isinstance(result, pandas.DataFrame)


def dump(result: Any) -> bytes:
    """A result as JSON. Raises ScoringFailed, naming the type that JSON cannot hold."""
    if isinstance(result, Outputs) and len(result) == 1:
        result = next(iter(result.values()))
    try:
        return orjson.dumps(result, default=_plain, option=OPTIONS)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ScoringFailed(f"what run returned is not JSON: {exc}; return numbers, text, lists, dicts, arrays or "
                            "frames") from exc


def _plain(value: Any) -> Any:
    if _is_array(value):
        return nested(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (set, frozenset)):
        return list(value)
    if _is_frame(value):
        return {str(name): value[name].tolist() for name in value.columns}
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
