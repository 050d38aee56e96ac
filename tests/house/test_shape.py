"""Sizes, names and the width of the doors."""

import ast
import functools
import inspect
import re
import statistics
from pathlib import Path

import pytest

from modelyard.ports import Port, blobs, builders, bus, images, store, targets

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "services" / "modelyard"
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "wire" not in p.parts)
FORBIDDEN = {"utils", "util", "common", "helpers", "base", "manager", "misc", "types"}
PORTS = [store.DocumentStore, bus.EventBus, blobs.BlobStore, blobs.CaptureGrants, images.ImageStore,
         builders.DockerfileBuilder, targets.DeploymentTarget]
KERNEL = {  # frozen: a new file here needs a decision record
    "__init__.py", "service.py", "run.py", "wakes.py", "relay.py", "loop.py", "consume.py", "dead.py", "letters.py",
    "observe.py", "web.py", "server.py", "call.py", "bodies.py", "paging.py", "problems.py", "guard.py",
    "idempotency.py", "forward.py", "feed.py", "health.py", "openapi.py", "folder.py",
    "cache.py", "proxies.py",
}
OUTSIDE = re.compile(  # what the project must not refer to: it explains itself
    r"\.\./shared|/work/|research/|BRIEF\.md|pypi\.org|files\.pythonhosted|registry\.npmjs|crates\.io|proxy\.golang"
    r"|repo1?\.maven|deb\.debian\.org", re.IGNORECASE)


@functools.cache
def functions(path: Path) -> list[tuple[str, int]]:
    """(name, lines without the docstring) of every function of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            start = (first.end_lineno or node.lineno) if documented else node.lineno
            found.append((f"{path.relative_to(PACKAGE)}:{node.name}", (node.end_lineno or start) - start))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_is_short_and_well_named(path: Path) -> None:
    assert path.read_text().count("\n") <= 400
    assert path.stem not in FORBIDDEN
    assert [name for name, lines in functions(path) if lines > 50] == []


def test_functions_are_short() -> None:
    lengths = [lines for path in SOURCES for _, lines in functions(path)]
    assert statistics.median(lengths) <= 10


@pytest.mark.parametrize("port", PORTS)
def test_port_is_narrow_and_promises(port: type[Port]) -> None:
    own = {name for name in port.__abstractmethods__ if name not in Port.__abstractmethods__}
    assert len(own) <= 5
    assert [name for name in own if not inspect.getdoc(getattr(port, name))] == []


def test_kernel_is_frozen() -> None:
    assert {p.name for p in (PACKAGE / "kernel").glob("*.py")} == KERNEL


def test_the_project_explains_itself() -> None:
    tops = [top for top in ROOT.iterdir() if top.name not in {".git", ".venv", ".stack", ".hypothesis"}]
    texts = [p for top in tops for p in (top, *top.rglob("*")) if p.is_file()
             and p.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".json", ".proto", ""}
             and "__pycache__" not in p.parts and not any(part.endswith("_cache") for part in p.parts)]
    strays = [str(p.relative_to(ROOT)) for p in texts
              if p != Path(__file__) and OUTSIDE.search(p.read_text(errors="replace"))]
    assert strays == []
