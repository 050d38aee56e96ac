"""The text that stands for an input's values, for calls to be sampled by: the same by whichever protocol they came."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from ..core.decode import INPUT, inputs
from .calls import Call


def key_of(call: Call, name: str, only: str = "") -> str:
    """The values of input ``name``, flat; "" where the call has none. ``only``: the model's only input, which callers
    may call what they like."""
    try:
        given = inputs(call.protocol, call.body, call.body_type)
        found = _found(given, name)
        if found is None and name in (only, INPUT):
            found = next(iter(given.values())) if len(given) == 1 else _found(given, INPUT)
        return "" if found is None else ",".join(map(_text, _leaves(found)))
    except Exception:  # noqa: BLE001 - whatever a body is, it has no key then
        return ""


def _found(given: dict[str, Any], name: str) -> Any:
    """A tensor or field; a column of a table, whose rows are lists beside ``columns``, or objects."""
    if name in given:
        return given[name]
    rows, columns = given.get(INPUT), given.get("columns")
    if isinstance(columns, list) and name in columns and isinstance(rows, list):
        at = columns.index(name)
        return [row[at] for row in rows]
    if isinstance(rows, dict):
        return rows.get(name)
    if isinstance(rows, list) and rows and all(isinstance(row, dict) and name in row for row in rows):
        return [row[name] for row in rows]
    return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _text(value: Any) -> str:
    """A number by its value: 1 and 1.0 are the same, and 0.1 in single precision is what it was in double."""
    if isinstance(value, float):
        if value.is_integer():
            return str(int(value))
        try:
            return repr(struct.unpack("<f", struct.pack("<f", value))[0])
        except OverflowError:
            return repr(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), sort_keys=True, default=str)
