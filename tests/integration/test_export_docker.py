"""Ways out, taken by what is not ours: `docker load` and `docker run` of an exported image, and the classic builder's
image of the exported context, which holds and says the same."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import grpc
import pytest

from infra.stack import debian
from infra.stack.docker import Docker
from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests import contained
from tests.backends import need
from tests.e2e import models
from tests.e2e.test_journey import FLOWER, build, infer, register
from tests.e2e.yard import Yard, until

pytestmark = pytest.mark.slow
SAME = ("Entrypoint", "Cmd", "Env", "User", "WorkingDir", "ExposedPorts", "Labels")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[docker.DockerClient]:
    need("docker")
    with Docker(tmp_path_factory.mktemp("engine")) as server:
        client = docker.DockerClient(server.docker_host)
        yield client
        client.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of what a yard exported, which is not there any more when the tests begin."""
    if reason := debian.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("exported")
    yard = Yard.start("all-in-one", folder / "data")
    try:
        model = register(yard, models.save_iris(folder / "iris.skops", 200), name="iris", framework="scikit-learn")
        image = build(yard, name="iris-scorer", models=[model["id"]], base=f"oci-layout://{debian.base()}:latest",
                      env={"COLOUR": "red $HOME"})
        assert image["phase"] == "ready", image
        for option, name in (("--docker", "image.tar"), ("--oci", "layout.tar"), ("--to", "context.tar")):
            done = yard.cli("images", "export", "iris-scorer:1", option, str(folder / name))
            assert done.stdout == f"{folder / name}\n" and "exporting iris-scorer:1" in done.stderr
        (folder / "digest").write_text(image["digest"])
    finally:
        left = yard.stop()
    assert left == []
    yield folder


def answers(engine: docker.DockerClient, image: str) -> None:
    """It serves with nothing of ours around it: `docker run -p 127.0.0.1::8080 -p 127.0.0.1::8081 IMAGE`."""
    ports = {"8080/tcp": ("127.0.0.1", None), "8081/tcp": ("127.0.0.1", None)}
    container = engine.containers.run(image, detach=True, ports=ports, read_only=True, cap_drop=["ALL"])
    try:
        def port(inside: int) -> int:
            container.reload()
            assert container.status == "running", container.logs().decode()
            return int(container.ports[f"{inside}/tcp"][0]["HostPort"])

        def ready() -> bool:
            with grpc.insecure_channel(f"127.0.0.1:{port(8081)}") as channel:
                try:
                    return bool(GRPCInferenceServiceStub(channel).ServerReady(
                        pb.ServerReadyRequest(), timeout=2).ready)
                except grpc.RpcError:
                    return False

        until(ready, 60, every=0.2)
        with grpc.insecure_channel(f"127.0.0.1:{port(8081)}") as channel:
            answer = infer(GRPCInferenceServiceStub(channel), [FLOWER, FLOWER])
        assert answer.model_name == "iris" and list(answer.outputs[0].shape) == [2]
        scored = subprocess.run(["curl", "-sf", f"http://127.0.0.1:{port(8080)}/score", "--data", json.dumps(
            {"data": [FLOWER]}), "-H", "content-type: application/json"], capture_output=True, text=True, timeout=30)
        assert (scored.returncode, json.loads(scored.stdout)) == (0, [0])
    finally:
        container.remove(force=True)


def test_an_exported_image_runs_wherever_there_is_an_engine(engine: docker.DockerClient, exported: Path) -> None:
    with (exported / "image.tar").open("rb") as tar:
        (loaded,) = engine.images.load(tar)
    assert loaded.tags == ["iris-scorer:1"]
    with tarfile.open(exported / "image.tar") as archive:
        known = json.loads(archive.extractfile("manifest.json").read())  # type: ignore[union-attr]
    assert loaded.id == f"sha256:{Path(known[0]['Config']).name}", "its config, to the byte"
    assert json.loads(loaded.labels["io.modelyard.models"])[0]["id"] == "iris:1"
    answers(engine, "iris-scorer:1")


def test_the_layout_keeps_the_digest(exported: Path) -> None:
    with tarfile.open(exported / "layout.tar") as archive:
        index = json.loads(archive.extractfile("index.json").read())  # type: ignore[union-attr]
        (entry,) = index["manifests"]
        assert entry["digest"] == (exported / "digest").read_text()
        for member in archive:
            if member.name.startswith("blobs/sha256/"):
                data = archive.extractfile(member).read()  # type: ignore[union-attr]
                assert hashlib.sha256(data).hexdigest() == Path(member.name).name


def test_the_context_builds_the_same_image(engine: docker.DockerClient, exported: Path) -> None:
    """By the classic builder, without a network: nothing is downloaded, the base is what was loaded as `base`."""
    engine.images.load(contained.archive("base:latest"))
    if "iris-scorer:1" not in {tag for image in engine.images.list() for tag in image.tags}:
        with (exported / "image.tar").open("rb") as tar:
            engine.images.load(tar)
    with (exported / "context.tar").open("rb") as context:
        engine.images.build(fileobj=context, custom_context=True, tag="rebuilt:1", network_mode="none", rm=True)
    ours, theirs = (engine.api.inspect_image(name)["Config"] for name in ("iris-scorer:1", "rebuilt:1"))
    for field in SAME:
        mine, yours = (sorted(c[field]) if field == "Env" else c[field] for c in (ours, theirs))
        assert mine == yours, field
    assert files(engine, "iris-scorer:1") == files(engine, "rebuilt:1")
    answers(engine, "rebuilt:1")


def files(engine: docker.DockerClient, image: str) -> dict[str, Any]:
    """What lies below /opt: name → (kind, mode, owner, time, digest)."""
    container = engine.containers.create(image)
    found: dict[str, Any] = {}
    try:
        raw = b"".join(container.get_archive("/opt")[0])
    finally:
        container.remove()
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        for member in archive:
            content = archive.extractfile(member)
            found[member.name] = (member.type, oct(member.mode), member.uid, member.gid,
                                  content and (member.mtime, hashlib.sha256(content.read()).hexdigest()))
    assert len(found) > 1000
    return found


def test_packages_of_the_system_lie_on_the_base(engine: docker.DockerClient, tmp_path: Path) -> None:
    """Debian's own, put there by its own tools, in a layer of their own."""
    if reason := debian.missing():
        pytest.skip(reason)
    debian.base()  # installs the tool where it has to
    to = tmp_path / "base"
    done = subprocess.run([sys.executable, "-m", "modelyard", "images", "base", "--debian", "--package", "libgomp1",
                           "--to", str(to)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    engine.images.load(contained.archive("packages:1", to))
    assert len(engine.images.get("packages:1").attrs["RootFS"]["Layers"]) == 2
    look = "import ctypes; print(ctypes.CDLL('libgomp.so.1').omp_get_max_threads() > 0)"
    said = engine.containers.run("packages:1", ["sh", "-c", f'python3 -c "{look}" && dpkg -s libgomp1'], remove=True,
                                 network_mode="none").decode()
    assert said.startswith("True\n") and "Status: install ok installed" in said
