"""What was found, as documents: one that cannot be read is left out of a list, told of and counted."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..core.documents import Document
from ..core.errors import Invalid
from ..kernel.observe import UNREADABLE, Once, fields
from .store_search import Query, Scalar

D = TypeVar("D", bound=Document)
log = logging.getLogger(__name__)
_said = Once()
_bad: dict[tuple[str, str], set[tuple[str, str]]] = {}
"""(Service, kind) → (workspace, id) of what cannot be read."""


@dataclass(frozen=True)
class Row:
    """A match: its value in the order that was asked for, and where it is."""

    value: Scalar
    workspace: str
    id: str
    body: bytes | str


def restored(type_: type[D], row: Row, service: str) -> D:
    """The document. Invalid, naming it, when it cannot be read; that is counted until it can be."""
    bad = _bad.setdefault((service, type_.kind), set())
    key = (row.workspace, row.id)
    try:
        doc = type_.restored(row.body)
    except Invalid as exc:
        bad.add(key)
        UNREADABLE.labels(service, type_.kind).set(len(bad))
        told = f"{type_.kind} '{row.id}': {exc.message}"
        if _said.new((service, type_.kind, *key), told):
            log.error("%s", told, extra=fields(kind=type_.kind, workspace=row.workspace, id=row.id))
        raise Invalid(told, code="unreadable", kind=type_.kind, id=row.id) from exc
    if key in bad:
        bad.discard(key)
        UNREADABLE.labels(service, type_.kind).set(len(bad))
    return doc


async def readable(type_: type[D], query: Query, service: str,
                   ask: Callable[[Query], Awaitable[Sequence[Row]]]) -> list[D]:
    """Up to ``limit`` documents; others take the place of those that cannot be read. A question for one (``limit`` 1:
    the highest, any that needs this) must not be answered by another, and is Invalid then."""
    found: list[D] = []
    wanted = query.limit
    while True:
        rows = await ask(query)
        for row in rows:
            try:
                found.append(restored(type_, row, service))
            except Invalid:
                if wanted == 1:
                    raise
        if len(rows) < query.limit or len(found) == wanted:
            return found
        query = replace(query, after=(rows[-1].value, rows[-1].id), limit=wanted - len(found))
