"""A deployment's folder on this machine, and the programs that are started for it. Blocking: call from a thread."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import Invalid, Unavailable

START_S = 30.0
SHIP_S = 120.0
OURS = ("MODELYARD_TOKEN", "MODELYARD_SERVICE_TOKEN")
"""Of our environment, what no child may see."""


def private_folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "w") as out:
        out.write(text)
    beside.rename(path)


def write_run(run: Path, desired: Mapping[str, Any], grant: str) -> None:
    try:
        private_folder(run / "spool")
        if grant:
            _write(run / "spool" / "grant", grant)
        _write(run / "desired.json", json.dumps(desired))
    except OSError as exc:
        raise Unavailable(f"{run} cannot be written: {exc}") from exc


def start(run: Path, name: str) -> None:
    """Returns when a supervisor listens. It is nobody's child: it goes on when we end."""
    env = {k: v for k, v in os.environ.items() if k not in OURS}
    try:
        done = subprocess.run([sys.executable, "-P", "-m", f"{__package__.partition('.')[0]}.supervisor", str(run)],
                              env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=START_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Unavailable(f"the supervisor of '{name}' cannot be started: {exc}") from exc
    if done.returncode == 0:
        return
    why = _first_object(done.stdout)
    if why.get("error") == "port":
        raise Invalid(f"port {why['port']} of the deployment '{name}' is in use by another program; end that program, "
                      "or delete the deployment and create it again on other ports", code="port-in-use",
                      port=why["port"])
    said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    raise Unavailable(f"the supervisor of '{name}' did not start: {why.get('error') or said}")


def _first_object(raw: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        body = json.loads(raw)
        if isinstance(body, dict):
            return body
    return {}


def wait_free(run: Path, within_s: float) -> None:
    """Returns when no supervisor holds the folder any more. Unavailable when it takes too long."""
    until = time.monotonic() + within_s
    while not is_free(run):
        if time.monotonic() > until:
            raise Unavailable(f"the supervisor in {run} does not end")
        time.sleep(0.05)


def is_free(run: Path) -> bool:
    try:
        with open(run / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def ship(run: Path, name: str) -> None:
    """Captured calls that the shipper had no time for. They are never deleted: Unavailable when they must wait."""
    spool = run / "spool"
    if not any(spool.glob("*.seg")) and not any(spool.glob("*.live")):
        return
    command = [sys.executable, "-P", "-m", f"{__package__.partition('.')[0]}.scoring", "ship", "--spool", str(spool)]
    try:
        done = subprocess.run([*command, "--once"], stdin=subprocess.DEVNULL, capture_output=True, timeout=SHIP_S,
                              check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Unavailable(f"captured calls of '{name}' cannot be shipped: {exc}") from exc
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise Unavailable(f"captured calls of '{name}' cannot be shipped yet, so its folder stays: {said}")


def delete(run: Path) -> None:
    """Gone at once for everybody who looks, then from the disk."""
    elsewhere = (read_json(run / "sockets.json") or {}).get("path", "")
    if Path(elsewhere).name.startswith("modelyard-"):
        shutil.rmtree(elsewhere, ignore_errors=True)
    doomed = run.with_name(f".{run.name}.{secrets.token_hex(4)}")
    try:
        run.rename(doomed)
    except OSError as exc:
        raise Unavailable(f"{run} cannot be removed: {exc}") from exc
    shutil.rmtree(doomed, ignore_errors=True)


def digests_in_use(runs: Path) -> set[str]:
    """Of the images that are wanted, or serve while the wanted one is on its way or was given up."""
    bodies = [body for run in runs.glob("*/*")
              for body in (read_json(run / "desired.json"), (read_json(run / "state.json") or {}).get("good"))]
    return {body["template"]["digest"] for body in bodies if body}


def roots_in_use(runs: Path) -> set[Path]:
    used: set[Path] = set()
    for run in runs.glob("*/*"):
        desired, state = read_json(run / "desired.json"), read_json(run / "state.json") or {}
        wanted = [body["template"]["root"] for body in (desired, state.get("good")) if body]
        used |= {Path(root) for root in [*wanted, *state.get("roots", ())]}
    return used

