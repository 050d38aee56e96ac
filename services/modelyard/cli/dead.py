"""modelyard dead …"""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Limit, Output, Yes, command, connect, group
from .show import Column, Format, document, documents

app = group("Events that a service could not handle, and the way back.")
Id = Annotated[str, typer.Argument(help="The dead letter's id.")]
COLUMNS: list[Column] = [
    "id", ("service", lambda d: d.get("service") or d.get("group")), "topic", "subject", "error", "message"]


@command(app, "list", "modelyard dead list --service image-builder")
def list_(
    service: Annotated[str | None, typer.Option(help="Only of this service.")] = None, limit: Limit = None,
    output: Output = Format.table,
) -> None:
    """Dead letters, the newest first."""
    with connect() as yard:
        documents(yard.dead.list(service=service, limit=limit), COLUMNS, output)


@command(app, "show", "modelyard dead show 01a2b3")
def show(id: Id, output: Output = Format.table) -> None:
    """One: the event, where it lay, the error."""
    with connect() as yard:
        document(yard.dead.get(id), output)


@command(app, "replay", "modelyard dead replay 01a2b3")
def replay(id: Id, output: Output = Format.table) -> None:
    """Handles it again, once what was wrong is mended."""
    with connect() as yard:
        document(yard.dead.replay(id), output)


@command(app, "drop", "modelyard dead drop 01a2b3 --yes")
def drop(id: Id, yes: Yes = False) -> None:
    """Gives it up for good."""
    if not yes:
        typer.confirm(f"Give {id} up for good?", abort=True)
    with connect() as yard:
        yard.dead.drop(id)
    print(f"{id} is gone")
