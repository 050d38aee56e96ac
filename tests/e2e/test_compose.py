"""`docker compose up`, on a real engine: the file as it is, our own image built from a wheel of this tree, and for
images of others stand-ins of the same names made from the real servers (infra/stack/standins.py)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import grpc
import numpy as np
import pytest

from infra.stack import compose, standins
from infra.stack.docker import Docker
from infra.stack.server import free_port
from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.backends import need, required
from tests.e2e.composed import Caller, Stack, ask, call, checkout, settle
from tests.e2e.test_journey import RETRY
from tests.e2e.test_readme import blocks, commands
from tests.e2e.yard import until

pytestmark = pytest.mark.slow

OURS = {"registry", "image-builder", "deployer", "telemetry", "stream"}
SERVERS = {"kafka", "mongo", "azurite", "images", "prometheus"}
BASE = "python:3.11-slim"
IMAGES = ("apache/kafka:4.1.1", "mongo:6.0", "modelyard-azurite:3.37.0", "registry:2", "prom/prometheus:v3.5.0", BASE)
CALLS = 10
UP = commands(blocks("compose"))[1].removeprefix("docker compose ").split()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    need("docker")
    for missing in (compose.missing(), standins.missing()):
        if missing:
            (pytest.fail if "docker" in required() else pytest.skip)(missing)
    with Docker(tmp_path_factory.mktemp("engine") / "docker") as server:
        yield server


@pytest.fixture(scope="module")
def stack(engine: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All of it up and healthy; nothing of it runs afterwards, whatever happened."""
    names = ("KAFKA", "MONGO", "AZURITE", "IMAGES", "PROMETHEUS", "REGISTRY", "IMAGE_BUILDER", "DEPLOYER", "TELEMETRY",
             "STREAM")
    ports: dict[str, int] = {}
    while len(set(ports.values())) < len(names):
        ports = {name: free_port() for name in names}
    here = checkout(tmp_path_factory.mktemp("compose"))
    stack = Stack(here, engine, ports)
    subprocess.run(["sh", "infra/docker/wheels.sh"], cwd=here, env={**os.environ, "PYTHON": sys.executable}, check=True,
                   timeout=300)
    standins.build(engine, IMAGES)
    folder = Path(tempfile.mkdtemp(prefix="yard-", dir="/tmp"))
    try:
        settle(stack, folder, commands(blocks("compose"))[0])
        began = time.monotonic()
        stack.compose(*UP)
        print(f"\nbuilt and up in {time.monotonic() - began:.0f} s")
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "60", check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def base(stack: Stack) -> str:
    """A base image in the yard's own registry, as the README puts it there."""
    client = docker.DockerClient(stack.server.docker_host)
    name = f"127.0.0.1:{stack.ports['IMAGES']}/bases/python"
    client.images.get(BASE).tag(name, "3.11-slim")
    told = client.images.push(name, "3.11-slim")
    assert "error" not in told, told
    client.close()
    return f"{name}:3.11-slim"


def infer(stub: GRPCInferenceServiceStub) -> list[float]:
    x = np.array([[1, 2, 3]], np.float32)
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=x.shape)
    ask = pb.ModelInferRequest(model_name="adder", inputs=[tensor], raw_input_contents=[x.tobytes()])
    answer = stub.ModelInfer(ask, timeout=20)
    assert answer.outputs[0].datatype == "BYTES", "a list is answered as JSON, behind its length"
    return [float(n) for n in json.loads(answer.raw_output_contents[0][4:])]


def test_without_a_token_nothing_is_started(stack: Stack) -> None:
    refused = stack.compose("up", "--detach", check=False, env=False)
    assert refused.returncode != 0 and "sh infra/compose/env.sh" in refused.stderr


def test_all_of_it_is_up_and_listens_on_loopback_only(stack: Stack) -> None:
    running = stack.running()
    assert set(running) == OURS | SERVERS
    for name, about in running.items():
        for binding in about["NetworkSettings"]["Ports"].values():
            assert {one["HostIp"] for one in binding or ()} <= {"127.0.0.1"}, name
        assert name in SERVERS or about["Config"]["User"] == "10001:10001"
    assert ask(f"{stack.url}/readyz")[0] == 200 and ask(f"{stack.url}/v1/models")[0] == 401


def test_the_journey(stack: Stack, base: str) -> None:
    """The README's lines, with the base that this test has."""
    deploy, score, events = [line for line in commands(blocks("composed")) if line.startswith("modelyard")]
    stack.user(re.sub(r"--base \S+", f"--base {base}", deploy))
    assert "6" in stack.user(score)
    assert "built" in stack.user(events)
    with stack.client() as yard:
        service = yard.deployments.get("adder")
        assert service.score([[1, 2, 3]]) == [6.0]
        ends = service.document["endpoints"]
        for _ in range(CALLS):
            status, body = ask(f"{ends['rest']}/score", {"data": [[1, 2, 3]]})
            assert (status, json.loads(body)) == (200, [6.0])
        with grpc.insecure_channel(ends["grpc"], RETRY) as channel:
            assert infer(GRPCInferenceServiceStub(channel)) == [6.0]
        until(lambda: yard.capture("adder").read().num_rows == CALLS + 3, 60, 0.5, "every call is captured")
        assert set(yard.capture("adder").read().column("status").to_pylist()) == {"OK"}


def test_prometheus_scrapes_every_service(stack: Stack) -> None:
    def up() -> bool:
        status, body = ask(f"http://127.0.0.1:{stack.ports['PROMETHEUS']}/api/v1/targets?state=active")
        found = {t["labels"]["service"]: t["health"] for t in json.loads(body)["data"]["activeTargets"]}
        assert status == 200 and set(found) == OURS
        return set(found.values()) == {"up"}

    until(up, 60, 0.5, "every target is up")


@pytest.mark.parametrize("way", ["restarted", "killed"])
def test_a_deployer_brings_its_deployments_back(stack: Stack, way: str) -> None:
    """They end with its container (drained, if it was told to stop), and are on the same address with the next one."""
    with stack.client() as yard:
        rows = yard.capture("adder").read
        before, known = yard.deployments.get("adder").document, rows().num_rows
        with Caller(before["endpoints"]["rest"]) as caller:
            for verb in (("restart",) if way == "restarted" else ("kill", "start")):
                stack.compose(verb, "deployer")
            until(lambda: caller.away, 90, 0.1, "the address answers again")
        after = until(lambda: (d := yard.deployments.get("adder").document)["phase"] == "healthy" and d, 60)
        assert (after["endpoints"], after["generation"]) == (before["endpoints"], before["generation"])
        print(f"\ndeployer {way}: the address was away {caller.away:.1f} s; calls: {caller.told}")
        assert set(caller.told) <= {"200", "refused", *({"cut"} if way == "killed" else {})}
        until(lambda: rows().num_rows >= known + caller.told["200"], 60, 0.5, "every answered call is captured")
    verify = json.loads(ask(f"{stack.url}/v1/capture/adder/verify", token=stack.token)[1])
    assert "gaps" not in [process["state"] for process in verify["processes"]]


def test_an_engine_that_starts_again_brings_all_of_it_back(stack: Stack) -> None:
    """As after a restart of the machine: nobody does anything."""
    with stack.client() as yard:
        rest = yard.deployments.get("adder").document["endpoints"]["rest"]
        stack.server.stop()
        began = time.monotonic()
        stack.server.start()
        until(lambda: call(rest) == "200", 120, 0.2, "the deployment answers on its address")
        print(f"\nengine restarted: the deployment answers {time.monotonic() - began:.0f} s later")
        until(lambda: set(stack.running()) >= OURS | SERVERS, 60)
        until(lambda: yard.deployments.get("adder").document["phase"] == "healthy", 60)


def test_down_leaves_nothing_running_and_up_goes_on(stack: Stack) -> None:
    """Volumes stay: what was deployed is there again."""
    stack.compose("down")
    assert stack.running() == {}, "containers of deployments included"
    stack.compose(*UP)
    with stack.client() as yard:
        until(lambda: yard.deployments.get("adder").document["phase"] == "healthy", 60)
        assert yard.deployments.get("adder").score([[1, 2, 3]]) == [6.0]
    stack.user("modelyard deployments delete adder --wait")
    stack.compose("down", "--volumes")
    assert stack.running() == {}
    client = docker.DockerClient(stack.server.docker_host)
    assert client.volumes.list() == []
    client.close()
