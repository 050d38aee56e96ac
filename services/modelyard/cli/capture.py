"""modelyard capture …"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .guard import fail, usage
from .options import DeploymentRef, Output, command, connect, group
from .show import Column, Format, document, documents, table

app = group("Captured calls: look at them, take them home, prove that none is missing.")
Start = Annotated[str | None, typer.Option(help="From this time on: 2026-11-23T14:00:00Z.")]
End = Annotated[str | None, typer.Option(help="Up to this time, exclusive.")]
WINDOW: list[Column] = [
    "start", "end", "image", "model", "requests", "errors",
    *((p, lambda w, p=p: (w.get("latency_ms") or {}).get(p)) for p in ("p50", "p90", "p99")),
]
PROCESS: list[Column] = ["replica", "image", "state", "recorded", "missing", "gaps", "lost_segments"]
LEFT_OUT = frozenset({
    "prediction_id", "request_id", "sequence", "replica", "deployment", "image", "method", "queue_ms", "trace_id",
    "request", "request_type", "response", "response_type",
})


@command(app, "show", "modelyard capture show iris --limit 20")
def show(
    deployment: DeploymentRef, start: Start = None, end: End = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    wide: Annotated[bool, typer.Option("--wide", help="Every column.")] = False, output: Output = Format.table,
) -> None:
    """Captured calls as a table: when, which model, status, latency, inputs and outputs by name."""
    with connect() as yard:
        found = yard.capture(deployment).read(start, end, limit=limit)
    rows = [_plain(row) for row in found.slice(max(0, found.num_rows - limit)).to_pylist()]
    if output is not Format.table:
        documents(rows, [], output)
    elif not rows:
        print(f"nothing was captured of {deployment}", file=sys.stderr)
    else:
        told = [n for n in found.column_names if n not in LEFT_OUT and any(row[n] is not None for row in rows)]
        names = found.column_names if wide else told
        print(table([[_short(row[n]) for n in names] for row in rows], names))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in row.items()}


def _short(value: Any) -> Any:
    if hasattr(value, "strftime"):
        return value.strftime("%H:%M:%S.%f")[:-3]
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return value if len(text) <= 48 else text[:47] + "…"


@command(app, "export", "modelyard capture export iris --to calls.parquet --start 2026-11-23T00:00:00Z")
def export(
    deployment: DeploymentRef,
    to: Annotated[Path, typer.Option(dir_okay=False, help="What to write: .parquet, .csv or .jsonl.")],
    start: Start = None, end: End = None,
    raw: Annotated[bool, typer.Option("--raw", help="Bytes as they were on the wire, not decoded.")] = False,
    collect: Annotated[str | None, typer.Option(help="The rows of this collector instead.")] = None,
) -> None:
    """Writes captured calls to a file."""
    kinds = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}
    if to.suffix not in kinds:
        usage(f"--to ends with {', '.join(kinds)}")
    with connect() as yard:
        capture = yard.capture(deployment)
        found = capture.raw(start, end, collect=collect) if raw or collect else capture.read(start, end)
    kinds[to.suffix](found, to)
    print(f"{found.num_rows} calls in {to}")


def _parquet(found: Any, to: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(found, to)


def _jsonl(found: Any, to: Path) -> None:
    import json

    with to.open("w", encoding="utf-8") as f:
        for row in found.to_pylist():
            f.write(json.dumps(_plain(row), default=str, ensure_ascii=False) + "\n")


def _csv(found: Any, to: Path) -> None:
    import csv
    import json

    with to.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(found.column_names)
        for row in found.to_pylist():
            writer.writerow([json.dumps(v) if isinstance(v, (list, dict)) else v for v in _plain(row).values()])


@command(app, "verify", "modelyard capture verify iris")
def verify(
    deployment: DeploymentRef, start: Start = None, end: End = None, output: Output = Format.table,
) -> None:
    """Says per server process: complete, gaps, or open-ended (it runs still, or its end was lost). Exit 1 on gaps."""
    with connect() as yard:
        found = yard.capture(deployment).verify(start, end)
    if output is not Format.table:
        document(found, output)
    else:
        documents(found["processes"], PROCESS, output)
        print(f"complete: {'yes' if found['complete'] else 'no'} ({found['totals']['recorded']} calls recorded)")
    if not found["complete"]:
        fail(f"{found['totals']['missing']} calls of {deployment} are missing")


def telemetry(
    deployment: DeploymentRef, window: Annotated[str | None, typer.Option(help="1m, 5m, 1h …")] = None,
    start: Start = None, end: End = None, output: Output = Format.table,
) -> None:
    """Requests, errors and latencies in windows of time, for each image and model."""
    with connect() as yard:
        windows = yard.telemetry(deployment, window=window, start=start, end=end)
    documents(windows, WINDOW, output)
