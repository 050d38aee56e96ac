"""What runs as the first process of a node: it lays out a machine of its own, starts the programs, and ends them.

    unshare --mount --pid --fork --kill-child --mount-proc python3 -I kubernetes_node.py plan.json

It has its own processes, mounts and network: whatever the node does to ``/run``, ``/var/lib``, the firewall and the
kernel's settings is seen by nobody else, and all of it ends with this process, however that ends. A wire joins its
network to this machine's. Only containerd stays in this machine's network: it pulls from registries on its loopback.
Standard library only; it imports nothing of the stack.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HIDDEN = ("/run", "/var/lib", "/var/log")
"""Empty ones take their place."""
BOUND = {"kubelet": "/var/lib/kubelet", "containerd": "/var/lib/containerd", "pods": "/var/log/pods"}
"""Below the folder's data → where it lies here: kept over restarts, and short, for sockets are made in them."""
TUNED = {"vm/overcommit_memory": 1, "vm/panic_on_oom": 0, "kernel/panic": 10, "kernel/panic_on_oops": 1,
         "kernel/keys/root_maxkeys": 1000000, "kernel/keys/root_maxbytes": 25000000}
"""What a kubelet sets for the whole machine where it is otherwise: here it finds it so, on files over the real ones."""
CONTAINERD = "/run/containerd/containerd.sock"
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
UP_S = 150.0
PODS_S = 8.0
END_S = 6.0
CLONE_NEWNET = 0x40000000


class Node:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.data, self.home = Path(plan["data"]), Path(plan["home"])
        self.logs = Path(plan["logs"])
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    # -- a machine of its own -----------------------------------------------------------------------------------------

    def lay_out(self) -> None:
        run("mount", "--make-rshared", "/")
        self._hide()
        for name, place in BOUND.items():
            (self.data / name).mkdir(parents=True, exist_ok=True)
            Path(place).mkdir(parents=True)
            run("mount", "--bind", str(self.data / name), place)
        for name, value in TUNED.items():
            file = self.data / "tuned" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
            if Path("/proc/sys", name).exists():
                run("mount", "--bind", str(file), f"/proc/sys/{name}")
        for place in cgroups(self.plan["cgroup"]):
            place.mkdir(exist_ok=True)

    def _hide(self) -> None:
        kept = [Path(path) for path in self.plan["keep"] if path.startswith(tuple(f"{h}/" for h in HIDDEN))]
        held = [(path, os.open(path, os.O_PATH | os.O_DIRECTORY)) for path in kept]
        for place in HIDDEN:
            run("mount", "-t", "tmpfs", "-o", "mode=755", "node", place)
        for path, fd in held:
            path.mkdir(parents=True)
            run("mount", "--no-canonicalize", "--bind", f"/proc/self/fd/{fd}", str(path), pass_fds=(fd,))
            os.close(fd)

    def connect(self) -> None:
        """The node's network, and the wire to it: (this machine's end) ``link``, (the node's) ``wire``."""
        link, ours, node = self.plan["link"], self.plan["ours"], self.plan["node"]
        run("ip", "netns", "add", "node")
        subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True, env=ENV)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "wire", "netns", "node")
        run("ip", "address", "add", f"{ours}/24", "dev", link)
        run("ip", "link", "set", link, "up")
        for command in (("link", "set", "lo", "up"), ("address", "add", f"{node}/24", "dev", "wire"),
                        ("link", "set", "wire", "up"), ("route", "add", "default", "via", ours)):
            run("ip", "-n", "node", *command)
        for network in self.plan["networks"]:
            run("ip", "route", "replace", network, "via", node, "dev", link)

    def move(self) -> None:
        """This process, and what it starts from now on, is in the node's network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/run/netns/node") as found:
            if libc.setns(found.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    # -- its programs -------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        with (self.logs / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(self.plan["programs"][name], env={**ENV, **self.plan["env"]},
                                                  stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/",
                                                  start_new_session=True)

    def bring_up(self) -> None:
        self.start("containerd")
        self.move()
        self.start("etcd")
        self.wait("etcd", lambda: accepts("127.0.0.1", 2379))
        self.start("kube-apiserver")
        self.wait("containerd", self._holds_pause)
        self.wait("kube-apiserver", self._serves)
        for name in ("kubelet", "kube-controller-manager", "kube-scheduler", "kube-proxy"):
            self.start(name)
        say("all programs are started")

    def _holds_pause(self) -> bool:
        done = subprocess.run(["ctr", "-a", CONTAINERD, "-n", "k8s.io", "images", "import",
                               str(self.home / "pause.tar")], capture_output=True, env=ENV, timeout=60)
        return done.returncode == 0

    def _serves(self) -> bool:
        trusted = ssl.create_default_context(cafile=self.plan["ca"])
        with contextlib.suppress(OSError):
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}),
                                                 urllib.request.HTTPSHandler(context=trusted))
            with direct.open(f"{self.plan['server']}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        return False

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + UP_S
        while not ready():
            self.check()
            if time.monotonic() > end:
                raise Ended(f"{name} does not answer after {UP_S:.0f} s", self.logs / f"{name}.log")
            time.sleep(0.1)

    def check(self) -> None:
        """Ended when a program has ended; else what other programs left behind is collected."""
        for name, process in self.running.items():
            if process.poll() is not None:
                raise Ended(f"{name} ended with {process.returncode}", self.logs / f"{name}.log")
        ours = {process.pid for process in self.running.values()}
        for pid in children(os.getpid()):
            if pid not in ours:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def end(self) -> None:
        """Pods are told first, by SIGTERM, with nobody left who would start them again; etcd after who writes to it."""
        self._finish(["kubelet"])
        told = list(pods())
        for pid in told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + PODS_S
        while set(told) & set(pods()) and time.monotonic() < end:
            time.sleep(0.05)
        self._finish(["kube-proxy", "kube-scheduler", "kube-controller-manager", "kube-apiserver"])
        self._finish(["etcd", "containerd"])

    def _finish(self, names: list[str]) -> None:
        processes = [self.running[name] for name in names if name in self.running]
        for process in processes:
            process.terminate()
        end = time.monotonic() + END_S
        for process in processes:
            try:
                process.wait(max(end - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Ended(Exception):
    def __init__(self, why: str, log: Path) -> None:
        with contextlib.suppress(OSError):
            why += f"; the end of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        super().__init__(why)


class Stopped(Exception):
    """SIGTERM."""


def cgroups(name: str) -> Iterator[Path]:
    """The group of a name in every hierarchy that there is."""
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        yield root / name
        return
    for hierarchy in sorted({path.resolve() for path in root.iterdir() if path.is_dir()}):
        yield hierarchy / name


def pods() -> Iterator[int]:
    """The processes that shims started: containers', those that hold a pod's namespaces included."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if b"containerd-shim" in (entry / "cmdline").read_bytes().split(b"\0")[0]:
                    yield from children(int(entry.name))


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for task in Path(f"/proc/{pid}/task").iterdir()
                for word in (task / "children").read_text().split()]
    return []


def accepts(host: str, port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1.0)
        return s.connect_ex((host, port)) == 0


def run(*argv: str, pass_fds: tuple[int, ...] = ()) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV, pass_fds=pass_fds, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def stopped(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


def main() -> int:
    """0 when it was told to end; 1 when a program ended by itself."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # who started it may have blocked some
    signal.signal(signal.SIGTERM, stopped)
    node = Node(json.loads(Path(sys.argv[1]).read_text()))
    try:
        node.lay_out()
        node.connect()
        node.bring_up()
        while True:
            node.check()
            time.sleep(0.5)
    except Stopped:
        say("stopping")
        node.end()
        return 0
    except (Ended, RuntimeError, OSError) as exc:
        say(str(exc))
        return 1


if __name__ == "__main__":
    sys.exit(main())
