"""Searches and indexes of the MongoDB store, as plain documents for the driver.

A record is ``{_id: {k: kind, w: workspace, i: id}, r: revision, d: deleted, b: body as JSON, f: {indexed fields},
q: {t: waiting since, p: by which store}, o: [{i: event id, e: event as JSON}], c: [causes], n: [commits' tokens]}``.
A text map has its keys under ``f.tags`` and its pairs under ``f.tags=``, both arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.documents import INDEXED_ALWAYS, Document
from .store_readable import Row
from .store_search import Query, Scalar, entries, shape

KIND, SPACE, ID, DELETED = "_id.k", "_id.w", "_id.i", "d"


def base_indexes() -> list[dict[str, Any]]:
    """What every service's collection has: by id, due over all workspaces, and the outboxes."""
    return [
        {"keys": [(KIND, 1), (DELETED, 1), (SPACE, 1), (ID, 1)], "name": "id"},
        {"keys": [(KIND, 1), (DELETED, 1), ("f.due", 1), (ID, 1), (SPACE, 1)], "name": "due",
         "partialFilterExpression": {"f.due": {"$exists": True}}},
        {"keys": [("q.t", 1)], "name": "waiting", "partialFilterExpression": {"q.t": {"$exists": True}}},
    ]


def indexes(type_: type[Document]) -> list[dict[str, Any]]:
    """One for each field that a type declares, shared by types that declare the same. A list or map is ordered by
    creation behind its entries, for that is how lists are read; a single value by id, which breaks its ties."""
    found: list[dict[str, Any]] = []
    for field in sorted((type_.indexed | INDEXED_ALWAYS) - {"id", "deleted", "due"}):
        many = shape(type_, field) != "scalar"
        for path in (field, f"{field}=") if shape(type_, field) == "map" else (field,):
            keys = [(KIND, 1), (DELETED, 1), (SPACE, 1), (f"f.{path}", 1), ("f.created" if many else ID, 1)]
            found.append({"keys": keys,
                          "name": f"{path}[]" if many else path,
                          "partialFilterExpression": {f"f.{path}": {"$exists": True}}})
    return found


def fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The indexed part of a record: what is absent has no entry, truth values are numbers, as they are asked for."""
    found: dict[str, Any] = {}
    for field, value in sorted(entries(keys), key=repr):
        many = field.endswith("=") or isinstance(keys[field], Mapping | list)
        value = int(value) if isinstance(value, bool) else value
        if many:
            found.setdefault(field, []).append(value)
        else:
            found[field] = value
    return found


def compose(kind: str, spaces: Sequence[str] | None, query: Query) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """The filter and the sort of a search. ``spaces``: the workspaces, None for all (by ``due`` only)."""
    terms: list[dict[str, Any]] = [{KIND: kind}]
    terms.append({DELETED: {"$in": [False, True]} if query.deleted is None else query.deleted})
    if spaces is not None:
        terms.append({SPACE: spaces[0] if len(spaces) == 1 else {"$in": list(spaces)}})
    terms += [{_path(field): _plain(value)} for field, value in query.equal]
    if query.ranged is not None:
        field, begin, end = query.ranged
        ends = {"$gte": begin, "$lt": end}
        between = {word: _plain(v) for word, v in ends.items() if v is not None}
        terms.append({_path(field): between or {"$exists": True}})
    order, way = _path(query.order), -1 if query.descending else 1
    if query.after is not None:
        terms += _behind(order, query)
    elif order != ID:
        terms.append({order: {"$exists": True}})
    return {"$and": terms}, [(order, way)] if order == ID else [(order, way), (ID, way)]


def found(query: Query) -> dict[str, Any]:
    """What of each record is asked for."""
    return {"b": 1, **({} if query.order == "id" else {_path(query.order): 1})}


def row(record: Mapping[str, Any], query: Query) -> Row:
    """A record that was found."""
    key = record["_id"]
    return Row(key["i"] if query.order == "id" else record["f"][query.order], key["w"], key["i"], record["b"])


def _behind(order: str, query: Query) -> list[dict[str, Any]]:
    """What lies behind the last document. The first term is where the walk of the index begins."""
    assert query.after is not None
    value, id = _plain(query.after[0]), query.after[1]
    word = "$lt" if query.descending else "$gt"
    if order == ID:
        return [{ID: {word: id}}]
    return [{order: {f"{word}e": value}}, {"$or": [{order: {word: value}}, {order: value, ID: {word: id}}]}]


def _path(field: str) -> str:
    return ID if field == "id" else f"f.{field}"


def _plain(value: Scalar) -> Scalar:
    return int(value) if isinstance(value, bool) else value
