"""Where the scoring server and ``modelyard.capture.Collector`` meet: where collected rows go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Sink(Protocol):
    """What takes collected rows: ``scoring.capture.CaptureLog``."""

    def collect(self, collector: str, prediction_id: str, columns: Sequence[str] | None,
                rows: Sequence[Sequence[Any]]) -> None: ...


_sink: Sink | None = None


def bind(sink: Sink | None) -> None:
    """The scoring server says where collected rows go (None: nowhere any more)."""
    global _sink
    _sink = sink


def bound() -> Sink | None:
    """The sink of this process; None outside a scoring server."""
    return _sink
