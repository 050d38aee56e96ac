"""The tree of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from . import apply, capture, dead, deploy, deployments, doctor, events, garbage, images, models, score, serve
from .guard import Guarded
from .options import choose, command

app = typer.Typer(
    name="modelyard", cls=Guarded, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="\b\nExample:\n  modelyard serve\n  modelyard deploy ./iris --name iris\n"
           "  modelyard score iris --data '{\"data\": [[5.1, 3.5, 1.4, 0.2]]}'",
)


@app.callback()
def root(
    url: Annotated[str | None, typer.Option(
        "--url", help="The yard: MODELYARD_URL, else http://127.0.0.1:8700. Its token: MODELYARD_TOKEN.")] = None,
) -> None:
    """Takes a trained model to where it is used and tells you how it does there."""
    choose(url)


ONE = '{"data": [[5.1, 3.5, 1.4, 0.2]]}'
command(app, "serve", "modelyard serve\nmodelyard serve registry --port 8701")(serve.serve)
command(app, "deploy", "modelyard deploy ./iris --name iris\nmodelyard deploy model.onnx --name digits")(deploy.deploy)
command(app, "score", f"modelyard score iris --data '{ONE}'\nmodelyard score iris --data @rows.json --protocol grpc\n"
        "modelyard score iris --lines calls.jsonl")(
    score.score)
app.add_typer(models.app, name="models")
app.add_typer(images.app, name="images")
app.add_typer(deployments.app, name="deployments")
app.add_typer(capture.app, name="capture")
command(app, "telemetry", "modelyard telemetry iris --window 1m")(capture.telemetry)
app.add_typer(events.app, name="events")
app.add_typer(dead.app, name="dead")
command(app, "apply", "modelyard apply -f yard.yaml --dry-run --diff")(apply.apply)
command(app, "diff", "modelyard diff -f yard.yaml")(apply.diff)
command(app, "doctor", "modelyard doctor")(doctor.doctor)
command(app, "gc", "modelyard gc\nmodelyard gc --yes --older-than 72")(garbage.gc)
command(app, "config", "modelyard config --output json")(serve.config)


@command(app, "version", "modelyard version")
def version() -> None:
    """The version of this program."""
    from ..core.version import __version__

    print(__version__)
