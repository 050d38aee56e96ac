"""Windows: how many calls, which errors, how fast. Pure functions over what segments contribute.

A contribution is one cell of one segment: calls of one model with one status that began in one slot of the clock,
counted per latency bucket. Adding cells up in any order and grouping gives the same windows, so they are exact and
can be made again at any time from the manifests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ..core.documents import rfc3339
from ..core.errors import Invalid
from ..core.latency import SLOT_S, percentiles

WINDOW_S = 60
GRACE_S = 15
"""A window is settled this long after its end: counts frames are at most 5 s old, shipping and ingest need few more."""
MOST_WINDOWS = 10_000
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "": 1}


class Cell(NamedTuple):
    """``latency`` maps bucket → calls."""

    slot: int
    model: str
    status: str
    latency: dict[int, int]

    def plain(self) -> list[Any]:
        """As events carry it: JSON has only text for keys."""
        return [self.slot, self.model, self.status, {str(bucket): calls for bucket, calls in self.latency.items()}]

    @classmethod
    def of(cls, plain: Sequence[Any]) -> Cell:
        """Raises ValueError, TypeError or AttributeError for what is no cell."""
        slot, model, status, latency = plain
        return cls(int(slot), str(model), str(status), {int(bucket): int(n) for bucket, n in latency.items()})


Key = tuple[int, str, str]
"""Window start (epoch seconds), image, model."""


def parse_window(text: str) -> int:
    """``1m``, ``90s``, ``2h``, ``60`` → seconds. Raises Invalid for anything that is not a whole number of slots."""
    found = re.fullmatch(r"([0-9]{1,7})(s|m|min|h|d|)", text)
    seconds = int(found[1]) * UNITS[found[2]] if found else 0
    if seconds <= 0 or seconds % SLOT_S or seconds > 31 * 86_400:
        raise Invalid(f"'{text}' is not a window; write a multiple of {SLOT_S} s up to 31 d, such as 30s, 1m or 1h",
                      field="window")
    return seconds


def window_of(slot: int, width: int) -> int:
    """The start of the window of ``width`` seconds that a slot lies in."""
    return slot - slot % width


class Windows:
    """Adds cells up."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._calls: dict[Key, dict[str, int]] = {}
        self._latency: dict[Key, dict[int, int]] = {}

    def add(self, image: str, cells: Iterable[Cell], start: int | None = None, end: int | None = None) -> None:
        """Cells whose slot lies in ``start <= slot < end`` (epoch seconds; None: no bound)."""
        for cell in cells:
            if (start is not None and cell.slot < start) or (end is not None and cell.slot >= end):
                continue
            key = (window_of(cell.slot, self.width), image, cell.model)
            statuses = self._calls.setdefault(key, {})
            latency = self._latency.setdefault(key, {})
            for index, calls in cell.latency.items():
                statuses[cell.status] = statuses.get(cell.status, 0) + calls
                latency[index] = latency.get(index, 0) + calls
        if len(self._calls) > MOST_WINDOWS:
            raise Invalid(f"more than {MOST_WINDOWS} windows; ask for a shorter time or a longer window",
                          field="window")

    def answers(self, deployment: str) -> Iterator[dict[str, Any]]:
        """In order of time, then image and model."""
        for key in sorted(self._calls):
            yield describe(deployment, key, self.width, self._calls[key], self._latency[key])


def describe(deployment: str, key: Key, width: int, statuses: Mapping[str, int],
             latency: Mapping[int, int]) -> dict[str, Any]:
    """One window as the API answers it."""
    start, image, model = key
    return {
        "start": rfc3339(moment(start)), "end": rfc3339(moment(start + width)), "deployment": deployment,
        "image": image, "model": model, "requests": sum(statuses.values()),
        "errors": {status: n for status, n in sorted(statuses.items()) if status != "OK"},
        "latency_ms": percentiles(latency),
    }


def moment(seconds: float) -> datetime:
    """Epoch seconds → a moment in UTC."""
    return datetime.fromtimestamp(seconds, UTC)
