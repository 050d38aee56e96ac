"""What an MLflow folder says of itself: the signature in its ``MLmodel``, and its input example as a sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from ..core.signatures import Signature, fitting, normal

MOST_MLMODEL = 256 * 1024
MOST_EXAMPLE = 4 << 20
Read = Callable[[str, int], bytes | None]
"""A file of the folder, unless it is larger than so many bytes or is not there."""


def scan(read: Read) -> tuple[Signature | None, Any]:
    """(signature, sample), each None where there is none. Raises what a hostile YAML or JSON makes its parser raise."""
    raw = read("MLmodel", MOST_MLMODEL)
    said = yaml.safe_load(raw) if raw is not None else None
    if not isinstance(said, Mapping):
        return None, None
    about = said.get("saved_input_example_info")
    return normal(said.get("signature")), fitting(_sample(read, about)) if isinstance(about, Mapping) else None


def _sample(read: Read, about: Mapping[str, Any]) -> Any:
    """The example as a body of ``/score``: rows and their columns, ``{"data": array}``, or arrays by name."""
    raw = read(str(about.get("artifact_path")), MOST_EXAMPLE)
    if raw is None:
        return None
    found = json.loads(raw)
    if about.get("type") == "dataframe" and isinstance(found, dict):
        return {key: found[key] for key in ("columns", "data") if key in found}
    if about.get("type") != "ndarray":
        return None
    if isinstance(found, dict):
        return found.get("inputs", found)
    return {"data": found}
