"""Peers' environments: one each, by uv, outside the tree, named after what is in it, so made once."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.peers.peer import Peer
from tests.unit.scoring.roots import SERVICES

ROOT = SERVICES.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelyard-bench"
NAMES = ("kserve", "mlserver", "mlflow", "bentoml", "litserve", "pytriton")
SAME = ("scikit-learn", "onnxruntime", "joblib")
"""Everybody predicts with the versions that this environment has."""
INSTALL_S = 900


class NotHere(Exception):
    """In one line, why a peer cannot be measured."""


def find(name: str) -> Peer:
    peer: Peer = importlib.import_module(f"tests.benchmarks.peers.{name}").PEER
    return peer


def install(peer: Peer) -> Path:
    """The Python of the peer's environment, made when it is not there. Raises NotHere."""
    return _environment(peer.name, peer.version, [*peer.packages, *_models()])


def scoring() -> Path:
    """The same for our scoring server: what an image has and no more, for a library that finds another one imports it.
    Raises NotHere."""
    packages = (SERVICES / "modelyard" / "scoring" / "requirements.txt").read_text().splitlines()
    return _environment("modelyard", "here", [*packages, *_models()], (ROOT / "constraints.txt").read_text())


def _models() -> list[str]:
    return [f"{name}=={importlib.metadata.version(name)}" for name in SAME]


def _environment(name: str, version: str, wanted: Sequence[str], constraints: str = "") -> Path:
    digest = hashlib.sha256("\n".join([sys.version, *wanted, constraints]).encode()).hexdigest()[:8]
    home = CACHE / f"{name}-{version}-{digest}"
    python, done = home / "bin" / "python", home / ".installed"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            print(f"installing {name} {version} into {home} …", flush=True)
            shutil.rmtree(home, ignore_errors=True)
            _uv("venv", "--quiet", "--python", getattr(sys, "_base_executable", sys.executable), str(home))
            kept = home / "constraints.txt"
            kept.write_text(constraints)
            _uv("pip", "install", "--quiet", "--python", str(python), "--constraint", str(kept), *wanted)
            done.write_text("\n".join(wanted) + "\n")
    return python


def _uv(*arguments: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    try:
        ran = subprocess.run(["nice", "-n", "15", str(uv), *arguments], capture_output=True, text=True,
                             timeout=INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NotHere(f"uv {arguments[0]}: {exc}") from exc
    if ran.returncode:
        raise NotHere(f"uv {arguments[0]}: {' '.join(ran.stderr.split())[:300]}")


def one_line(text: str, length: int = 160) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:length] if lines else "it says nothing"


def h2load() -> str:
    """The load generator; on Debian, as root, it is installed when it is missing. Raises NotHere."""
    if not (found := shutil.which("h2load")) and shutil.which("apt-get") and os.geteuid() == 0:
        _apt(("update",), ("install", "--no-install-recommends", "nghttp2-client"))
        found = shutil.which("h2load")
    if not found:
        raise NotHere("h2load is not here: install it (Debian and Ubuntu: apt-get install nghttp2-client)")
    return found


def _apt(*commands: Sequence[str]) -> None:
    for command in commands:
        subprocess.run(["apt-get", "-qq", "-y", *command], check=False, timeout=INSTALL_S,
                       env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
