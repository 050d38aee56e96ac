"""How the command line ends: 0, 1 (failed) or 2 (usage); a line on stderr that says what to do; never a traceback."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..core.errors import ModelyardError

INTERRUPTED = 130


class Guarded(TyperGroup):
    """The root group: whatever a command raises ends here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModelyardError as exc:
            explain(exc)
            raise typer.Exit(1) from exc
        except KeyboardInterrupt:
            warnings.simplefilter("ignore")  # what was made and not begun yet is no news to who interrupts
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            hush()
            raise typer.Exit(1) from None
        except OSError as exc:
            where = f" '{exc.filename}'" if exc.filename else ""
            complain(f"{exc.strerror or exc}{where}")
            raise typer.Exit(1) from exc


def complain(message: str, *more: str) -> None:
    """``error: …`` on stderr, further lines indented."""
    print(f"error: {message}", *(f"  {line}" for line in more), sep="\n", file=sys.stderr)


def explain(exc: ModelyardError) -> None:
    """An error with all that it knows: every problem of the request, what is in the way, what to do."""
    lines = _problems(exc)
    lines += [f"{b.get('kind')} {b.get('id')} ({b.get('phase')})" for b in exc.detail.get("blockers") or []]
    if help := exc.detail.get("help"):
        lines.append(f"try: {help}" if str(help).startswith("modelyard ") else str(help))
    complain(exc.message, *lines)


def _problems(exc: ModelyardError) -> list[str]:
    """Each problem with its field, where the message does not say it already."""
    found = [(str(e.get("field") or ""), str(e["message"])) for e in exc.detail.get("errors") or []
             if isinstance(e, Mapping) and e.get("message")]
    if "; ".join(message for _, message in found) == exc.message:
        return []
    told = f" {exc.message}"
    return [f"{field}: {message}" if field else message for field, message in found
            if f" {field}: {message}" not in told and f" {field}".rstrip() + f" {message}" not in told]


def fail(message: str, *more: str) -> NoReturn:
    """Ends the command with exit code 1."""
    complain(message, *more)
    raise typer.Exit(1)


def usage(message: str) -> NoReturn:
    """Ends the command with exit code 2."""
    raise typer.BadParameter(message)


def hush() -> None:
    """Nobody reads stdout any more: what is still buffered goes nowhere, without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
