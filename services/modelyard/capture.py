"""For scoring files: record anything beside the request and the response.

    from modelyard.capture import Collector

    features = Collector("features", columns=["petal_area", "sepal_area"])

    def run(data: np.ndarray):
        x = derive(data)
        features.collect(x)
        return model.predict(x)

Rows are kept with the prediction id of the call that is being answered, so they join its request and response.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .core.layout import COLLECTOR_NAME
from .scoring.collect import bound
from .scoring.context import CURRENT, Current
from .scoring.image import model_path

__all__ = ["RESERVED", "Collector", "model_path"]
log = logging.getLogger("modelyard.capture")
RESERVED = ("prediction_id", "sequence", "replica", "time", "deployment", "image", "row")
"""Columns that every collected row has; a collector's own have other names."""


class Collector:
    """Collects rows under a name. ``columns`` names them; without it a frame's own names are used, or ``c0`` … .

    Raises ValueError for a name or a column that cannot be kept.
    """

    def __init__(self, name: str, columns: Sequence[str] | None = None) -> None:
        if not isinstance(name, str) or not COLLECTOR_NAME.match(name):
            raise ValueError("a collector's name is 1-64 letters, digits, '-', '_' or '.', first a letter or digit")
        self.name = name
        self.columns = None if columns is None else _columns(columns)
        self._warned = False

    def collect(self, x: Any) -> bool:
        """Keeps the rows of ``x``: a numpy array (one row when it has one dimension; further dimensions become
        nested lists), a pandas frame or series, a list of rows, a list of values or a dict of columns.

        In ``run_batch``, as many rows as it was given are joined to the calls they came from, in order; another
        number of rows to the first of the calls.

        True when the rows were handed to capture. Outside a call of a scoring server there is nothing to join
        them with: they are not kept, which is said once in the log, and the answer is False. Raises ValueError
        when ``x`` does not have as many columns as this collector.
        """
        names, rows = _table(x)
        width = len(rows[0]) if rows else 0
        columns = self.columns or _columns(names or [f"c{i}" for i in range(width)])
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"collector '{self.name}' has {len(columns)} columns and was given rows of {width}")
        sink, current = bound(), CURRENT.get()
        if sink is None or current is None:
            if not self._warned:
                self._warned = True
                log.warning("collector '%s' was used outside a call of a scoring server; its rows are not kept",
                            self.name)
            return False
        if rows and not current.tried:
            for prediction_id, its in _by_call(current, rows):
                sink.collect(self.name, prediction_id, columns, its)
        return True


def _by_call(current: Current, rows: list[list[Any]]) -> Iterator[tuple[str, list[list[Any]]]]:
    """Rows and the predictions they belong to. In ``run_batch``, as many rows as it was given are its calls' own, in
    order; of another number nobody knows, so they are kept with the first."""
    if sum(n for _, n in current.rows) != len(rows):
        yield current.prediction_id, rows
        return
    at = 0
    for prediction_id, n in current.rows:
        yield prediction_id, rows[at:at + n]
        at += n


def _columns(names: Sequence[Any]) -> list[str]:
    columns = [str(name) for name in names]
    if len(set(columns)) != len(columns):
        raise ValueError("a collector's columns need different names")
    if taken := set(columns) & set(RESERVED):
        raise ValueError(f"every collected row has {', '.join(sorted(taken))} already; use another name")
    return columns


def _table(x: Any) -> tuple[list[str] | None, list[list[Any]]]:
    """(names or None, rows of plain values) of anything that ``collect`` takes."""
    if hasattr(x, "columns") and hasattr(x, "to_numpy"):
        return [str(c) for c in x.columns], _plain(_frame(x))
    if hasattr(x, "to_numpy"):
        return None, _plain(_frame(x))
    if isinstance(x, Mapping):
        values = [_plain_column(v) for v in x.values()]
        if len({len(v) for v in values}) > 1:
            raise ValueError("the columns of a dict need the same length")
        return [str(k) for k in x], [list(row) for row in zip(*values, strict=True)]
    return None, _plain(x)


def _frame(x: Any) -> Any:
    """A frame's or a series' values; what pandas calls missing is None."""
    return x.astype(object).where(x.notna(), None).to_numpy()


def _plain(x: Any) -> list[list[Any]]:
    values = x.tolist() if hasattr(x, "tolist") else x
    if not isinstance(values, list | tuple):
        values = [values]
    if not any(isinstance(v, list | tuple) or (hasattr(v, "tolist") and getattr(v, "ndim", 0)) for v in values):
        values = [values] if values else []
    return [[_scalar(v) for v in (row.tolist() if hasattr(row, "tolist") else row)] for row in values]


def _plain_column(values: Any) -> list[Any]:
    listed = values.tolist() if hasattr(values, "tolist") else values
    return [_scalar(v) for v in listed] if isinstance(listed, list | tuple) else [_scalar(listed)]


def _scalar(value: Any) -> Any:
    """numpy scalars and arrays inside lists → plain values."""
    return value.tolist() if hasattr(value, "tolist") else value
