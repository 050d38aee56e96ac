"""What an image's models take and give, and a line to try them, for people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from .show import table

LONGEST = 1000
"""A sample of more characters is not shown on a line."""


def described(image: Mapping[str, Any], deployment: str = "DEPLOYMENT") -> Iterator[str]:
    """Lines about the signatures of an image's document, and about its samples."""
    rows = [(id if first else "", *row) for id, signature in (image.get("signatures") or {}).items()
            for first, row in _slots(signature)]
    if rows:
        yield ""
        yield table(rows, ("model", "", "name", "datatype", "shape", "columns"))
    for id, sample in (image.get("samples") or {}).items():
        yield from _sample(id, sample, alone=len(image.get("models") or ()) == 1, deployment=deployment)


def _slots(signature: Mapping[str, Any]) -> Iterator[tuple[bool, tuple[Any, ...]]]:
    """(whether it is the first, its cells)."""
    given = [("takes", slot) for slot in signature.get("inputs") or ()]
    given += [("gives", slot) for slot in signature.get("outputs") or ()]
    for number, (verb, slot) in enumerate(given):
        shape = str(slot["shape"]) if "shape" in slot else ""
        columns = slot.get("columns") or []
        named = ", ".join(columns[:8]) + (f" … ({len(columns)})" if len(columns) > 8 else "")
        yield number == 0, (verb, slot["name"], slot.get("datatype"), shape, named)


def _sample(id: str, sample: Any, *, alone: bool, deployment: str) -> Iterator[str]:
    said = json.dumps(sample, ensure_ascii=False)
    if len(said) > LONGEST:
        yield f"sample of {id}: {len(said)} characters; --output json shows it"
    elif alone:
        yield f"try     {score_line(deployment, sample)}"
    else:
        yield f"sample of {id}: {said}"


def score_line(deployment: str, sample: Any) -> str:
    """What to type."""
    return f"modelyard score {deployment} --data {shlex.quote(json.dumps(sample, ensure_ascii=False))}"
