"""What ``modelyard deploy PATH`` finds at PATH: which files are code, which are the model, what they need."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import Invalid

ALONE = (".onnx", ".skops", ".ubj", ".pt", ".pt2", ".joblib", ".pkl", ".pickle")
"""Endings of files that are served without any code."""
PICKLES = (".joblib", ".pkl", ".pickle", ".pt2")
"""Endings of files that may run code when they are loaded."""
NOT_MODEL = (".py", ".md", ".rst", ".ipynb")
REQUIREMENTS = "requirements.txt"
DEPENDENCIES = (REQUIREMENTS, "pyproject.toml", "environment.yml", "environment.yaml")
"""What may say what a folder needs; the first that is there does."""


@dataclass(frozen=True)
class Found:
    """A model (file or folder), a scoring file (or folder with one), a file of dependencies; what is absent is None.
    ``unread`` are the names of further files of dependencies."""

    model: Path | None
    score: Path | None = None
    requirements: Path | None = None
    unread: tuple[str, ...] = ()


@contextmanager
def found(path: Path, trust: bool) -> Iterator[Found]:
    """Sorts what is at ``path``; parts of a folder that travel together lie in a temporary folder meanwhile.

    Raises Invalid, saying what is missing.
    """
    if path.is_file():
        yield _alone(path, trust)
        return
    if (path / "MLmodel").is_file() and not (path / "score.py").is_file():
        yield Found(path)
        return
    if not (path / "score.py").is_file():
        raise Invalid(
            f"there is no score.py in '{path}'; put one there (init() and run(data)), or give an MLflow folder or one "
            f"model file: {', '.join(ALONE)}", field="path")
    code, rest = _sorted(path)
    with tempfile.TemporaryDirectory(prefix="modelyard-deploy-") as stage:
        needs = _dependencies(path)
        yield Found(
            model=_together(path, rest, Path(stage) / "model"), score=_together(path, code, Path(stage) / "score"),
            requirements=needs[0] if needs else None, unread=tuple(file.name for file in needs[1:]))


def _dependencies(path: Path) -> list[Path]:
    """The files of a folder that say what it needs. A ``pyproject.toml`` without a project is the settings of tools."""
    from ..client.requirements import has_project

    there = [path / name for name in DEPENDENCIES if (path / name).is_file()]
    return [file for file in there if file.suffix != ".toml" or has_project(file)]


def _alone(path: Path, trust: bool) -> Found:
    if path.name == "score.py":
        return Found(None, score=path)
    if path.suffix.lower() not in ALONE:
        raise Invalid(
            f"'{path.name}' cannot be served alone; give {', '.join(ALONE)}, or a folder with score.py", field="path")
    if path.suffix.lower() in PICKLES and not trust:
        raise Invalid(
            f"loading '{path.name}' may run code that it holds; say --trust if it is yours, or save it with "
            f"{'torch.jit.save' if path.suffix.lower() == '.pt2' else 'skops'}",
            field="path")
    return Found(path)


def _sorted(path: Path) -> tuple[list[Path], list[Path]]:
    """(code, model files), relative to ``path``. Hidden files, caches, notes and dependencies are neither."""
    code, rest = [], []
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for name in sorted(files):
            file = (Path(folder) / name).relative_to(path)
            if name.endswith(".py"):
                code.append(file)
            elif name == REQUIREMENTS or str(file) in DEPENDENCIES:
                continue
            elif not name.startswith(".") and not name.lower().endswith(NOT_MODEL):
                rest.append(file)
    return code, rest


def _together(root: Path, files: Sequence[Path], stage: Path) -> Path | None:
    """Nothing, the only file where it is, or a folder with all of them (linked, not copied, where that works)."""
    if len(files) < 2:
        return root / files[0] if files else None
    for file in files:
        target = stage / file
        target.parent.mkdir(parents=True, exist_ok=True)
        source = (root / file).resolve()
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    return stage
