"""The floors: who may import whom, and who may hold a driver."""

import ast
import functools
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "services" / "modelyard"
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "wire" not in p.parts)

DRIVERS = {
    "sqlite3": ["adapters/*"],
    "aiokafka": ["adapters/*"],
    "motor": ["adapters/*"],
    "pymongo": ["adapters/*"],
    "docker": ["adapters/*"],
    "kubernetes": ["adapters/*"],
    "azure": ["adapters/*"],
    "faust": ["stream.py"],
    "grpc": ["scoring/*", "client/*", "wire/*"],
    "grpc_health": ["scoring/*"],
    "h2corn": ["scoring/transport_h2.py"],
    "grpc_reflection": ["scoring/*"],
    "aiohttp": ["kernel/*", "*/api.py", "client/*", "scoring/*", "adapters/*_http.py", "node.py"],
    "pydantic": ["core/*", "kernel/*", "client/*", "settings.py", "adapters/store_*", "registry/*", "image_builder/*",
                 "deployer/*", "telemetry/*", "cli/*", "node.py"],
    "cryptography": ["core/attest.py", "image_builder/keys.py"],
    "zlib_ng": ["core/segments.py"],
    "deflate": ["image_builder/tarring.py"],
    "typer": ["cli/*"],
    "rich": ["cli/*", "client/*"],
}
"""Third-party name → the files, below the package, that may import it."""


@functools.cache
def imports(path: Path) -> set[str]:
    """Top-level names of the absolute imports anywhere in a file, lazy ones included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_layers_hold() -> None:
    """As a program: inside this process it would disable every logger that other tests listen to."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("driver", DRIVERS)
def test_driver_stays_in_its_room(driver: str) -> None:
    strays = [
        str(path.relative_to(PACKAGE)) for path in SOURCES
        if driver in imports(path) and not any(fnmatch(str(path.relative_to(PACKAGE)), ok) for ok in DRIVERS[driver])
    ]
    assert strays == [], f"{driver} may be imported in {DRIVERS[driver]} only"


def test_nothing_imports_itself_by_its_full_name() -> None:
    """Inside the package imports are relative, so that a floor can be read off the number of dots."""
    strays = [str(p.relative_to(PACKAGE)) for p in SOURCES
              if "modelyard" in imports(p) and p.name not in ("launch.py", "__main__.py")]
    assert strays == []
