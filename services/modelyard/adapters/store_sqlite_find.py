"""Searches of the SQLite store as SQL: every one of them walks an index, and none reads a document it leaves out.

Index entries lie in ``entries(shelf, field, value, id, doc, created)``, ordered so. A shelf is the live or the deleted
half of one (service, kind, workspace). A text map has an entry for each key under ``tags`` and for each pair under
``tags=``. Every entry knows when its document was created, the order that most lists want.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from .store_readable import Row
from .store_search import Query, Scalar, entries, plan

__all__ = ["choose", "compose", "entries", "merged", "plan", "run"]

CAP = 10_000
"""A term that matches fewer documents than this leads the search; otherwise the walk in the wanted order does."""


def run(db: sqlite3.Connection, shelf: int, query: Query) -> list[tuple[Scalar, str, bytes]]:
    """(order value, id, body) of up to ``limit`` documents of one shelf, in order."""
    lead = choose(db, shelf, query)
    if lead is None:
        return []
    sql, args = compose(shelf, query, lead)
    return db.execute(sql, args).fetchall()


def choose(db: sqlite3.Connection, shelf: int, query: Query) -> str | int | None:
    """What leads the search: ``order``, ``range``, or the number of an equality term. None: nothing can match."""
    in_order = query.order == "id"
    if not query.equal and (query.ranged is None or query.ranged[0] == query.order):
        return "order"
    if len(query.equal) == 1 and query.ranged is None and in_order:
        return 0
    counts: dict[str | int, int] = {}
    for number, (field, value) in enumerate(query.equal):
        counts[number] = _count(db, "value=?", (shelf, field, value))
    if query.ranged is not None:
        condition, ends = _between("value", query.ranged)
        counts["range"] = _count(db, condition or "1", (shelf, query.ranged[0], *ends))
    lead, count = min(counts.items(), key=lambda item: item[1])
    if count == 0:
        return None
    if count < CAP:
        return "order" if lead == "range" and query.ranged and query.ranged[0] == query.order else lead
    return 0 if in_order and query.equal else "order"


def _count(db: sqlite3.Connection, condition: str, args: tuple[Any, ...]) -> int:
    found: int = db.execute(f"SELECT count(*) FROM (SELECT 1 FROM entries WHERE shelf=? AND field=? AND {condition} "
                            f"LIMIT {CAP})", args).fetchone()[0]
    return found


def _between(column: str, ranged: tuple[str, Scalar | None, Scalar | None]) -> tuple[str, tuple[Scalar, ...]]:
    ends = [(f"{column}>=?", ranged[1]), (f"{column}<?", ranged[2])]
    return " AND ".join(c for c, v in ends if v is not None), tuple(v for _, v in ends if v is not None)


def compose(shelf: int, query: Query, lead: str | int) -> tuple[str, list[Any]]:
    """The SQL of one shelf. The leading entries are walked; the other terms are looked up by (field, value, id)."""
    conditions, args = ["e.shelf=?", "e.field=?"], [shelf, query.order]
    value, ranged = "e.value", query.ranged
    if isinstance(lead, int):
        args[1:] = query.equal[lead]
        conditions.append("e.value=?")
    elif lead == "range" and ranged is not None:
        args[1] = ranged[0]
    if lead != "order":
        value = _column(query.order)
        if value.startswith("k."):
            conditions.append(f"{value} IS NOT NULL")
    if ranged is not None:
        walked = lead == "range" or (lead == "order" and ranged[0] == query.order)
        column = "e.value" if walked else _column(ranged[0])
        condition, ends = _between(column, ranged)
        conditions.append(condition or f"{column} IS NOT NULL")
        args += ends
    for number, (field, wanted) in enumerate(query.equal):
        if number != lead:
            conditions.append("EXISTS (SELECT 1 FROM entries p "
                              "WHERE p.shelf=? AND p.field=? AND p.value=? AND p.id=e.id)")
            args += [shelf, field, wanted]
    way, sign = ("DESC", "<") if query.descending else ("ASC", ">")
    ids_only = isinstance(lead, int) and query.order == "id"
    if query.after is not None:
        conditions.append(f"e.id{sign}?" if ids_only else f"({value}, e.id){sign}(?, ?)")
        args += query.after[1:] if ids_only else query.after
    ordered = f"e.id {way}" if ids_only else f"{value} {way}, e.id {way}"
    keys = "CROSS JOIN documents k ON k.doc=e.doc" if "k.keys" in " ".join([value, *conditions]) else ""
    inner = (f"SELECT e.doc AS doc, {value} AS value, e.id AS id FROM entries e {keys} "
             f"WHERE {' AND '.join(conditions)} ORDER BY {ordered} LIMIT ?")
    return (f"SELECT x.value, x.id, d.body FROM ({inner}) x CROSS JOIN documents d ON d.doc=x.doc",
            [*args, query.limit])


def _column(field: str) -> str:
    """Where a walk of other entries finds a field: in the entry itself, or in the document's row."""
    return f"e.{field}" if field in ("id", "created") else f"k.keys->>'$.{field}'"


def merged(rows: list[Row], query: Query) -> list[Row]:
    """Those of several shelves in one order, cut to the limit. Numbers come before text, as in the index."""
    rows.sort(key=lambda row: (isinstance(row.value, str), row.value, row.id), reverse=query.descending)
    return rows[: query.limit]
