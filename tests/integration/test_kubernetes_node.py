"""The stack's Kubernetes node is a machine of its own: two are beside each other, a crash is a crash, and none leaves
anything behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.stack.kubernetes import Kubernetes
from infra.stack.kubernetes_build import PAUSE
from infra.stack.kubernetes_node import cgroups, children
from infra.stack.server import began
from tests.backends import need
from tests.e2e.yard import until

pytestmark = pytest.mark.slow
GLOBAL = ("/run", "/var/lib", "/var/log")
TUNED = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    need("kubernetes")
    with Kubernetes(tmp_path_factory.mktemp("node")) as found:
        yield found


def machine() -> dict[str, Any]:
    """What a node that is on this machine itself would change."""
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True).stdout
    return {"kubernetes' chains": sorted({line for line in rules.splitlines() if line.startswith(":KUBE")}),
            "settings": [Path("/proc/sys", name).read_text() for name in TUNED],
            "folders": {place: sorted(name for name in os.listdir(place) if "kube" in name or "cni" in name)
                        for place in GLOBAL}}


def left(node: Kubernetes, namespace: str) -> list[str]:
    """What there is of it on this machine."""
    found = [str(group) for group in cgroups(node.place.cgroup) if group.exists()]
    found += [link for link in os.listdir("/sys/class/net") if link == node.place.link]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if f" {node.folder}/" in line]
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            ours = process.name.isdigit() and os.readlink(process / "ns/pid") == namespace
            if ours and began(int(process.name)):  # not what is dead and only not collected by its parent yet
                found.append((process / "cmdline").read_text())
    return found


def inside(node: Kubernetes) -> str:
    """The namespace of all its processes."""
    pid = node.pid()
    assert pid is not None
    (first,) = children(pid)
    return os.readlink(f"/proc/{first}/ns/pid")


def test_two_beside_each_other_and_nothing_left_of_one(node: Kubernetes, tmp_path: Path) -> None:
    before = machine()
    with Kubernetes(tmp_path / "other") as other:
        namespace = inside(other)
        assert left(other, namespace), "the test sees what it looks for"
        other.kubectl("create", "namespace", "there")
        assert "there" not in node.kubectl("get", "namespaces") and "there" in other.kubectl("get", "namespaces")
        assert machine() == before
    assert left(other, namespace) == [] and machine() == before
    assert node.answers()


def test_a_crash_takes_all_and_a_start_brings_it_back(node: Kubernetes) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "lasting"}, "spec": {
        "containers": [{"name": "pause", "image": PAUSE, "imagePullPolicy": "Never"}]}}
    subprocess.run(node.command("create", "-f", "-"), input=json.dumps(pod), check=True, capture_output=True,
                   text=True, timeout=60)
    namespace, container = inside(node), until(lambda: running(node), 60, why="the pod runs")
    node.kill()
    assert left(node, namespace) == []
    node.start()
    until(lambda: running(node) not in ("", container), 90, why="another container of the same pod runs")


def running(node: Kubernetes) -> str:
    """The container of the pod that runs; "" when none does."""
    status = json.loads(node.kubectl("get", "pod", "lasting", "-o", "json"))["status"]
    return next((one["containerID"] for one in status.get("containerStatuses", ()) if "running" in one["state"]), "")
