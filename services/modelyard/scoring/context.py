"""What user code may know about the call it is in. Set around every ``run``; follows async code.

Standard library only. ``modelyard.capture.Collector`` joins its rows by it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple


class Current(NamedTuple):
    """The call that is being answered."""

    prediction_id: str
    request_id: str
    model: str  # iris:4
    rows: tuple[tuple[str, int], ...] = ()
    """In ``run_batch`` for several calls: each call's prediction id and how many rows it has, in order."""
    tried: bool = False
    """The rows are ours, to find out how a model behaves; nobody sent them."""


CURRENT: ContextVar[Current | None] = ContextVar("modelyard_call", default=None)
"""None outside of ``run`` (in ``init``, in a thread that user code started)."""
