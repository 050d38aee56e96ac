"""What serves a model where no scoring file does: found in its files where its name and framework do not tell; what
that needs; and the signature that the image gives it. Texts are parsed; nothing is loaded.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from packaging.requirements import Requirement

from ..core import archives
from ..core.errors import Invalid
from ..core.requirements import logical, requirement
from ..core.signatures import Signature, differences, normal, one_row, together
from ..core.torch_files import exported, scripted
from .checks import PICKLE_TORCH
from .model import ModelInput
from .parts import NEEDS
from .sources import Source
from .tarring import CHUNK, opened

LOOKED = frozenset({"mlflow", "pytorch"})
"""Flavours whose files are looked into when they are built."""
MLFLOW = {"model.onnx": "onnx", "model.lgb": "lightgbm", "model.ubj": "xgboost", "model.xgb": "xgboost",
          "model.skops": "skops", "model.pkl": "pickle"}
ROWS = frozenset({"skops", "pickle", "lightgbm", "lightgbm-pickle", "xgboost", "xgboost-pickle"})
"""Flavours that take one array of numbers, of any type."""
PYFUNC = {"mlflow-skinny", "numpy", "pandas"}
FUNCTION = ("is loaded by MLflow's python_function, which runs code that its folder holds; register it with trusted: "
            "true if it is yours")
NOT_TORCH = ("is neither TorchScript nor an exported program: save it with torch.jit.script(model).save or "
             "torch.export.save, or give a score.py that loads it")
CUDA = ("PyTorch comes from the package index with CUDA, gigabytes of it; where there is no GPU, ask for a build for "
        "CPUs (requirements: torch==2.9.1+cpu, say) and tell the builder where it is: UV_INDEX, or UV_FIND_LINKS for a "
        "folder of wheels")


@dataclass(frozen=True)
class Served:
    """What serves a model (``kind``: a flavour, or ``pyfunc``), what that needs, and why it cannot be served."""

    kind: str
    needs: frozenset[str] = frozenset()
    problems: Sequence[str] = ()


def look(kind: str, model: ModelInput, source: Source) -> Served:
    """Into the files of a model whose flavour is one of ``LOOKED``. Blocking."""
    found = _mlflow(model, source) if kind == "mlflow" else _torch(model, source)
    return Served(found.kind, found.needs, [f"model '{model.id}' {why}" for why in found.problems])


def signature(model: ModelInput, kind: str) -> tuple[Signature | None, list[str]]:
    """What the image says that the model takes and gives, and where what was registered is not what its file says."""
    given, found = normal(model.signature), normal(model.file_signature)
    if kind in ROWS:
        given, found = given and one_row(given), found and one_row(found)
    if given is None or found is None:
        return given or found, []
    problems = differences(given, found, any_number=kind in ROWS)
    return together(found, given), [f"model '{model.id}': its signature is not its file's: {why}; register it again, "
                                    "without a signature or with the file's" for why in problems]


# -- MLflow -----------------------------------------------------------------------------------------------------------


def _mlflow(model: ModelInput, source: Source) -> Served:
    """By the file that a flavour leaves, else by python_function. The folder's own requirements are taken: without
    MLflow where our server does not need it, else of MLflow the part that scores."""
    names: set[str] = set()
    texts: dict[str, str] = {}
    try:
        with opened(source) as file:
            for entry, content in archives.entries(file):
                names.add(entry.name)
                if entry.name in ("requirements.txt", "MLmodel") and entry.size < CHUNK:
                    texts[entry.name] = b"".join(content).decode(errors="replace")
    except Invalid as exc:
        return Served("", problems=[exc.message])
    listed = {requirement(line)[0] for _, line in logical(texts.get("requirements.txt", ""))} - {""}
    kind = next((kind for name, kind in MLFLOW.items() if name in names), None)
    if kind == "pickle" and not model.trusted:
        return Served(kind, problems=["holds model.pkl, a pickle, and loading one may run code; register it with "
                                      "trusted: true if it is yours"])
    if kind is not None:
        return Served(kind, frozenset(NEEDS[kind] | {line for line in listed if not line.startswith("mlflow")}))
    said = _yaml(texts.get("MLmodel", ""))
    if "python_function" not in (said.get("flavors") or ()):
        return Served("", problems=[f"is an MLflow folder with none of {', '.join(MLFLOW)} and no python_function; "
                                    "give a score.py"])
    if not model.trusted:
        return Served("pyfunc", problems=[FUNCTION])
    return Served("pyfunc", frozenset(_function_needs(listed, str(said.get("mlflow_version") or ""))))


def _yaml(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _function_needs(listed: set[str], version: str) -> set[str]:
    """MLflow's server, tracking and user interface are no part of scoring: mlflow-skinny of the same version is."""
    wanted = {line: Requirement(line) for line in listed}
    out = {line for line, one in wanted.items() if one.name.lower() not in ("mlflow", "mlflow-skinny")}
    asked = {str(one.specifier) for one in wanted.values() if one.name.lower() in ("mlflow", "mlflow-skinny")} - {""}
    pinned = asked or ({f"=={version}"} if re.fullmatch(r"\d+(\.\d+)+", version) else set())
    return out | PYFUNC | {f"mlflow-skinny{said}" for said in pinned}


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def _torch(model: ModelInput, source: Source) -> Served:
    """TorchScript, or an exported program; of a zip only the directory is read."""
    try:
        with opened(source) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        names = []
    if exported(names):
        return Served("pytorch", problems=() if model.trusted else [PICKLE_TORCH])
    return Served("pytorch") if scripted(names) else Served("", problems=[NOT_TORCH])
