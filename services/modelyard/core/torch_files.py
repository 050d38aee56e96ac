"""What a zip of PyTorch's is, told by the names in its directory. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence

PROGRAM = re.compile(r"([^/]+/)?serialized_exported_program\.json")
MODELS = re.compile(r"([^/]+/)?models/[^/]+\.json")
SCRIPT = re.compile(r"([^/]+)/constants\.pkl")


def exported(names: Sequence[str]) -> str:
    """The entry that holds the graph of an exported program (``torch.export.save``), or "": in the form of 2.1 to 2.7,
    or in the archives of later ones."""
    return next((name for form in (PROGRAM, MODELS) for name in sorted(names) if form.fullmatch(name)), "")


def scripted(names: Sequence[str]) -> str:
    """The folder that a TorchScript module lies in (``torch.jit.save``), or ""."""
    roots = (found[1] for name in names if (found := SCRIPT.fullmatch(name)))
    return next((root for root in roots if any(name.startswith(f"{root}/code/") for name in names)), "")
