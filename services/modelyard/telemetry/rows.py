"""Reading captured rows back: pages of plain values, and tables."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..core.decode import BODIES, inputs, outputs
from ..core.documents import rfc3339
from ..core.errors import NotFound
from ..kernel.service import Context
from . import parquet
from .manifests import manifests
from .model import CaptureStream, Segment
from .spans import Place, Span


async def page(ctx: Context, stream: CaptureStream, span: Span, limit: int, newest_first: bool,
               after: Place | None) -> tuple[list[dict[str, Any]], Place | None]:
    """Up to ``limit`` rows and where to go on; segments in order of their begin, rows in order of their sequence."""
    found: list[dict[str, Any]] = []
    async for segment, skip in _from(ctx, stream, span, newest_first, after):
        table = await _table(ctx, segment, span)
        if newest_first:
            table = table.take(list(range(table.num_rows - 1, -1, -1)))
        part = table.slice(skip, limit - len(found))
        found += await asyncio.to_thread(_plain, part, span)
        if len(found) == limit:
            return found, Place(rfc3339(segment.begin), segment.id, skip + part.num_rows)
    return found, None


async def tables(ctx: Context, stream: CaptureStream, span: Span) -> AsyncIterator[pa.Table]:
    """Everything in the span, segment by segment, the oldest first."""
    async for segment in manifests(ctx, stream, span.start, span.end):
        table = await _table(ctx, segment, span)
        if table.num_rows:
            yield table


async def newest(ctx: Context, stream: CaptureStream, span: Span, limit: int) -> list[pa.Table]:
    """The newest ``limit`` rows, the oldest of them first."""
    found: list[pa.Table] = []
    left = limit
    async for segment in manifests(ctx, stream, span.start, span.end, newest_first=True):
        table = await _table(ctx, segment, span)
        if table.num_rows:
            found.append(table.slice(max(table.num_rows - left, 0)))
            left -= found[-1].num_rows
        if left <= 0:
            break
    return found[::-1]


async def arrow(ctx: Context, stream: CaptureStream, span: Span, limit: int | None) -> AsyncIterator[bytes]:
    """An Arrow IPC stream. Collected rows of all segments have the columns that any of them has."""
    if limit is not None or span.collector is not None:
        whole = await newest(ctx, stream, span, limit if limit is not None else 2**62)
        schema = pa.unify_schemas([t.schema for t in whole], promote_options="permissive") if whole else \
            _schema(span)
        async for chunk in _stream(schema, _each(whole)):
            yield chunk
        return
    async for chunk in _stream(_schema(span), tables(ctx, stream, span)):
        yield chunk


async def _each(whole: list[pa.Table]) -> AsyncIterator[pa.Table]:
    for table in whole:
        yield table


async def _stream(schema: pa.Schema, source: AsyncIterator[pa.Table]) -> AsyncIterator[bytes]:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        async for table in source:
            if table.schema != schema:
                table = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
            writer.write_table(table)
            yield _taken(sink)
    yield _taken(sink)


def _taken(sink: io.BytesIO) -> bytes:
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


async def _from(ctx: Context, stream: CaptureStream, span: Span, newest_first: bool,
                after: Place | None) -> AsyncIterator[tuple[Segment, int]]:
    """Segments to read and how many of their rows to pass over."""
    if after is not None:
        first = await ctx.store.get(Segment, after.id, workspace=stream.workspace)
        if first is not None:
            yield first, after.rows
    place = None if after is None else (after.begin, after.id)
    async for segment in manifests(ctx, stream, span.start, span.end, newest_first, place):
        yield segment, 0


def _schema(span: Span) -> pa.Schema:
    return parquet.SCHEMA if span.collector is None else parquet.COLLECTED


async def _table(ctx: Context, segment: Segment, span: Span) -> pa.Table:
    """The segment's rows inside the span, by sequence. A file that retention took meanwhile has none."""
    found = []
    for file in segment.files:
        if file.collector != span.collector:
            continue
        try:
            raw = b"".join([chunk async for chunk in ctx.blobs.get(file.key)])
        except NotFound:
            continue
        found.append(await asyncio.to_thread(_within, raw, span))
    if not found:
        return _schema(span).empty_table()
    table = pa.concat_tables(found, promote_options="permissive")
    return table.sort_by("sequence") if len(found) > 1 else table


def _within(raw: bytes, span: Span) -> pa.Table:
    table = parquet.read(raw)
    for bound, keep in ((span.start, pc.greater_equal), (span.end, pc.less)):
        if bound is not None:
            table = table.filter(keep(table["time"], pa.scalar(bound, parquet.TIME)))
    return table


def _plain(table: pa.Table, span: Span) -> list[dict[str, Any]]:
    """Rows as JSON holds them: the bodies decoded into inputs and outputs by name."""
    rows = []
    for row in table.to_pylist():
        row["time"] = rfc3339(row["time"])
        if span.collector is None:
            body = {name: row.pop(name) for name in BODIES}
            row["inputs"] = inputs(row["protocol"], body["request"], body["request_type"])
            row["outputs"] = outputs(row["protocol"], body["response"], body["response_type"]) \
                if row["status"] == "OK" else {}
        rows.append(row)
    return rows
