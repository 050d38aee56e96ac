"""Docker Compose, built from its source as a Go module: a program for ``docker-compose.yml`` where no package has it.

    python -m infra.stack.compose      # prints the program's path

It needs no ``docker`` command beside it. Only the program is kept, beside the other downloads.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
import tempfile
from pathlib import Path

from .server import CACHE, StackError, needs, run

VERSION = "2.40.3"
MODULE = "github.com/docker/compose/v2"
GO_MOD = f"module modelyard.dev/compose\n\ngo 1.24\n\nrequire {MODULE} v{VERSION}\n"
"""A module of one's own: ``go install`` refuses one whose go.mod excludes versions."""
MAIN = f'package compose\n\nimport _ "{MODULE}/cmd/compose"\n'


def missing() -> str:
    """Why it cannot be had on this machine; "" when it can, or is there."""
    return "" if home().is_file() else needs(go="install Go 1.24 or newer, which builds Docker Compose")


def home() -> Path:
    """The program."""
    return CACHE / f"compose-{VERSION}" / "docker-compose"


def program() -> Path:
    """The program, built when it is not there (1 to 4 minutes). StackError when it cannot be. Two at once: one waits
    for the other."""
    if home().is_file():
        return home()
    if reason := missing():
        raise StackError(f"compose: {reason}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "compose.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home().is_file():
            _build()
    return home()


def _build() -> None:
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".compose-") as name:
        folder = Path(name)
        source, made = folder / "source", folder / "made"
        source.mkdir()
        (source / "go.mod").write_text(GO_MOD)
        (source / "compose.go").write_text(MAIN)
        # what it is built from is of no use afterwards: writable, so that it can be deleted with the folder
        env = {"GOMODCACHE": str(folder / "modules"), "GOFLAGS": "-modcacherw -mod=mod -buildvcs=false",
               "CGO_ENABLED": "0", "GOTOOLCHAIN": "auto", "GOWORK": "off"}
        run("nice", "go", "build", "-trimpath", "-o", str(made / "docker-compose"),
            "-ldflags", f"-s -w -X {MODULE}/internal.Version=v{VERSION}", f"{MODULE}/cmd", cwd=source, env=env)
        told = run(str(made / "docker-compose"), "version", "--short").strip()
        if told.lstrip("v") != VERSION:
            raise StackError(f"compose: the program that was built says it is {told}, not {VERSION}")
        shutil.rmtree(home().parent, ignore_errors=True)
        made.rename(home().parent)


if __name__ == "__main__":
    try:
        print(program())
    except StackError as exc:
        sys.exit(str(exc))
