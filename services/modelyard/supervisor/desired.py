"""What the deployer wants of this supervisor: one JSON file, always replaced as a whole."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Desired:
    """``template`` is all that a replica is started from: when it changes, replicas roll; when only ``replicas``
    or ``generation`` do, the running ones are kept."""

    workspace: str
    name: str
    generation: int
    replicas: int
    progress_deadline_s: float
    template: dict[str, Any]

    @classmethod
    def of(cls, body: dict[str, Any]) -> Desired:
        return cls(body["workspace"], body["name"], body["generation"], body["replicas"],
                   body["progress_deadline_s"], body["template"])

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The object in the file, or None when there is no file or it was cut."""
    try:
        body = json.loads(Path(path).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def write_json(path: str | Path, body: dict[str, Any]) -> None:
    """Replaces the file: a reader sees the old or the new one, never a part. Only its owner may read it."""
    beside = f"{path}.new"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w") as out:
        json.dump(body, out)
    os.replace(beside, path)


def in_bytes(memory: str | None) -> int | None:
    """``512Mi`` → 536870912."""
    if not memory:
        return None
    for unit, size in UNITS.items():
        if memory.endswith(unit):
            return int(memory.removesuffix(unit)) * size
    return int(memory)
