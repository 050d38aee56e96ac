"""Docker Engine from Debian's ``docker.io``: a dockerd of its own, with its own containerd, bridge and sockets.

It touches no firewall: ports are published by its userland proxy, on loopback, and containers reach this machine and
each other but nothing beyond. So several of them run beside each other, and beside one that the system has.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .server import Server, StackError, apt_install, can_apt, needs, run


class Docker(Server):
    """Data lies in the folder. Sockets lie in a short one under ``/run``: a socket's path has at most 107 bytes.

    ``kill`` is a crash: containers go on without an engine until it is started again. ``stop`` ends them all.
    """

    name = "docker"
    version = "20.10"
    start_s = 60.0
    stop_s = 40.0

    def __init__(self, folder: Path | None = None, port: int = 0) -> None:
        super().__init__(folder, port)
        self.word = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        self.short = Path(f"/run/modelyard-docker-{self.word}")
        self.socket = self.short / "docker.sock"
        self.bridge = f"mydk-{self.word}"

    @property
    def url(self) -> str:
        return f"docker://{self.socket}"

    @property
    def docker_host(self) -> str:
        """What Docker's own programs call it: for ``DOCKER_HOST``."""
        return f"unix://{self.socket}"

    @classmethod
    def missing(cls) -> str:
        if os.geteuid() != 0:
            return "the Docker Engine needs root to be started"
        return "" if cls.installed() else can_apt()

    @classmethod
    def installed(cls) -> bool:
        return not needs(dockerd="", containerd="", runc="")

    @classmethod
    def _install(cls) -> None:
        # the package would start an engine of its own at once; where there is no init system it only says so
        apt_install("docker.io", "iproute2", "iptables")
        if not cls.installed():
            raise StackError("docker: Debian's docker.io was installed and brought no dockerd")

    def start(self) -> Docker:
        if self.pid() is None:
            self._sweep_engine()
        super().start()
        return self

    def stop(self) -> None:
        """As every server; and of what a killed engine left behind nothing runs and nothing is mounted after it."""
        super().stop()
        self._sweep_engine()
        self._sweep_containers()
        self._unmount()
        run("sh", "-c", f"ip link show {self.bridge} >/dev/null 2>&1 && ip link delete {self.bridge} || true")
        shutil.rmtree(self.short, ignore_errors=True)

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as s, contextlib.suppress(OSError):
            s.settimeout(5.0)
            s.connect(str(self.socket))
            s.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in s.recv(64)
        return False

    def _prepare(self) -> None:
        self.short.mkdir(mode=0o755, exist_ok=True)
        # killed ones leave their pids behind; such a number may be another program's by now, or that of a process
        # which is dead and was not collected: either would be taken for one that runs
        for pid in ("docker.pid", "exec/containerd/containerd.pid"):
            (self.short / pid).unlink(missing_ok=True)
        first, _ = self._network()
        run("sh", "-c", f"ip link show {self.bridge} >/dev/null 2>&1 || ip link add name {self.bridge} type bridge")
        run("sh", "-c", f"ip addr replace {first} dev {self.bridge} && ip link set {self.bridge} up")

    def _command(self) -> Sequence[str]:
        _, pool = self._network()
        return ["dockerd", "--data-root", str(self.data), "--exec-root", str(self.short / "exec"),
                "--pidfile", str(self.short / "docker.pid"), "--host", self.docker_host,
                "--bridge", self.bridge, "--default-address-pool", f"base={pool},size=24", "--iptables=false",
                "--ip6tables=false", "--ip-masq=false", "--userland-proxy=true", "--shutdown-timeout", "10",
                "--log-level", "warn"]

    def _network(self) -> tuple[str, str]:
        """The bridge's own address, and where networks of its containers get theirs: other ones for every folder."""
        n = int(self.word, 16) % 2048
        head, tail = f"10.{128 + n // 16}", n % 16 * 16
        return f"{head}.{tail}.1/24", f"{head}.{tail}.0/20"

    def _sweep_engine(self) -> None:
        """A containerd that outlived its dockerd."""
        for pid, command in _processes():
            if f"{self.short}/exec/containerd/containerd.toml" in command:
                _end(pid)

    def _sweep_containers(self) -> None:
        """Containers go on when their engine is killed: each is a child of its shim."""
        for pid, command in _processes():
            if "containerd-shim" in command and f"{self.short}/exec/" in command:
                for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                    _end(int(child))
                _end(pid)

    def _unmount(self) -> None:
        ours = (f"{self.data}/", f"{self.short}/")
        mounts = [line.split()[1].replace("\\040", " ") for line in Path("/proc/mounts").read_text().splitlines()]
        for place in reversed([m for m in mounts if f"{m}/".startswith(ours)]):
            subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def _end(pid: int) -> None:
    """SIGKILL, and gone when it returns."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while _lives(pid) and time.monotonic() < until:
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
