"""Keyset paging: ``limit``, ``after`` and ``order`` in, ``{"items", "next"}`` out.

A cursor is opaque text that holds the order and the last item's place in it; it stays valid while items come and go.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from ..core.documents import INDEXED_ALWAYS, Document, Where
from ..core.errors import Invalid
from ..ports.store import DocumentStore

D = TypeVar("D", bound=Document)
DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
PARAMETERS = {
    "limit": f"How many at most: 1 to {MAX_LIMIT}, default {DEFAULT_LIMIT}.",
    "after": "The `next` of the page before.",
    "order": "A field, with `-` before it for descending; `-created` is newest first.",
}


def seal(parts: list[Any]) -> str:
    """An opaque cursor from plain values."""
    raw = json.dumps(parts, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def unseal(cursor: str, size: int) -> list[Any]:
    """The values of a cursor made by ``seal``; Invalid for any other text."""
    try:
        parts = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError) as exc:
        raise Invalid("'after' is not a cursor; take it from the `next` of a page", field="after") from exc
    if not isinstance(parts, list) or len(parts) != size:
        raise Invalid("'after' is not a cursor of this list; take it from the `next` of a page", field="after")
    return parts


def limit_of(query: Mapping[str, str]) -> int:
    """``?limit=``, 1 to 1000."""
    text = query.get("limit", str(DEFAULT_LIMIT))
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MAX_LIMIT):
        raise Invalid(f"'limit' is a number from 1 to {MAX_LIMIT}, not '{text}'", field="limit")
    return int(text)


def _order(type_: type[Document], wanted: str) -> str:
    allowed = sorted((type_.indexed | INDEXED_ALWAYS) - {"due", "made_by", "deleted"} - type_.hidden)
    scalars = [f for f in allowed if not _is_many(type_, f)]
    if wanted.removeprefix("-") not in scalars:
        raise Invalid(f"'order' is one of {', '.join(scalars)} (with '-' before it for descending), not '{wanted}'",
                      field="order")
    return wanted


def _is_many(type_: type[Document], field: str) -> bool:
    text = str(type_.model_fields[field].annotation) if field in type_.model_fields else ""
    return any(word in text for word in ("dict", "list", "tuple", "set", "Mapping"))


async def page(store: DocumentStore, type_: type[D], where: Where, query: Mapping[str, str], *,
               workspace: str, order: str = "-created") -> tuple[list[D], str | None]:
    """One page of documents and the cursor of the next one, or None at the end. Invalid names every bad parameter."""
    limit, order = limit_of(query), _order(type_, query.get("order", order))
    after: tuple[str | int | float, str] | None = None
    if "after" in query:
        order_then, value, id_ = unseal(query["after"], 3)
        if order_then != order or not isinstance(value, str | int | float) or not isinstance(id_, str):
            raise Invalid(f"'after' is not a cursor of this list in the order '{order}'", field="after")
        after = (value, id_)
    found = await store.find(type_, where, workspace=workspace, order=order, after=after, limit=limit + 1)
    if len(found) <= limit:
        return found, None
    last = found[limit - 1]
    return found[:limit], seal([order, last.model_dump(mode="json")[order.removeprefix("-")], last.id])
