"""modelyard events …"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Output, command, connect, group
from .show import Column, Format, documents

if TYPE_CHECKING:
    from ..client import Event

app = group("Every fact of the yard: as it happens, and from the beginning.")
Types = Annotated[list[str] | None, typer.Option("--type", help="model.registered, 'deployment.*'; repeat for more.")]
Subject = Annotated[str | None, typer.Option(help="Only of this document: iris:4.")]
COLUMNS: list[Column] = [
    "time", "topic", "subject", ("sequence", lambda e: int(e["sequence"])),
    ("phase", lambda e: e["data"].get("phase")), ("reason", lambda e: e["data"].get("reason")),
]


def _document(event: Event) -> dict[str, Any]:
    return {"topic": event.topic, **event.model_dump(mode="json", exclude_none=True), "cursor": event.cursor}


@command(app, "list", "modelyard events list --type 'deployment.*' --subject iris")
def list_(
    type: Types = None, subject: Subject = None,
    after: Annotated[str, typer.Option(help="beginning, or a cursor.")] = "beginning",
    output: Output = Format.table,
) -> None:
    """The events there are."""
    with connect() as yard:
        found = [_document(e) for e in yard.events(type, subject=subject, after=after, follow=False)]
    documents(found, COLUMNS, output)


@command(app, "tail", "modelyard events tail --type 'image.*'")
def tail(
    type: Types = None, subject: Subject = None,
    after: Annotated[str, typer.Option(help="beginning, end or a cursor.")] = "end", output: Output = Format.table,
) -> None:
    """Events as they happen, until Ctrl-C. As JSON: one event a line."""
    import json

    with connect() as yard:
        for event in yard.events(type, subject=subject, after=after):
            if output is Format.table:
                phase = event.data.get("reason") or event.data.get("phase") or ""
                print(f"{event.time:%H:%M:%S}  {event.topic:<22} {event.subject}  {phase}".rstrip(), flush=True)
            elif output is Format.json:
                print(json.dumps(_document(event), ensure_ascii=False), flush=True)
            else:
                print("---")
                documents([_document(event)], [], output)
