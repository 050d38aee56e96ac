"""An image made here is a pod's image: by its digest, from the registry that it was pushed to, with no rights."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from infra.stack import debian
from infra.stack.kubernetes import Kubernetes
from infra.stack.registry import Registry
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.backends import need, server
from tests.e2e import models
from tests.e2e.test_journey import RETRY, build, infer, register
from tests.e2e.yard import Yard, until

pytestmark = pytest.mark.slow
READY_S, GRACE_S = 120, 30
LIMITED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
           "seccompProfile": {"type": "RuntimeDefault"}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    """The stack's, which other tests may have, or one for this file."""
    need("kubernetes")
    shared = Kubernetes()
    if server("kubernetes") == shared.url:
        yield shared
        return
    with Kubernetes(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    need("registry")
    with Registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(scope="module")
def reference(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the pod's image is called: built and pushed by a yard that is gone when the pod begins."""
    if reason := debian.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("pod-yard")
    yard = Yard.start("all-in-one", folder / "data", MODELYARD_IMAGES=f"{registry.url}/yard")
    try:
        model = register(yard, models.save_iris(folder / "iris.skops"), name="iris", framework="scikit-learn")
        image = build(yard, name="iris-scorer", models=[model["id"]], base=f"oci-layout://{debian.base()}:latest")
        assert image["phase"] == "ready", image
    finally:
        left = yard.stop()
    assert left == []
    return f"127.0.0.1:{registry.port}/yard/iris-scorer@{image['digest']}"


@pytest.fixture(scope="module")
def pod(cluster: Kubernetes, reference: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of one that is ready, under the strictest of the cluster's own rules for pods."""
    space = f"pods-{re.sub('[^a-z0-9]', '', tmp_path_factory.getbasetemp().name)}"
    rules = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    create(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space, "labels": rules}})
    try:
        until(lambda: cluster.kubectl("-n", space, "get", "serviceaccounts", "-o", "name").strip(), 30)
        container = {
            "name": "iris", "image": reference, "securityContext": LIMITED,
            "ports": [{"containerPort": 8080}, {"containerPort": 8081}],
            "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": 8080}, "periodSeconds": 1},
            "livenessProbe": {"grpc": {"port": 8081}, "periodSeconds": 5, "initialDelaySeconds": 5},
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}
        create(cluster, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "iris", "namespace": space}, "spec": {
            "automountServiceAccountToken": False, "restartPolicy": "Never", "securityContext": {"runAsNonRoot": True},
            "terminationGracePeriodSeconds": GRACE_S, "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {"medium": "Memory"}}]}})
        until(lambda: ready(cluster, space), READY_S, every=0.3, why=cluster.kubectl("-n", space, "describe", "pods"))
        yield space
    finally:
        cluster.kubectl("delete", "namespace", space, "--wait=false")


def create(cluster: Kubernetes, thing: dict[str, Any]) -> None:
    done = subprocess.run(cluster.command("create", "-f", "-"), input=json.dumps(thing), capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr


def status(cluster: Kubernetes, space: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.kubectl("-n", space, "get", "pod", "iris", "-o", "json"))["status"]
    return found


def ready(cluster: Kubernetes, space: str) -> bool:
    now = status(cluster, space)
    assert now["phase"] in ("Pending", "Running"), cluster.kubectl("-n", space, "logs", "iris")
    return any(one["type"] == "Ready" and one["status"] == "True" for one in now.get("conditions", ()))


@contextlib.contextmanager
def forwarded(cluster: Kubernetes, space: str, folder: Path) -> Iterator[str]:
    """The pod's gRPC address on this machine's loopback."""
    told = folder / "forwarded"
    with told.open("wb") as out:
        program = subprocess.Popen(cluster.command("-n", space, "port-forward", "pod/iris", ":8081"), stdout=out,
                                   stderr=out, stdin=subprocess.DEVNULL)
    try:
        found = until(lambda: re.search(r"from (127\.0\.0\.1:\d+) ->", told.read_text()), 30)
        yield found[1]
    finally:
        program.terminate()
        program.wait(10)


def test_a_pod_answers_a_real_call(cluster: Kubernetes, pod: str, reference: str, tmp_path: Path) -> None:
    from sklearn.datasets import load_iris

    flowers = load_iris().data[::10]
    with forwarded(cluster, pod, tmp_path) as address, grpc.insecure_channel(address, RETRY) as channel:
        answer = infer(GRPCInferenceServiceStub(channel), flowers)
    assert answer.model_name == "iris" and list(answer.outputs[0].shape) == [len(flowers)]
    expected = models.iris(200).predict(np.asarray(flowers, np.float32))
    assert np.frombuffer(answer.raw_output_contents[0], np.int64).tolist() == expected.tolist()
    (one,) = status(cluster, pod)["containerStatuses"]
    assert one["imageID"] == reference and one["restartCount"] == 0


def test_it_has_no_rights(cluster: Kubernetes, pod: str) -> None:
    """Seen from inside: another user than root, no capability, and nothing that it could write."""
    told = cluster.kubectl("-n", pod, "exec", "iris", "--", "cat", "/proc/1/status")
    fields = dict(re.findall(r"^(\w+):\s*(\S*)", told, re.MULTILINE))
    assert fields["Uid"] != "0" and int(fields["CapBnd"], 16) == int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"
    wrote = subprocess.run(cluster.command("-n", pod, "exec", "iris", "--", "touch", "/opt/modelyard/new"),
                           capture_output=True, text=True, timeout=60)
    assert wrote.returncode != 0 and "Read-only file system" in wrote.stderr


def test_it_leaves_when_it_is_told_to(cluster: Kubernetes, pod: str) -> None:
    """Deleted while a log of it is followed: by SIGTERM within its grace, and without a word of an error."""
    following = subprocess.Popen(cluster.command("-n", pod, "logs", "iris", "--follow"), stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True)
    watching = subprocess.Popen(cluster.command(
        "-n", pod, "get", "pod", "iris", "--watch", "--output-watch-events", "-o",
        "jsonpath={.type} {.object.status.containerStatuses[0].state.terminated.exitCode}{\"\\n\"}"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert watching.stdout is not None and watching.stdout.readline().startswith("ADDED")
        cluster.kubectl("-n", pod, "delete", "pod", "iris", "--wait=true", f"--timeout={GRACE_S + 60}s",
                        seconds=GRACE_S + 90)
        log = following.communicate(timeout=30)[0]
        watching.terminate()
        seen = watching.communicate(timeout=30)[0].split("\n")
    finally:
        for program in (following, watching):
            program.kill()
    assert "MODIFIED 0" in seen, seen  # 137: killed, for its grace was over
    assert "modelyard: ready after" in log and "draining" in log and "Traceback" not in log, log
