"""Captured rows as Parquet (zstd), with exactly the published columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TIME = pa.timestamp("us", tz="UTC")
SCHEMA = pa.schema([
    ("prediction_id", pa.string()), ("request_id", pa.string()), ("sequence", pa.int64()), ("replica", pa.string()),
    ("time", TIME), ("deployment", pa.string()), ("image", pa.string()), ("model", pa.string()),
    ("protocol", pa.string()), ("method", pa.string()), ("status", pa.string()), ("latency_ms", pa.float64()),
    ("queue_ms", pa.float64()), ("request", pa.binary()), ("request_type", pa.string()), ("response", pa.binary()),
    ("response_type", pa.string()), ("trace_id", pa.string()),
])
COLLECTED = pa.schema([
    ("prediction_id", pa.string()), ("sequence", pa.int64()), ("replica", pa.string()), ("time", TIME),
    ("deployment", pa.string()), ("image", pa.string()), ("row", pa.int64()),
])
"""What every collected row has; the collector's own columns follow."""


def write(columns: Mapping[str, Sequence[Any]], schema: pa.Schema = SCHEMA) -> bytes:
    """One file's bytes. The same columns give the same bytes."""
    return _bytes(pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names},
                           schema=schema))


def write_collected(fixed: Mapping[str, Sequence[Any]], own: Mapping[str, Sequence[Any]]) -> bytes:
    """As ``write``, with the collector's own columns; values that do not share a type become JSON text."""
    table = pa.table({name: pa.array(fixed[name], COLLECTED.field(name).type) for name in COLLECTED.names})
    for name, values in own.items():
        table = table.append_column(name, _guess(values))
    return _bytes(table)


def read(data: bytes) -> pa.Table:
    """A file's rows."""
    return pq.read_table(pa.BufferReader(data))


def _guess(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.array([None if v is None else json.dumps(v, default=str) for v in values])


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
