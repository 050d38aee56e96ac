"""The test suites inside of installed packages: an image goes without them, unless something in it imports them.

A suite is a folder ``tests`` within a package that has test modules in it. In NumPy, SciPy and scikit-learn alone they
are 1,500 files and 29 MB, a fifteenth of what an image is sent as.
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

NAME = "tests"
MODULE = re.compile(r"^(test_.*|.*_test|conftest)\.py$")
MENTIONED = re.compile(rb"^[^\n#]*(import[^\n]*|\.|[\"'])tests\b", re.MULTILINE)
"""Worth reading: most modules never say the word."""
DOTTED = re.compile(r"^\.*[A-Za-z_]\w*(\.\w+)*$")


def unused(root: Path) -> frozenset[str]:
    """The suites of everything that is installed in ``root`` that nothing outside of them imports, or could: folders,
    as RECORD writes them (``numpy/linalg/tests``). Blocking: reads every module."""
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(suite(name), []).append(name)
    left = {folder for folder, within in modules.items()
            if folder and any(MODULE.match(PurePosixPath(name).name) for name in within)}
    outside = [name for folder, within in modules.items() if folder not in left for name in within]
    while outside:  # what a suite imports that stays has to stay as well
        used = {folder for name in outside for folder in _imported(root, name)} & left
        left -= used
        outside = [name for folder in used for name in modules[folder]]
    return frozenset(left)


def suite(name: str) -> str:
    """The outermost folder ``tests`` that a file is in, below its package; "" where it is in none."""
    parts = name.split("/")[:-1]
    return "/".join(parts[:parts.index(NAME, 1) + 1]) if NAME in parts[1:] else ""


def _imported(root: Path, name: str) -> Iterator[str]:
    """The suites that a module imports, or names in a string as one would to import them."""
    tree = _importable(root, name) if MENTIONED.search((root / name).read_bytes()) else None
    package = name.split("/")[:-1]
    for node in ast.walk(tree) if tree is not None else ():
        for dotted in _modules(node, package):
            parts = dotted.split(".")
            folder = suite("/".join([*parts, ""]))
            if folder and not _broken(root, parts, folder.count("/") + 1):
                yield folder


def _broken(root: Path, parts: list[str], depth: int) -> bool:
    """Whether it is a module of a suite, ``depth`` names deep, that cannot be imported: most of them need pytest."""
    files = ["/".join(parts[:end]) + ".py" for end in range(depth + 1, len(parts) + 1)]
    return any((root / file).is_file() and _importable(root, file) is None for file in files)


def _importable(root: Path, name: str) -> ast.Module | None:
    """A module's code, or None where it is none (a template, or of another Python) or needs what is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse((root / name).read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return None
    return tree if all(_there(root, top) for top in _needed(tree)) else None


def _needed(tree: ast.Module) -> Iterator[str]:
    """What a module imports whenever it is imported: the first names of it."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def _there(root: Path, top: str) -> bool:
    """False where a module of this name is neither installed nor Python's own: who needs it cannot be imported."""
    return top in sys.stdlib_module_names or (root / top).is_dir() or any(root.glob(f"{top}.*"))


def _modules(node: ast.AST, package: list[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package[:len(package) + 1 - node.level] if node.level else []
        whole = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{whole}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.match(node.value):
        yield ".".join(package) + node.value if node.value.startswith(".") else node.value
