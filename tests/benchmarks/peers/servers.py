"""Servers on one core, each with one model: ours on both transports, the echo, the peers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.peers import install, processes
from tests.benchmarks.peers.install import ROOT, NotHere, one_line
from tests.benchmarks.peers.models import Model
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.peers.wires import Wire, Wrong, over_grpc, over_rest
from tests.unit.scoring.roots import SERVICES, command, free_ports, make_root

START_S = 60.0
KNOCK_S, ASK_S = 0.005, 0.05
"""A server that does not listen yet is asked often, which costs it nothing; one that loads its model seldom, for it
would answer instead of loading."""
SPOOL_BYTES = 16 << 30
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
         "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}


@dataclass
class Server:
    """``started``: the processes; ``wires``: how it may be asked. ``admin``, ``spool`` and ``replicas``, how each of
    several is asked: ours only."""

    label: str
    started: list[subprocess.Popen[bytes]]
    wires: dict[str, Wire]
    log: Path
    began: float = field(default_factory=time.monotonic)
    admin: str = ""
    spool: Path | None = None
    replicas: list[Wire] = field(default_factory=list)
    first_s: float = 0.0
    """From the start to the first right answer."""

    @property
    def pids(self) -> list[int]:
        return [pid for process in self.started for pid in processes.tree(process.pid)]

    def wait(self, seconds: float = START_S) -> None:
        """Until the first right answer, of each replica. Raises NotHere."""
        for wire in self.replicas or [self.wires.get("grpc") or self.wires["rest"]]:
            self._wait(wire, seconds)

    def _wait(self, wire: Wire, seconds: float) -> None:
        host, _, port = wire.address.rpartition(":")
        last = "it does not listen"
        while time.monotonic() < self.began + seconds:
            pause = KNOCK_S
            if any(process.poll() is not None for process in self.started):
                raise NotHere(f"it ended: {self.last_words()}")
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 0.5):
                pause = ASK_S
                try:
                    wire.check()
                    self.first_s = time.monotonic() - self.began
                    return
                except (OSError, Wrong, ValueError, KeyError) as exc:
                    last = one_line(str(exc))
            time.sleep(pause)
        raise NotHere(f"no right answer within {seconds:.0f} s: {last}")

    def last_words(self) -> str:
        return one_line(self.log.read_text(errors="replace")) if self.log.exists() else "it says nothing"

    def stop(self) -> None:
        for process in self.started:
            processes.end(process)

    def clear_spool(self) -> None:
        """Closed segments away, as a shipper would take them."""
        for path in sorted(self.spool.iterdir())[:-1] if self.spool else ():
            path.unlink(missing_ok=True)

    def counted(self) -> tuple[int, int]:
        """(calls answered, calls recorded) so far, as our own server counts them."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        calls = [line for line in lines if line.startswith("modelyard_scoring_calls_total") and 'model=""' not in line]
        recorded = [line for line in lines if line.startswith("modelyard_scoring_capture{") and '"recorded"' in line]
        return _sum(calls), _sum(recorded)


def ours(model: Model, folder: Path, transport: str, *, capture: bool = False, replicas: int = 1,
         cores: str = processes.SERVER) -> Server:
    """Our scoring server as the local target starts it; several replicas with an address each. Raises NotHere."""
    root = make_root(folder, None, [{"name": model.name, "version": 1, "file": model.file, "trusted": True,
                                     "framework": model.framework}])
    packages, here = install.scoring().parent.parent / "lib", next((folder / "opt" / "env").rglob("here.pth"))
    here.write_text(f"{next(packages.glob('*/site-packages'))}\n")
    started, addresses = [], []
    admin = http = ""
    spool = folder / "spool" if capture else None
    for n in range(replicas):
        grpc, http, admin = (f"127.0.0.1:{port}" for port in free_ports(3))
        addresses.append(grpc)
        told = ["serve", "--grpc", grpc, "--http", http, "--admin", admin,
                "--transport", transport, *(["--spool", str(spool)] if spool else [])]
        env = {**_env(), "MODELYARD_DEPLOYMENT": "flower", "MODELYARD_IMAGE": "iris-scorer:7",
               "MODELYARD_REPLICA": str(n), "MODELYARD_CAPTURE": json.dumps({"enabled": capture}),
               "MODELYARD_SPOOL_BYTES": str(SPOOL_BYTES)}
        started.append(processes.start([*command(root), *told], env, folder / "log", cores))
    each = [over_grpc(address, model) for address in addresses]
    return Server(f"modelyard {transport}", started, {"grpc": each[0], "rest": over_rest(http, model)}, folder / "log",
                  admin=admin, spool=spool, replicas=each if replicas > 1 else [])


def echo(model: Model, folder: Path, transport: str) -> Server:
    """The floor of one of our transports."""
    (port,) = free_ports(1)
    env = {**_env(), "PYTHONPATH": f"{SERVICES}:{ROOT}"}
    process = processes.start([sys.executable, "-m", "tests.benchmarks.peers.echo", transport, str(port)], env,
                              folder / "log")
    return Server(f"echo {transport}", [process], {"grpc": over_grpc(f"127.0.0.1:{port}", model)}, folder / "log")


def other(peer: Peer, model: Model, folder: Path) -> Server:
    """A peer, installed when it is not. Raises NotHere."""
    python = install.install(peer)
    grpc, http = free_ports(2)
    name = peer.name
    env = {**_env(), "PYTHONPATH": str(ROOT), **peer.env}
    process = processes.start([str(python), "-m", f"tests.benchmarks.peers.{name}", model.name, str(model.file),
                               str(grpc), str(http), str(folder)], env, folder / "log")
    wires = {"grpc": over_grpc(f"127.0.0.1:{grpc}", model)} if peer.grpc else {}
    wires["rest"] = over_rest(f"127.0.0.1:{http}", model, peer.rest, peer.rows_in)
    return Server(peer.label, [process], wires, folder / "log")


def _sum(lines: Sequence[str]) -> int:
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


def _env() -> Mapping[str, str]:
    return {**QUIET, "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


def fresh(folder: Path) -> Path:
    """An empty folder of this name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

