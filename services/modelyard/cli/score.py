"""modelyard score …"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import Invalid, ModelyardError
from .guard import fail, usage
from .options import DeploymentRef, Output, connect, read_json
from .show import Format

if TYPE_CHECKING:
    from ..client import Deployment


class Protocol(StrEnum):
    """How the call travels."""

    rest = "rest"
    grpc = "grpc"


def score(
    deployment: DeploymentRef,
    data: Annotated[str | None, typer.Option("--data", "-d", help="JSON; @FILE reads a file, - reads stdin.")] = None,
    lines: Annotated[str | None, typer.Option(
        "--lines", "-l", metavar="FILE", help="A call for each line of JSON, many at once over gRPC; - reads stdin. "
        "Prints a line of JSON for each, in order.")] = None,
    protocol: Annotated[Protocol, typer.Option(help="REST /score, or gRPC with tensors.")] = Protocol.rest,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = 60.0,
    output: Output = Format.json,
) -> None:
    """Scores: {"data": rows}, columns, or a bare list of rows. Prints the answer."""
    if (data is None) == (lines is None):
        usage("give --data or --lines, one of them")
    if lines is not None:
        with connect() as yard:
            _each_line(yard.deployments.get(deployment), lines, timeout)
        return
    assert data is not None
    body = read_json(data, "--data")
    with connect() as yard:
        answer = yard.deployments.score(deployment, body, protocol=protocol.value, timeout_s=timeout)
    answer = _plain(answer)
    if output is Format.yaml:
        import yaml

        print(yaml.safe_dump(answer, sort_keys=False, allow_unicode=True), end="")
    else:
        print(json.dumps(answer, ensure_ascii=False))


def _each_line(service: Deployment, file: str, timeout: float) -> None:
    """Answers as they come. A line that fails is answered ``{"error": …}``, and the exit code is 1."""
    failed = count = 0
    with service.client(timeout_s=timeout) as scorer, _open(file) as source:
        for result in scorer.infer_many(_parsed(source), on_error="return"):
            count += 1
            if isinstance(result, ModelyardError):
                failed += 1
                shown: Any = {"error": {"code": result.code, "message": result.message}}
            else:
                shown = result
            print(json.dumps(_plain(shown), ensure_ascii=False))
    if failed:
        fail(f"{failed} of {count} lines could not be scored")


def _open(file: str) -> contextlib.AbstractContextManager[IO[str]]:
    if file == "-":
        return contextlib.nullcontext(sys.stdin)
    try:
        return Path(file.removeprefix("@")).open(encoding="utf-8")
    except OSError as exc:
        usage(f"cannot read '{file}': {exc}")


def _parsed(source: IO[str]) -> Iterator[Any]:
    for number, line in enumerate(source, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as exc:
                raise Invalid(f"line {number} is not JSON: {exc}") from exc


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
