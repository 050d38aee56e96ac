"""What a reader asks for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Span:
    """Which rows: calls with ``start <= time < end`` (None: open), of the calls themselves or of a collector."""

    start: datetime | None
    end: datetime | None
    collector: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a page ended: so many rows into this segment."""

    begin: str
    id: str
    rows: int
