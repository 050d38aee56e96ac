"""Consecutive items in one message: their rows joined on the way out, the answer's rows taken apart on the way back.

Only where the caller says that the rows stand alone. An item is never split; items are joined while their tensors have
the same names, types and row shapes. A joined message that fails by what is in it is sent again item by item.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..core.errors import ModelyardError, Unavailable
from ..core.tensors import Tensor
from .inputs import Encoder, Outputs
from .pipeline import Slot

Part = tuple[list[Tensor], int]
"""An item's tensors and how many rows they have."""


class Joined(Slot):
    """A message that holds several items, the first of which is ``index``."""

    __slots__ = ("parts",)

    def __init__(self, index: int, body: bytes, parts: list[Part]) -> None:
        super().__init__(index, body)
        self.parts = parts


class Joiner:
    """Items in, messages out: none or some for each item, and the last ones from ``rest``. ``max_rows`` 1: none are
    joined."""

    def __init__(self, encoder: Encoder, max_rows: int, request_id: str) -> None:
        self._encoder, self._max_rows, self._request_id = encoder, max_rows, request_id
        self._parts: list[Part] = []
        self._key: Any = None
        self._rows = 0
        self._index = 0

    def add(self, item: Any, declared: dict[str, str]) -> Iterator[Slot]:
        """An item that cannot be sent becomes a slot that is done already."""
        try:
            tensors = self._encoder.tensors(item, declared)
        except ModelyardError as exc:
            yield from self.rest()
            yield self._next(Slot(self._index, b"", exc))
            return
        key, rows = _key(tensors) if self._max_rows > 1 else (None, 0)
        if key is None:
            yield from self.rest()
            yield self._next(self.alone(self._index, tensors))
            return
        if key != self._key or self._rows + rows > self._max_rows:
            yield from self.rest()
        self._parts.append((tensors, rows))
        self._key, self._rows = key, self._rows + rows
        if self._rows >= self._max_rows:
            yield from self.rest()

    def rest(self) -> Iterator[Slot]:
        """What was not given out yet."""
        parts, self._parts, self._rows = self._parts, [], 0
        if len(parts) == 1:
            yield self._next(self.alone(self._index, parts[0][0]))
        elif parts:
            tensors = [Tensor(first.name, np.concatenate([part[n].array for part, _ in parts]), first.datatype)
                       for n, first in enumerate(parts[0][0])]
            body = self._encoder.encode(tensors, self._id(self._index))
            yield self._next(Joined(self._index, body, parts), len(parts))

    def alone(self, index: int, tensors: list[Tensor]) -> Slot:
        """One item as a message of its own."""
        try:
            return Slot(index, self._encoder.encode(tensors, self._id(index)))
        except ModelyardError as exc:
            return Slot(index, b"", exc)

    def apart(self, slot: Slot) -> list[Slot]:
        """The items of a joined message that failed, each by itself; empty where that would change nothing."""
        if not isinstance(slot, Joined) or slot.error is None or slot.fatal or isinstance(slot.error, Unavailable):
            return []
        return [self.alone(slot.index + n, tensors) for n, (tensors, _) in enumerate(slot.parts)]

    def _next(self, slot: Slot, items: int = 1) -> Slot:
        self._index += items
        return slot

    def _id(self, index: int) -> str:
        return f"{self._request_id}/{index}" if self._request_id else ""


def _key(tensors: list[Tensor]) -> tuple[Any, int]:
    """(what must be equal to be joined, rows); (None, 0) for what has no rows, or not as many in each tensor."""
    rows = {tensor.array.shape[0] if tensor.array.ndim else 0 for tensor in tensors}
    if len(rows) != 1 or 0 in rows or any(tensor.parameters for tensor in tensors):
        return None, 0
    return tuple((t.name, t.datatype, t.array.shape[1:]) for t in tensors), rows.pop()


def split(outputs: Outputs, parts: list[Part]) -> list[Outputs]:
    """The outputs of each item. Raises ModelyardError when an output does not have a row for each row."""
    total = sum(rows for _, rows in parts)
    for name, array in outputs.items():
        if array.ndim == 0 or len(array) != total:
            raise ModelyardError(
                f"output '{name}' has shape {list(array.shape)} for {total} joined rows: this model's rows cannot be "
                f"joined; leave join_rows out", code="scoring-failed")
    found, at = [], 0
    for _, rows in parts:
        found.append({name: array[at:at + rows] for name, array in outputs.items()})
        at += rows
    return found
