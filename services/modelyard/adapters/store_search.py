"""Searches, checked once for every store: from ``Where`` and an order to exact entries, one range and a place to go on.

A text map has an entry for each key under ``tags`` and for each pair under ``tags=``.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from ..core.documents import INDEXED_ALWAYS, Document, Range, Where, rfc3339
from ..core.errors import Invalid

Scalar = str | int | float


@dataclass(frozen=True)
class Query:
    """A checked search: ``equal`` are exact entries, ``ranged`` is (field, from, to) with None for an open end."""

    equal: tuple[tuple[str, Scalar], ...]
    ranged: tuple[str, Scalar | None, Scalar | None] | None
    order: str
    descending: bool
    after: tuple[Scalar, str] | None
    limit: int
    deleted: bool | None


@lru_cache(maxsize=1024)
def shape(type_: type[Document], field: str) -> str:
    """``scalar``, ``list`` or ``map``, by the field's declared type."""
    about = type_.model_fields.get(field)
    if about is None:
        raise Invalid(f"{type_.kind} has no field '{field}' to search by", field=field)
    options: list[Any] = [about.annotation]
    if typing.get_origin(about.annotation) in (typing.Union, types.UnionType):
        options = list(typing.get_args(about.annotation))
    origins = {typing.get_origin(o) or o for o in options}
    if origins & {dict, Mapping}:
        return "map"
    return "list" if origins & {list, tuple, set, frozenset} else "scalar"


def pair(key: str, value: str) -> str:
    """The entry of a map's pair; the length in front keeps ``a=b: c`` and ``a: b=c`` apart."""
    return f"{len(key)}:{key}{value}"


def entries(keys: Mapping[str, Any]) -> set[tuple[str, Scalar]]:
    """The index entries of a document whose indexed fields are ``keys`` (JSON values)."""
    found: set[tuple[str, Scalar]] = set()
    for field, value in keys.items():
        if isinstance(value, Mapping):
            found.update((field, k) for k in value)
            found.update((f"{field}=", pair(k, v)) for k, v in value.items() if isinstance(v, str))
        elif isinstance(value, list):
            found.update((field, v) for v in value if isinstance(v, (str, int, float)))
        elif value is not None:
            found.add((field, value))
    return found


def plan(type_: type[Document], where: Where | None, order: str, after: tuple[Scalar, str] | None, limit: int,
         tombstones: bool) -> Query:
    """Checks a search. Raises Invalid for a field that is not indexed, or a term that no index answers."""
    equal: list[tuple[str, Scalar]] = []
    ranged: tuple[str, Scalar | None, Scalar | None] | None = None
    deleted: bool | None = None if tombstones else False
    for field, value in (where or {}).items():
        _indexed(type_, field)
        if field == "deleted":
            deleted = bool(value)
        elif isinstance(value, Range):
            if ranged is not None or shape(type_, field) != "scalar":
                raise Invalid(f"at most one range in a search, and on a single value; not on '{field}'", field=field)
            ends = [None if end is None else scalar(field, end) for end in (value.gte, value.lt)]
            ranged = (field, ends[0], ends[1])
        elif shape(type_, field) == "map" and isinstance(value, Mapping):
            equal += [(field, scalar(field, k)) if v is None else
                      (f"{field}=", pair(str(scalar(field, k)), str(scalar(field, v)))) for k, v in value.items()]
        else:
            equal.append((field, scalar(field, value)))
    name = order.removeprefix("-")
    _indexed(type_, name)
    if name == "deleted" or shape(type_, name) != "scalar":
        raise Invalid(f"'{name}' has no order", field=name)
    if limit < 1:
        raise Invalid("limit must be at least 1", field="limit")
    behind = None if after is None else (scalar(name, after[0]), str(after[1]))
    return Query(tuple(equal), ranged, name, order.startswith("-"), behind, limit, deleted)


def _indexed(type_: type[Document], field: str) -> None:
    if field not in type_.indexed and field not in INDEXED_ALWAYS:
        known = ", ".join(sorted(type_.indexed | INDEXED_ALWAYS))
        raise Invalid(f"{type_.kind} cannot be searched or ordered by '{field}'; one can by {known}", field=field)


def scalar(field: str, value: Any) -> Scalar:
    """A value as it lies in the index: times as RFC 3339 text, enums as their value."""
    if isinstance(value, datetime):
        return rfc3339(value)
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, (str, float)) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    raise Invalid(f"cannot search '{field}' for a {type(value).__name__} like this; text, a time or a number of at "
                  "most 64 bits is needed", field=field)
