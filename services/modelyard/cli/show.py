"""What a command prints: a table, JSON or YAML on stdout; progress on stderr, moving only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from ..client import Progress

Document = Mapping[str, Any]
Column = str | tuple[str, Callable[[Document], Any]]
"""A field's name, or a heading and what stands below it."""


class Format(StrEnum):
    """How documents are printed."""

    table = "table"
    json = "json"
    yaml = "yaml"


def _cell(value: Any) -> str:
    if value is None or value == "" or value == {} or value == []:
        return "-"
    if isinstance(value, Mapping):
        return ",".join(f"{k}={_cell(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ",".join(_cell(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).replace("\n", " ")


def table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> str:
    """Columns in line, two spaces between, no frame: it reads well and pipes well."""
    cells = [[h.upper().replace("_", " ") for h in head], *([_cell(v) for v in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def documents(items: Sequence[Document], columns: Sequence[Column], output: Format, kind: str = "") -> None:
    """A list of documents; YAML ones can be given to ``modelyard apply -f``."""
    if output is Format.json:
        print(json.dumps(list(items), indent=2, ensure_ascii=False, default=str))
    elif output is Format.yaml:
        print("---\n".join(_yaml(item, kind) for item in items), end="")
    elif not items:
        print("nothing there", file=sys.stderr)
    else:
        pairs = [(c, lambda d, c=c: d.get(c)) if isinstance(c, str) else c for c in columns]
        print(table([[get(item) for _, get in pairs] for item in items], [name for name, _ in pairs]))


def document(item: Document, output: Format, kind: str = "") -> None:
    """One document: a line for each field, or JSON, or YAML."""
    if output is Format.json:
        print(json.dumps(item, indent=2, ensure_ascii=False, default=str))
    elif output is Format.yaml:
        print(_yaml(item, kind), end="")
    else:
        width = max((len(k) for k in item), default=0)
        for key, value in item.items():
            if value not in (None, "", {}, []):
                _field(key, value, width)


def _field(key: str, value: Any, width: int) -> None:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        for line in value:
            print(f"{key:<{width}}  {_cell(line)}")
    else:
        print(f"{key:<{width}}  {_cell(value)}")


def _yaml(item: Document, kind: str) -> str:
    import yaml

    body = {"kind": kind, **item} if kind else dict(item)
    text: str = yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
    return text


def size(count: int) -> str:
    """Bytes for people: ``12.3 kB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("GB returns")


class Steps:
    """Long work on stderr: a moving line on a terminal, a plain line per step in a pipe.

    Give the object itself to the SDK as ``on_progress``.
    """

    def __init__(self) -> None:
        self._moving = sys.stderr.isatty()
        self._status: Any = None
        self._text = ""
        self._told = ""

    def __enter__(self) -> Self:
        if self._moving:
            from rich.console import Console

            self._status = Console(stderr=True, highlight=False).status("")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def start(self, text: str) -> None:
        """The next step begins."""
        self._text, self._told = text, ""
        self._tell(text)

    def done(self, text: str) -> None:
        """A line that stays."""
        if self._status is not None:
            from rich.text import Text

            self._status.console.print(Text.assemble(("✓ ", "green"), text))
        else:
            print(text, file=sys.stderr, flush=True)

    def doing(self, text: str) -> None:
        """What the step is at."""
        self._tell(f"{self._text}: {text}")

    def __call__(self, progress: Progress) -> None:
        """How far the SDK is."""
        if progress.message:
            self.doing(progress.message)
        elif self._status is not None and progress.total:
            percent = 100 * progress.done // progress.total
            self._tell(f"{self._text}: {progress.stage} {percent} % of {size(progress.total)}")

    def _tell(self, text: str) -> None:
        if text == self._told:
            return
        self._told = text
        if self._status is not None:
            from rich.markup import escape

            self._status.update(escape(text))
        else:
            print(f"{text} …", file=sys.stderr, flush=True)
