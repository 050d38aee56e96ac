"""A base image without an image registry: Debian bookworm with its own Python 3.11.

As `modelyard images base --debian` makes it:

    python -m infra.stack.debian       # prints the folder: an OCI layout with the tag `latest`

Made once and kept beside the downloads.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from modelyard.cli.debian import EPOCH, MACHINES, PACKAGES, Recipe, machine, make
from modelyard.cli.debian_image import KEPT, LEFT_OUT, SOURCES
from modelyard.core.errors import ModelyardError

from .server import CACHE, StackError, apt_install, can_apt, needs

__all__ = ["EPOCH", "KEPT", "LEFT_OUT", "MACHINES", "PACKAGES", "SOURCES", "base", "home", "missing"]
VERSION = "bookworm-3"


def missing() -> str:
    """Why it cannot be had on this machine; "" when it can, or is there."""
    if home().is_dir():
        return ""
    if os.geteuid() != 0:
        return "a Debian root file system needs root to be made"
    return "" if not needs(mmdebstrap="") else can_apt()


def home() -> Path:
    """Where it is kept."""
    return CACHE / f"debian-{VERSION}-{machine()}"


def base() -> Path:
    """The OCI layout folder, with the tag ``latest``; made when it is not there (20-60 s). StackError when it cannot
    be. Two at once: one waits for the other."""
    if home().is_dir():
        return home()
    if reason := missing():
        raise StackError(f"debian: {reason}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "debian.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home().is_dir():
            _make()
    return home()


def _make() -> None:
    if needs(mmdebstrap=""):
        apt_install("mmdebstrap")
    try:
        make(home(), Recipe(), lambda text: None)
    except ModelyardError as exc:
        raise StackError(f"debian: {exc.message}") from exc


if __name__ == "__main__":
    try:
        print(base())
    except StackError as exc:
        sys.exit(str(exc))
