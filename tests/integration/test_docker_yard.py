"""The user's journey into containers: a base, an image, two replicas, calls, capture, upgrades, and all away again."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import grpc
import pytest

from infra.stack import debian
from infra.stack.docker import Docker
from modelyard import Client
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests import contained
from tests.backends import need
from tests.e2e import models
from tests.e2e.test_journey import FLOWER, RETRY, build, healthy, infer, register
from tests.e2e.yard import Yard, until

pytestmark = pytest.mark.slow
CALLS = 20
SYSTEM = """FROM yard-debian:1
COPY greeting /etc/greeting
ENV COLOUR=red
RUN echo from $COLOUR >> /etc/greeting
USER nobody
ENTRYPOINT ["/bin/false"]
"""
SCORE = """import os

def run(data):
    with open("/etc/greeting") as file:
        return {"greeting": file.read(), "colour": os.environ["COLOUR"], "sum": sum(data["data"][0])}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    need("docker")
    with Docker(tmp_path_factory.mktemp("engine") / "docker") as server:
        yield server


@pytest.fixture(scope="module")
def yard(server: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """Its services apart, so that the deployer can be away while its containers serve."""
    data = tmp_path_factory.mktemp("docker-yard") / "data"
    targets = {"local": "process://", "docker": f"{server.url}?dockerfiles=none", "nowhere": f"docker://{data}/no.sock"}
    yard = Yard.start("apart", data, MODELYARD_TARGETS=",".join(f"{k}={v}" for k, v in targets.items()))
    try:
        yield yard
    finally:
        for item in yard.call("GET", "/v1/deployments").json["items"]:
            yard.call("DELETE", f"/v1/deployments/{item['name']}?wait=30")
        left = yard.stop()
    assert left == []


@pytest.fixture(scope="module")
def images(yard: Yard, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two versions, of two models, on Debian."""
    if reason := debian.missing():
        pytest.skip(reason)
    folder, base = tmp_path_factory.mktemp("models"), f"oci-layout://{debian.base()}:latest"
    found = []
    for n in (2, 200):
        model = register(yard, models.save_iris(folder / f"iris{n}.skops", n), name="iris", framework="scikit-learn")
        image = build(yard, name="iris-scorer", models=[model["id"]], base=base)
        assert image["phase"] == "ready", image
        found.append(image["id"])
    return found


@pytest.fixture(scope="module")
def engine(server: Docker) -> Iterator[docker.DockerClient]:
    client = docker.DockerClient(server.docker_host)
    yield client
    client.close()


def containers(engine: docker.DockerClient, name: str = "iris") -> list[Any]:
    return engine.containers.list(filters={"label": f"dev.modelyard.deployment={name}"}, ignore_removed=True)


def change(yard: Yard, **fields: Any) -> dict[str, Any]:
    now = yard.call("GET", "/v1/deployments/iris")
    answer = yard.call("PATCH", "/v1/deployments/iris", fields, headers={"if-match": now.headers["etag"]})
    assert answer.status == 202, answer.body
    return healthy(yard, "iris", answer.json["generation"])


def test_an_image_without_a_base_is_refused(yard: Yard, images: list[str]) -> None:
    plain = build(yard, name="plain", models=["iris:1"])
    refused = yard.call("POST", "/v1/deployments", {"name": "plain", "image": plain["id"], "target": "docker"})
    assert refused.status in (400, 422) and b"build it with base" in refused.body


def test_an_engine_that_is_not_there_is_told_of_and_waited_for(yard: Yard, images: list[str]) -> None:
    made = yard.call("POST", "/v1/deployments", {"name": "lost", "image": images[0], "target": "nowhere"})
    assert made.status == 202

    def told() -> list[str]:
        doc = yard.call("GET", "/v1/deployments/lost").json
        assert doc["phase"] in ("pending", "progressing"), "an engine that is away is no failure of a deployment"
        return [c["message"] for c in doc["conditions"] if "no Docker Engine answers at" in c["message"]]

    said, = until(told, 20)
    assert "start it" in said and yard.call("GET", "/readyz", service="deployer").status == 200
    log = yard.log("deployer")
    assert log.count("'lost' waits for its target 'nowhere'") == 1 and "Traceback" not in log
    assert "Traceback" not in yard.log("deployer")
    yard.call("DELETE", "/v1/deployments/lost?wait=20")
    assert yard.call("GET", "/v1/deployments/lost").status == 404, "nothing was ever started, so nothing is in the way"


def test_the_journey(yard: Yard, images: list[str], engine: docker.DockerClient) -> None:
    answer = yard.call("POST", "/v1/deployments", {
        "name": "iris", "image": images[0], "target": "docker", "replicas": 2, "capture": {"enabled": True}})
    assert answer.status == 202, answer.body
    first = healthy(yard, "iris", 1)
    assert len(containers(engine)) == 2 and first["replicas_ready"] == 2

    with grpc.insecure_channel(first["endpoints"]["grpc"], RETRY) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert infer(stub, [FLOWER, FLOWER]).outputs[0].shape[0] == 2
    for _ in range(CALLS):
        assert yard.call("POST", "/v1/deployments/iris/score", {"data": [FLOWER]}).status == 200

    for one in containers(engine):
        one.remove(force=True)
    until(lambda: yard.call("GET", "/v1/deployments/iris").json["replicas_ready"] == 2 and len(containers(engine)) == 2,
          60, why="containers that were removed are back")

    second = change(yard, image=images[1])
    assert second["endpoints"] == first["endpoints"] and second["models"] == ["iris:2"]
    assert change(yard, replicas=3)["replicas_ready"] == 3
    until(lambda: len(containers(engine)) == 3, 20)

    back = yard.call("POST", "/v1/deployments/iris/rollback", {})
    assert back.status == 202 and healthy(yard, "iris", back.json["generation"])["image"] == images[1]
    until(lambda: len(containers(engine)) == 2, 30, why="the third one has left")
    log = yard.call("GET", "/v1/deployments/iris/log?tail=50").body.decode()
    assert "modelyard: ready after" in log


def test_a_deployer_that_was_away_finds_its_containers(yard: Yard, images: list[str],
                                                       engine: docker.DockerClient) -> None:
    before = {one.id for one in containers(engine)}
    ends = yard.call("GET", "/v1/deployments/iris").json["endpoints"]
    yard.kill("deployer")
    with grpc.insecure_channel(ends["grpc"], RETRY) as channel:
        assert infer(GRPCInferenceServiceStub(channel), [FLOWER]).outputs[0].shape[0] == 1
    yard.restart("deployer")
    now = healthy(yard, "iris", yard.call("GET", "/v1/deployments/iris").json["generation"])
    assert now["endpoints"] == ends and {one.id for one in containers(engine)} == before


@pytest.fixture(scope="module")
def own(yard: Yard, engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Dockerfile, and a scoring file beside it; the engine has what it stands on."""
    engine.images.load(contained.archive("yard-debian:1"))
    folder = tmp_path_factory.mktemp("own")
    (folder / "system").mkdir()
    for name, text in {"Dockerfile": SYSTEM, "greeting": "hello\n", "secret": "x", ".dockerignore": "secret\n"}.items():
        (folder / "system" / name).write_text(text)
    (folder / "score.py").write_text(SCORE)
    return folder


def test_an_image_on_a_users_own_dockerfile_answers(yard: Yard, own: Path, engine: docker.DockerClient) -> None:
    how = ("--score", str(own / "score.py"), "--dockerfile", str(own / "system"))
    yard.cli("images", "build", "own-system", *how)
    made = yard.call("POST", "/v1/deployments", {"name": "own", "image": "own-system:1", "target": "docker"})
    assert made.status == 202, made.body
    ends = healthy(yard, "own", 1)["endpoints"]
    with grpc.insecure_channel(ends["grpc"], RETRY) as channel:
        said = json.loads(infer(GRPCInferenceServiceStub(channel), [[1, 2]], name="own").raw_output_contents[0][4:])
    assert said == {"greeting": "hello\nfrom red\n", "colour": "red", "sum": 3}

    log = yard.cli("images", "log", "own-system:1").stdout
    assert "dockerfile: Step 4/" in log and "RUN echo from $COLOUR" in log
    yard.cli("images", "build", "own-system", *how)
    log = yard.cli("images", "log", "own-system:2").stdout
    assert "built before" in log and "Step" not in log, "the same folder on the same images is not built again"
    one, two = (yard.call("GET", f"/v1/images/own-system:{n}").json for n in (1, 2))
    assert one["digest"] == two["digest"] and one["dockerfile"] == two["dockerfile"]
    same = json.loads(yard.cli("images", "list", "--digest", one["digest"], "--output", "json").stdout)
    assert {item["id"] for item in same} == {"own-system:1", "own-system:2"}
    assert "WRONG" not in yard.cli("images", "verify", "own-system:1").stdout
    yard.cli("images", "export", "own-system:1", "--to", str(own / "context.tar"))
    with tarfile.open(own / "context.tar") as archive, \
            tarfile.open(fileobj=archive.extractfile("dockerfile.tar")) as inner:
        assert sorted(inner.getnames()) == [".dockerignore", "Dockerfile", "greeting"]
    until(lambda: yard.call("DELETE", "/v1/deployments/own?wait=30").status in (200, 202, 404), 20)


def test_deleting_an_image_kills_the_step_that_runs(yard: Yard, own: Path, engine: docker.DockerClient) -> None:
    slow = own / "slow"
    slow.mkdir()
    (slow / "Dockerfile").write_text("FROM yard-debian:1\nRUN echo begun && sleep 900\n")
    yard.cli("images", "build", "slow-system", "--score", str(own / "score.py"), "--dockerfile", str(slow), "--no-wait")
    with Client(yard.url()) as client:
        lines = client.images.log("slow-system:1", follow=True)
        assert any(line.endswith("dockerfile: begun") for line in lines), "it is followed while the step sleeps"
        lines.close()
    steps = {"ancestor": "yard-debian:1"}
    assert len(engine.containers.list(filters=steps, ignore_removed=True)) == 1
    assert yard.call("DELETE", "/v1/images/slow-system:1").status == 202
    until(lambda: engine.containers.list(all=True, filters=steps, ignore_removed=True) == [], 30)
    until(lambda: yard.call("GET", "/v1/images/slow-system:1").status == 404, 30)


def test_all_away_and_every_call_is_captured(yard: Yard, images: list[str], engine: docker.DockerClient) -> None:
    """Those of containers that were killed before they could say goodbye included."""
    until(lambda: yard.call("DELETE", "/v1/deployments/iris?wait=30").status in (200, 202, 404), 20)
    until(lambda: yard.call("GET", "/v1/deployments/iris").status == 404, 60)
    assert containers(engine) == []
    verify = yard.call("GET", "/v1/capture/iris/verify").json
    assert verify["processes"] and not [p for p in verify["processes"] if p["state"] == "gaps"], json.dumps(verify)
    client = Client(yard.url())
    table = client.capture("iris").read()
    client.close()
    assert table.num_rows == CALLS + 2
    assert set(table.column("status").to_pylist()) == {"OK"}
    until(lambda: yard.call("DELETE", f"/v1/images/{images[0]}").status in (200, 202, 204), 20)
