"""Arguments and options that many commands share, the session, and tab completion from the yard itself."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .guard import usage
from .show import Format

if TYPE_CHECKING:
    from ..client import Client


@contextmanager
def connect() -> Iterator[Client]:
    """A client to ``--url`` or ``MODELYARD_URL``; Ctrl-C ends what it waits for, wherever it falls."""
    from ..client import Client, faces

    def interrupt(number: int, frame: Any) -> None:
        faces.INTERRUPTED.set()
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    with Client() as yard:
        yield yard


def names(part: str) -> Callable[[str], list[str]]:
    """Tab completion: ids in the yard that begin so. A yard that does not answer completes nothing."""

    def complete(incomplete: str) -> list[str]:
        from ..client import Client
        from ..core.errors import ModelyardError

        try:
            with Client(timeout_s=2) as yard:
                found: Sequence[Any] = getattr(yard, part).list(limit=200)
                return [item.id for item in found if item.id.startswith(incomplete)]
        except ModelyardError:
            return []

    return complete


ModelRef = Annotated[str, typer.Argument(
    help="iris:4, iris (the highest version) or iris@champion.", autocompletion=names("models"))]
ImageRef = Annotated[str, typer.Argument(
    help="iris-scorer:7, or iris-scorer (the highest ready version).", autocompletion=names("images"))]
DeploymentRef = Annotated[str, typer.Argument(help="The deployment's name.", autocompletion=names("deployments"))]
Output = Annotated[Format, typer.Option("--output", "-o", help="How to print it.")]
Base = Annotated[str | None, typer.Option(
    metavar="REFERENCE", help="What the image stands on: HOST/REPOSITORY:TAG or oci-layout:///FOLDER. None: it runs on "
                              "the local target only.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", "-t", metavar="K=V", help="A tag; repeat for more.")]
TagChanges = Annotated[list[str], typer.Argument(metavar="K=V… K-…", help="Set a tag, or take one away (K-).")]
Properties = Annotated[
    list[str] | None, typer.Option("--property", metavar="K=V", help="A write-once property; repeat for more.")]
Where = Annotated[
    list[str] | None, typer.Option("--tag", "-t", metavar="K[=V]", help="Only with this tag; repeat for more.")]
Description = Annotated[str | None, typer.Option(help="Free text.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done.")]
Env = Annotated[list[str] | None, typer.Option("--env", metavar="K=V", help="Public environment; repeat for more.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def pairs(given: list[str] | None, option: str) -> dict[str, str] | None:
    """``["team=flora"]`` -> ``{"team": "flora"}``; anything else is a usage error."""
    if not given:
        return None
    split = [text.partition("=") for text in given]
    if bad := [text for text, (key, equals, _) in zip(given, split, strict=True) if not (key and equals)]:
        usage(f"{option} needs KEY=VALUE, not '{bad[0]}'")
    return {key: value for key, _, value in split}


def read_json(given: str, option: str) -> Any:
    """JSON as an option gives it: the text itself, ``@FILE``, or ``-`` for stdin; anything else is a usage error."""
    text = sys.stdin.read() if given == "-" else given
    if given.startswith("@"):
        try:
            text = Path(given[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            usage(f"cannot read '{given[1:]}': {exc}")
    try:
        return json.loads(text)
    except ValueError as exc:
        usage(f"{option} is not JSON: {exc}")


def changed_tags(given: list[str] | None) -> dict[str, str | None] | None:
    """``["team=flora", "old-"]`` -> ``{"team": "flora", "old": None}``: a minus behind the key takes it away."""
    if not given:
        return None
    gone = [text for text in given if "=" not in text and text.endswith("-") and len(text) > 1]
    kept = pairs([text for text in given if text not in gone], "a tag")
    return {**(kept or {}), **{text[:-1]: None for text in gone}}


def choose(url: str | None) -> None:
    """``--url`` for everything that this process does."""
    if url:
        os.environ["MODELYARD_URL"] = url


def command(app: typer.Typer, name: str, example: str, **how: Any) -> Callable[[Any], Any]:
    """``app.command`` with an example below its help."""
    shown = "\n".join(f"  {line}" for line in example.strip().splitlines())
    return app.command(name, epilog=f"\b\nExample:\n{shown}", **how)


def group(help: str) -> typer.Typer:
    """A group of commands; alone it prints its help."""
    return typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None)
