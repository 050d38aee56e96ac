"""The build sandbox in a container of the engine: with what docker-compose.yml gives the image builder, and without."""

from __future__ import annotations

import io
import json
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

import modelyard
from infra.compose.seccomp import profile
from tests.backends import need, server

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LOOK = "from modelyard.image_builder.sandbox import trouble; print(trouble() or 'none')"


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    if not (url := server("docker")):
        need("docker")
        pytest.skip("docker is not available here")
    client = docker.DockerClient(f"unix://{url.removeprefix('docker://')}", timeout=60)
    yield client
    client.close()


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient) -> Iterator[str]:
    """A root with nothing in it: the machine's own programs are mounted there."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in ("usr", "proc", "dev", "etc", "tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(entry)
        for name in ("bin", "sbin", "lib", "lib64"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(entry)
    engine.api.import_image_from_data(packed.getvalue(), repository="modelyard-sandbox-test", tag="1")
    yield "modelyard-sandbox-test:1"
    engine.images.remove("modelyard-sandbox-test:1", force=True)


def looked(engine: docker.DockerClient, image: str, options: list[str]) -> str:
    """What the probe says in a container as Compose runs it, with these ``security_opt``."""
    services, packages, prefix = Path(modelyard.__file__).parents[1], sysconfig.get_path("purelib"), sys.base_prefix
    given = [f"seccomp={(ROOT / o.partition('=')[2]).read_text()}" if o.startswith("seccomp=") else o
             for o in options if not o.startswith("systempaths=")]
    host: dict[str, Any] = engine.api.create_host_config(
        binds=[f"{path}:{path}:ro" for path in dict.fromkeys(("/usr", prefix, str(services), packages))
               if path == "/usr" or not Path(path).is_relative_to("/usr")],
        cap_drop=["ALL"], security_opt=given, read_only=True, network_mode="none", tmpfs={"/tmp": "mode=1777"})
    if "systempaths=unconfined" in options:
        host |= {"MaskedPaths": [], "ReadonlyPaths": []}
    made = engine.api.create_container(
        image, [f"{prefix}/bin/python3.{sys.version_info.minor}", "-c", LOOK], user="10001:10001", host_config=host,
        environment={"PYTHONPATH": f"{services}:{packages}"})
    try:
        engine.api.start(made)
        engine.api.wait(made, timeout=60)
        return bytes(engine.api.logs(made)).decode().strip()
    finally:
        engine.api.remove_container(made, force=True)


def test_the_image_builders_container_can_make_one(engine: docker.DockerClient, image: str) -> None:
    """The profile's file is what its program writes; only this service has it."""
    composed = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    options = composed["image-builder"]["security_opt"]
    assert [name for name, service in composed.items() if "seccomp=" in str(service.get("security_opt"))] \
        == ["image-builder"]
    assert json.loads((ROOT / "infra/compose/seccomp.json").read_text()) == profile()
    assert looked(engine, image, options) == "none"


def test_another_says_why_not_and_what_to_do(engine: docker.DockerClient, image: str) -> None:
    told = looked(engine, image, ["no-new-privileges:true"])
    assert "a user namespace: Operation not permitted" in told and "seccomp=infra/compose/seccomp.json" in told
