"""modelyard apply, modelyard diff."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .guard import usage
from .options import Output, connect
from .show import Format, Steps, documents

File = Annotated[str, typer.Option(
    "--filename", "-f", metavar="FILE.yaml", help="One or more documents; - reads stdin.")]
COLUMNS = ["kind", "id", "action"]


def apply(
    filename: File,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show what changes in each document.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until images are ready and deployments "
                                                                "healthy.")] = False,
    output: Output = Format.table,
) -> None:
    """Makes the yard hold these documents. One that equals the newest version changes nothing; references mean what
    the documents above have become; path: and score: are uploaded, relative to the file."""
    read, root = _read(filename)
    with connect() as yard, Steps() as steps:
        steps.start(f"applying {filename}")
        changes = yard.apply(read, root=root, dry_run=dry_run, on_progress=steps)
        for change in changes if wait and not dry_run else ():
            if change.kind == "Image":
                steps.start(f"building {change.id}")
                yard.images.get(change.id).wait(on_progress=steps)
            elif change.kind == "Deployment":
                steps.start(f"deploying {change.id}")
                yard.deployments.get(change.id).wait(on_progress=steps)
    for change in changes if diff else ():
        print(change.diff, end="", file=sys.stdout if output is Format.table else sys.stderr)
    rows = [{"kind": c.kind, "id": c.id, "action": _said(c.action, dry_run)} for c in changes]
    documents(rows, COLUMNS, output)


def diff(filename: File) -> None:
    """What apply would change, as a unified diff. Prints nothing when the yard holds it all."""
    read, root = _read(filename)
    with connect() as yard:
        for change in yard.apply(read, root=root, dry_run=True):
            if change.diff:
                print(f"# {change.kind} {change.id} would be {change.action}")
                print(change.diff, end="")


def _said(action: str, dry_run: bool) -> str:
    return f"would be {action}" if dry_run and action != "unchanged" else action


def _read(filename: str) -> tuple[list[Any], Path]:
    import yaml

    try:
        text = sys.stdin.read() if filename == "-" else Path(filename).read_text(encoding="utf-8")
        found = [d for d in yaml.safe_load_all(text) if d is not None]
    except (OSError, UnicodeDecodeError) as exc:
        usage(f"cannot read '{filename}': {exc}")
    except yaml.YAMLError as exc:
        usage(f"'{filename}' is not YAML: {' '.join(str(exc).split())}")
    if not found:
        usage(f"'{filename}' holds no document")
    return found, Path(".") if filename == "-" else Path(filename).parent
