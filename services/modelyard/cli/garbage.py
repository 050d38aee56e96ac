"""modelyard gc: what of images nothing needs any more."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Output
from .show import Column, Format, documents, size

Data = Annotated[Path | None, typer.Option(file_okay=False, help="The data folder: ~/.modelyard.")]
Config = Annotated[Path | None, typer.Option(dir_okay=False, help="The settings file: ./modelyard.toml if there.")]
COLUMNS: list[Column] = ["kind", "name", ("size", lambda d: size(d["size"]))]


def gc(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take it away; without, it is only shown.")] = False,
    older_than: Annotated[float, typer.Option(min=1, metavar="HOURS", help="Only what is older.")] = 24.0,
    data: Data = None, config: Config = None, output: Output = Format.table,
) -> None:
    """Shows what of images nothing needs any more on this machine, and with --yes takes it away.

    The services may run, and builds too: what they use is left alone. A registry collects its own garbage.
    """
    import asyncio

    from ..node import collect
    from ..settings import load

    found = asyncio.run(collect(load(config, data=data), older_s=older_than * 3600, dry=not yes))
    documents(found, COLUMNS, output)
    if output is Format.table and found:
        whole = size(sum(one["size"] for one in found))
        print(f"{whole} {'freed' if yes else 'to be freed: modelyard gc --yes'}", file=sys.stderr)
