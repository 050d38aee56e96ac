"""Kubernetes, a whole node: API server, controllers, scheduler, kubelet, kube-proxy, etcd, containerd, a bridge.

    with Kubernetes(tmp_path / "kubernetes") as cluster:
        cluster.kubectl("get", "nodes")           # or any client, with the kubeconfig that cluster.url names

It is a machine of its own on a wire: its processes, mounts, firewall and network are seen by nobody else and end with
it, so several run beside each other and beside Docker engines. Its API, pods (by their addresses) and services (by
theirs, and node ports at the node's) are reached from this machine, its pods reach this machine, and nothing beyond
either. Containers get their images from registries on this machine's loopback, by the references that were pushed:
``127.0.0.1:PORT/name@sha256:…``, without TLS. There is no DNS for services, and a pod with ``hostNetwork`` is in this
machine's network, not in the node's.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import kubernetes_build as programs
from . import kubernetes_node as node
from . import kubernetes_settings as settings
from .server import Server, began, needs, run

NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
API_PORT = 6443


class Kubernetes(Server):
    """``kill`` is a crash of the whole node: pods end too, and come back with it. ``url``: the administrator's
    kubeconfig."""

    name = "kubernetes"
    version = programs.VERSION
    start_s = 240.0
    stop_s = 60.0

    def __init__(self, folder: Path | None = None, port: int = 0) -> None:
        super().__init__(folder, port)
        self.port = self.port or API_PORT  # at the node's own address
        word = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        self.place = settings.Place(self.folder, word, self.port)

    @property
    def url(self) -> str:
        return str(self.place.kubeconfig("admin"))

    @classmethod
    def missing(cls) -> str:
        if os.geteuid() != 0:
            return "a Kubernetes node needs root to be started"
        if reason := programs.missing() or needs(unshare="util-linux has it", nsenter="util-linux has it"):
            return reason
        able = subprocess.run([*NAMESPACES, "--net", "mount", "--make-rshared", "/"], capture_output=True, text=True)
        return f"root may not make namespaces here: {able.stderr.strip()}" if able.returncode else ""

    @classmethod
    def installed(cls) -> bool:
        return programs.HOME.is_dir() and not needs(containerd="", runc="", iptables="", ip="")

    @classmethod
    def home(cls) -> Path:
        return programs.HOME

    @classmethod
    def _install(cls) -> None:
        programs.install()

    def kubectl(self, *arguments: str, seconds: float = 60.0) -> str:
        """What kubectl prints. StackError when it fails."""
        return run(*self.command(*arguments), seconds=seconds)

    def command(self, *arguments: str) -> list[str]:
        """That of kubectl, for this cluster."""
        return [str(self.home() / "kubectl"), f"--kubeconfig={self.url}", *arguments]

    def answers(self) -> bool:
        """The node takes pods, and the account that they run by is there. Its kubelet is asked itself too: what a node
        that was killed had said last is still written."""
        found = self._ask(f"/api/v1/nodes/{settings.NAME}")
        if not found or self._ask(f"/api/v1/nodes/{settings.NAME}/proxy/healthz") != b"ok":
            return False
        ready = any(one["type"] == "Ready" and one["status"] == "True"
                    for one in json.loads(found)["status"].get("conditions", ()))
        return ready and bool(self._ask("/api/v1/namespaces/default/serviceaccounts/default"))

    def stop(self) -> None:
        """As every server; with it go its pods, its networks and its groups of processes."""
        inside = self._inside()
        if inside is not None:  # who started it heeds no SIGTERM while that one runs
            with contextlib.suppress(ProcessLookupError):
                os.kill(inside, signal.SIGTERM)
        super().stop()
        self._ended(inside)

    def kill(self) -> None:
        inside = self._inside()
        super().kill()
        self._ended(inside)

    def _ask(self, path: str) -> bytes:
        """What the API server answers; nothing when it is no success."""
        trusted = ssl.create_default_context(cafile=self.place.pem("ca.crt"))
        trusted.load_cert_chain(self.place.pem("admin.crt"), self.place.pem("admin.key"))
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(
                http.client.HTTPSConnection(self.place.node, self.port, timeout=5, context=trusted)) as asked:
            asked.request("GET", path)
            answer = asked.getresponse()
            return answer.read() if answer.status == 200 else b""
        return b""

    def _prepare(self) -> None:
        from . import kubernetes_pki as pki  # it needs a package, which a machine that runs no node may lack

        pki.write(self.place.pki, settings.NAME, self.place.node, self.place.api)
        for name in pki.PROGRAMS:
            pki.kubeconfig(self.place.kubeconfig(name), self.place.pki, name, self.place.server,
                           f"modelyard-{self.place.word}")
        settings.write(self.place)

    def _command(self) -> Sequence[str]:
        return [*NAMESPACES, sys.executable, "-I", node.__file__, str(self.folder / "plan.json")]

    def _inside(self) -> int | None:
        """The node's first process, as this machine numbers it."""
        pid = self.pid()
        return next(iter(node.children(pid)), None) if pid is not None else None

    def _ended(self, inside: int | None) -> None:
        """Waits for the last of its processes: the first is gone when all are. Then for what the kernel takes away
        after them."""
        end = time.monotonic() + 30
        while inside is not None and began(inside) and time.monotonic() < end:
            time.sleep(0.02)
        subprocess.run(["ip", "link", "delete", self.place.link], check=False, capture_output=True)
        for group in node.cgroups(self.place.cgroup):
            while group.is_dir() and not _removed(group) and time.monotonic() < end:
                time.sleep(0.05)


def _removed(group: Path) -> bool:
    """Whether a group of processes, and those below it, could be removed: not while one of its processes is dying."""
    with contextlib.suppress(OSError):
        for folder, _, _ in os.walk(group, topdown=False):
            os.rmdir(folder)
        return True
    return False
