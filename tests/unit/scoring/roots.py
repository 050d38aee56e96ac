"""Image roots made by hand, and replicas started from them as the target starts them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SERVICES = Path(__file__).parents[3] / "services"


def make_root(folder: Path, score: str | None = None, models: Sequence[Mapping[str, Any]] = ()) -> Path:
    """``<folder>/opt/modelyard`` with image.json, launch.py, the library and the models; returns that folder.

    Each model: ``name``, ``version``, ``file`` (a file or folder to copy), and more fields of image.json.
    """
    root = folder / "opt" / "modelyard"
    root.mkdir(parents=True)
    (root / "lib").symlink_to(SERVICES)
    shutil.copy(SERVICES / "modelyard" / "scoring" / "launch.py", root / "launch.py")
    packages = folder / "opt/env/lib" / f"python3.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    entries = []
    for model in models:
        fields = dict(model)
        file: Path = fields.pop("file")
        path = f"models/{fields['name']}/{fields['version']}/{file.name}"
        (root / path).parent.mkdir(parents=True)
        (shutil.copytree if file.is_dir() else shutil.copy)(file, root / path)
        entries.append(
            {"framework": None, "framework_version": None, "trusted": False, "properties": {}, **fields, "path": path}
        )
    if score is not None:
        (root / "score").mkdir()
        (root / "score" / "score.py").write_text(score)
    (root / "image.json").write_text(
        json.dumps(
            {
                "format": 1,
                "python": f"3.{sys.version_info[1]}",
                "score": "score/score.py" if score is not None else None,
                "models": entries,
            }
        )
    )
    return root


@dataclass
class Replica:
    """One real scoring server process with its three sockets."""

    process: subprocess.Popen[bytes]
    grpc: str
    http: str
    admin: str
    log: Path
    started: float = field(default_factory=time.monotonic)

    def get(self, path: str, base: str = "") -> tuple[int, bytes]:
        """GET over the admin port, or another address."""
        try:
            with urllib.request.urlopen(f"http://{base or self.admin}{path}", timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read()

    def wait_ready(self, seconds: float = 40) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"exited {self.process.returncode}: {self.log.read_text()}")
            with contextlib.suppress(OSError):
                if self.get("/readyz")[0] == 200:
                    return
            time.sleep(0.02)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def stop(self, seconds: float = 26) -> tuple[int, float]:
        """SIGTERM; (exit status, seconds it took)."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds), time.monotonic() - began


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    import socket

    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def command(root: Path) -> list[str]:
    """As the target starts it: the base Python, isolated, without site packages of its own."""
    return [getattr(sys, "_base_executable", sys.executable), "-I", "-S", str(root / "launch.py")]


@contextlib.contextmanager
def launch(
    root: Path,
    *,
    wait: bool = True,
    env: Mapping[str, str] | None = None,
    spool: Path | None = None,
    limits: Mapping[str, int] | None = None,
    deployment: str = "flower",
    image: str = "iris-scorer:7",
    capture: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Replica]:
    """A replica; killed at the end if it still runs."""
    ports = [f"127.0.0.1:{port}" for port in free_ports(3)]
    log = root.parent / "replica.log"
    given = ["serve", "--grpc", ports[0], "--http", ports[1], "--admin", ports[2], *arguments]
    if spool is not None:
        given += ["--spool", str(spool)]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*command(root), *given],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={
                "PATH": os.environ["PATH"],
                "MODELYARD_DEPLOYMENT": deployment,
                "MODELYARD_IMAGE": image,
                "MODELYARD_LIMITS": json.dumps(limits or {}),
                "MODELYARD_CAPTURE": json.dumps(capture or {}),
                "OMP_NUM_THREADS": "1",
                **(env or {}),
            },
        )
    replica = Replica(process, *ports, log)
    try:
        if wait:
            replica.wait_ready()
        yield replica
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
