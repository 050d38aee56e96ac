"""What the data plane tells of one answered call, and the tally of calls that are counted and not recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.latency import NONE, bucket, slot

MODELS_COUNTED = 256
OTHERS = "(other)"


@dataclass(slots=True, eq=False)
class Finished:
    """One answered call. ``status`` is the gRPC status name on every protocol; ``started_ns`` is
    ``time.time_ns()``, the other times are durations in nanoseconds; bodies are as they were on the wire."""

    prediction_id: str
    request_id: str
    model: str
    protocol: str
    method: str
    status: str
    started_ns: int
    latency_ns: int
    queue_ns: int
    request: bytes
    request_type: str
    response: bytes
    response_type: str
    trace_id: str = ""
    parent: str = ""
    """The caller's span, 16 hexadecimal digits, where it records this trace."""


def fitting(calls: Sequence[Finished], room: int) -> tuple[Sequence[Finished], Sequence[Finished]]:
    """(those whose bodies fit into so many bytes together, the others), in order."""
    if sum([len(c.request) + len(c.response) for c in calls]) <= room:
        return calls, ()
    fit, left = [], []
    for call in calls:
        size = len(call.request) + len(call.response)
        if size <= room:
            room -= size
            fit.append(call)
        else:
            left.append(call)
    return fit, left


class Tally:
    """Deltas per (slot, model, status, reason, latency bucket). A caller may ask for any model name: beyond
    ``MODELS_COUNTED`` different ones the rest share ``OTHERS``. Not thread-safe."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        """Since the start, by reason; never taken away."""
        self.rows_lost = 0
        """Collected rows that were not recorded, since the last frame."""
        self._counts: Counter[tuple[int, str, str, str, int]] = Counter()
        self._models: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._counts) or self.rows_lost > 0

    def count(self, started_ns: int, model: str, status: str, reason: str,
              latency_ns: int | None = None) -> None:
        """One call that is not recorded; without a latency when it was not even admitted."""
        if model not in self._models:
            if len(self._models) >= MODELS_COUNTED:
                model = OTHERS
            self._models.add(model)
        index = NONE if latency_ns is None else bucket(latency_ns)
        self._counts[slot(started_ns), model, status, reason, index] += 1
        self.totals[reason] += 1

    def lose_rows(self, rows: int) -> None:
        """Collected rows that could not be recorded."""
        self.rows_lost += rows
        self.totals["rows-lost"] += rows

    def body(self) -> dict[str, Any]:
        """What a counts frame holds: ``counts`` = [[slot, model, status, reason, bucket, n], …]."""
        return {"counts": [[*key, n] for key, n in self._counts.items()], "rows_lost": self.rows_lost}

    def clear(self) -> None:
        """The frame is written."""
        self._counts.clear()
        self.rows_lost = 0
