"""modelyard serve, modelyard config."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Output
from .show import Format, document

if TYPE_CHECKING:
    from ..settings import Settings


class Service(StrEnum):
    """What can be served alone."""

    registry = "registry"
    image_builder = "image-builder"
    deployer = "deployer"
    telemetry = "telemetry"
    stream = "stream"


Host = Annotated[str | None, typer.Option(help="Address to listen on: 127.0.0.1 unless told otherwise.")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="8700, or a single service's own; 0: any free one.")]
Data = Annotated[Path | None, typer.Option(file_okay=False, help="Where everything is kept: ~/.modelyard.")]
Config = Annotated[Path | None, typer.Option(dir_okay=False, help="The settings file: ./modelyard.toml if there.")]
Insecure = Annotated[bool | None, typer.Option("--insecure", help="Listen beyond loopback without a token.")]


def serve(
    services: Annotated[list[Service] | None, typer.Argument(help="Which services; none named: all of them.")] = None,
    host: Host = None, port: Port = None, data: Data = None, config: Config = None, insecure: Insecure = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Runs the services until Ctrl-C. All of them in one process, or one each.

    `stream` (live windows with Faust) is none of the "all": it needs bus=kafka:// and a process of its own."""
    import asyncio

    import uvloop

    from ..node import run
    from ..settings import load

    settings = load(config, host=host, port=port, data=data, insecure=insecure, log_level=log_level)
    names = [s.value for s in services or []]
    work = run(settings, names, ready=_ready) if Service.stream not in names else _stream(settings, names)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def _stream(settings: Settings, names: list[str]) -> Coroutine[Any, Any, None]:
    """The stream worker, which needs Faust, Kafka and a process of its own."""
    from ..core.errors import Invalid

    if len(names) > 1:
        raise Invalid("`stream` runs in a process of its own: modelyard serve stream", field="service")
    try:
        from ..stream import run
    except ImportError as exc:
        raise Invalid(f"`modelyard serve stream` needs a package that is not installed ({exc.name}); run "
                      "pip install 'modelyard[kafka,faust]'", field="service") from exc
    return run(settings, ready=_ready)


def _ready(url: str, services: list[str]) -> None:
    import gc

    gc.collect()
    gc.freeze()  # modules and routes live as long as we do: looking through them stops everything for 0.1 s each time
    gc.set_threshold(10_000, 10, 10)  # of what a busy moment makes, most is gone before it is looked for
    print(f"Modelyard answers at {url} ({', '.join(services)}); Ctrl-C stops it", file=sys.stderr, flush=True)


def config(
    host: Host = None, port: Port = None, data: Data = None, config: Config = None, insecure: Insecure = None,
    output: Output = Format.table,
) -> None:
    """The settings in force: flags, MODELYARD_*, modelyard.toml, defaults; secrets masked."""
    from ..settings import load

    settings: dict[str, Any] = load(config, host=host, port=port, data=data, insecure=insecure).masked()
    document(settings, output)
