"""modelyard score …"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .guard import usage
from .options import DeploymentRef, Output, connect
from .show import Format


class Protocol(StrEnum):
    """How the call travels."""

    rest = "rest"
    grpc = "grpc"


def score(
    deployment: DeploymentRef,
    data: Annotated[str, typer.Option("--data", "-d", help="JSON; @FILE reads a file, - reads stdin.")],
    protocol: Annotated[Protocol, typer.Option(help="REST /score, or gRPC with tensors.")] = Protocol.rest,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = 60.0,
    output: Output = Format.json,
) -> None:
    """Scores: {"data": rows}, columns, or a bare list of rows. Prints the answer."""
    body = _read(data)
    with connect() as yard:
        answer = yard.deployments.score(deployment, body, protocol=protocol.value, timeout_s=timeout)
    answer = _plain(answer)
    if output is Format.yaml:
        import yaml

        print(yaml.safe_dump(answer, sort_keys=False, allow_unicode=True), end="")
    else:
        print(json.dumps(answer, ensure_ascii=False))


def _read(data: str) -> Any:
    if data == "-":
        data = sys.stdin.read()
    elif data.startswith("@"):
        try:
            data = Path(data[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            usage(f"cannot read '{data[1:]}': {exc}")
    try:
        return json.loads(data)
    except ValueError as exc:
        usage(f"--data is not JSON: {exc}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
