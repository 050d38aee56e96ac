"""The programs of a Kubernetes node where no package has them: its own from source, etcd and CNI plugins from Debian.

    python -m infra.stack.kubernetes_build      # prints the folder with the programs

Built once, in 5 to 10 minutes on two cores; what they are built from (4 GB) is deleted, the programs (500 MB) are kept
beside the other downloads.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from .debian import MACHINES
from .server import CACHE, StackError, apt_install, can_apt, needs, run

VERSION = "1.34.4"
HOME = CACHE / f"kubernetes-{VERSION}"
MODULE = "k8s.io/kubernetes"
STAGED = re.compile(r"^\s*(k8s\.io/[a-z0-9-]+) => \./staging/", re.MULTILINE)
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
PLUGINS = ("bridge", "host-local", "loopback", "portmap")
UNPACKED = ("etcd-server", "containernetworking-plugins")
"""Taken out of their packages, not installed: the first would start a server of its own wherever there is systemd."""
PAUSE = "modelyard.dev/pause:1"
PAUSE_GO = """package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	<-ended
}
"""
FREE_GB = 7
TELL_S = 60.0
BUILD_S = 3600.0


def missing() -> str:
    """Why they cannot be had on this machine; "" when they can, or are there."""
    if HOME.is_dir():
        return ""
    return needs(go="install Go 1.24 or newer, which builds Kubernetes", **{
        "dpkg-deb": "only Debian and its kin have it"}) or can_apt()


def build() -> None:
    """Makes ``HOME`` whole, or leaves nothing. StackError when it cannot."""
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free / 1e9
    if free < FREE_GB:
        raise StackError(f"kubernetes: the build needs {FREE_GB} GB in {CACHE}, where {free:.0f} GB are free")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".kubernetes-") as name:
        folder = Path(name)
        made = folder / "made"
        made.mkdir()
        _unpack(folder / "packages", made)
        _compile(folder, made)
        (made / "pause.tar").write_bytes(pause(made / "pause"))
        told = run(str(made / "kubelet"), "--version").split()[-1]
        if told != f"v{VERSION}":
            raise StackError(f"kubernetes: the kubelet that was built says it is {told}, not v{VERSION}")
        made.rename(HOME)


def _unpack(folder: Path, made: Path) -> None:
    folder.mkdir()
    try:
        run("apt-get", "download", "-qq", *UNPACKED, cwd=folder)
    except StackError:
        run("apt-get", "update", "-qq")
        run("apt-get", "download", "-qq", *UNPACKED, cwd=folder)
    for package in folder.glob("*.deb"):
        run("dpkg-deb", "--extract", str(package), str(folder / "root"))
    shutil.copy(folder / "root/usr/bin/etcd", made / "etcd")
    (made / "cni").mkdir()
    for plugin in PLUGINS:
        shutil.copy(folder / "root/usr/lib/cni" / plugin, made / "cni" / plugin)


def _compile(folder: Path, made: Path) -> None:
    source = folder / "source"
    (source / "pause").mkdir(parents=True)
    (source / "pause" / "main.go").write_text(PAUSE_GO)
    env = {**os.environ, "GOMODCACHE": str(folder / "modules"), "GOCACHE": str(folder / "compiled"),
           "GOFLAGS": "-modcacherw -mod=mod -buildvcs=false", "GOTOOLCHAIN": "auto", "GOWORK": "off",
           "CGO_ENABLED": "0"}
    (source / "go.mod").write_text("module modelyard.dev/node\n\ngo 1.24.0\n")
    found = json.loads(run("go", "mod", "download", "-json", f"{MODULE}@v{VERSION}", cwd=source, env=env))
    (source / "go.mod").write_text(go_mod(Path(found["GoMod"]).read_text()))
    major, minor, _ = VERSION.split(".")
    said = {"k8s.io/component-base/version.gitVersion": f"v{VERSION}", "k8s.io/component-base/version.gitMajor": major,
            "k8s.io/component-base/version.gitMinor": minor, "k8s.io/client-go/pkg/version.gitVersion": f"v{VERSION}"}
    flags = " ".join(["-s -w", *(f"-X {name}={value}" for name, value in said.items())])
    _go_build(source, env, "-v", "-trimpath", "-ldflags", flags, "-o", f"{made}/",
              "./pause", *(f"{MODULE}/cmd/{program}" for program in PROGRAMS))


def go_mod(theirs: str) -> str:
    """A module of one's own: ``go install`` refuses one whose go.mod replaces modules by folders. Each is replaced by
    the release of the same version instead."""
    staged = STAGED.findall(theirs)
    if not staged:
        raise StackError(f"kubernetes: the go.mod of {MODULE} v{VERSION} names no staged module")
    version = f"v0.{VERSION.partition('.')[2]}"
    return "\n".join(["module modelyard.dev/node", "", "go 1.24.0", "godebug default=go1.24", "",
                      f"require {MODULE} v{VERSION}", "",
                      *(f"replace {name} => {name} {version}" for name in staged), ""])


def _go_build(source: Path, env: Mapping[str, str], *arguments: str) -> None:
    """Tells on the way how far it is: ten silent minutes look like a program that hangs."""
    began = told = time.monotonic()
    _say(f"compiling v{VERSION}: 5 to 10 minutes on two cores, once on this machine")
    with tempfile.TemporaryFile() as log:
        go = subprocess.Popen(["nice", "-n", "10", "go", "build", *arguments], cwd=source, env=env, stdout=log,
                              stderr=log, stdin=subprocess.DEVNULL)
        try:
            while go.poll() is None:
                now = time.monotonic()
                if now - began > BUILD_S:
                    raise StackError(f"kubernetes: go build did not end within {BUILD_S:.0f} s")
                if now - told > TELL_S:
                    told = now
                    _say(f"{_lines(log)} packages after {(now - began) / 60:.0f} min")
                time.sleep(0.5)
        finally:
            if go.poll() is None:
                go.terminate()
                go.wait()
        if go.returncode:
            log.seek(0)
            raise StackError(f"kubernetes: go build failed:\n{log.read().decode(errors='replace')[-2000:]}")


def _lines(log: io.BufferedRandom | object) -> int:
    """How many packages were compiled so far; the program writes on in the same file."""
    fd = log.fileno()  # type: ignore[attr-defined]
    text = os.pread(fd, os.fstat(fd).st_size, 0)
    return sum(not line.startswith(b"go:") for line in text.splitlines())


def _say(what: str) -> None:
    print(f"kubernetes: {what}", file=sys.stderr, flush=True)


def pause(program: Path) -> bytes:
    """The image that holds a pod's namespaces, as ``ctr images import`` takes it: one file."""
    layer = _tar({"pause": (0o755, program.read_bytes())})
    config = json.dumps({"architecture": MACHINES.get(platform.machine(), platform.machine()), "os": "linux",
                         "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
                         "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
                         }).encode()
    index = [{"Config": "config.json", "RepoTags": [PAUSE], "Layers": ["layer.tar"]}]
    return _tar({"config.json": (0o644, config), "layer.tar": (0o644, layer),
                 "manifest.json": (0o644, json.dumps(index).encode())})


def _tar(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, (mode, data) in files.items():
            info = tarfile.TarInfo(name)
            info.mode, info.size = mode, len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def install() -> None:
    """The programs, and those that come with packages which the Docker engine brings too."""
    if needs(containerd="", runc="", iptables="", ip=""):
        apt_install("containerd", "runc", "iptables", "iproute2")
    if not HOME.is_dir():
        build()


if __name__ == "__main__":
    try:
        install()
        print(HOME)
    except StackError as exc:
        sys.exit(str(exc))
