"""A whole yard whose images, and whose bases, lie in a registry that wants a password: built, run, taken away."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.stack import debian
from infra.stack.docker import Docker
from infra.stack.registry import Registry
from modelyard.adapters import urls
from modelyard.adapters.images_layout import LayoutImages
from tests.backends import need
from tests.e2e.test_journey import build, healthy, upload
from tests.e2e.yard import Yard, until

pytestmark = pytest.mark.slow

USERS = "yard:$2b$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.\n"  # yard, hunter2
SCORE = b"""import os
import sys


def run(data):
    return {"sum": sum(data["data"]), "python": sys.executable, "colour": os.environ.get("COLOUR"),
            "debian": os.path.exists("/etc/debian_version"), "path": os.environ.get("PATH")}
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    need("registry")
    with Registry(tmp_path_factory.mktemp("registry"), htpasswd=USERS) as found:
        yield found


@pytest.fixture(scope="module")
def login(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Docker's config folder, as ``docker login`` leaves it."""
    folder = tmp_path_factory.mktemp("docker-config")
    auth = base64.b64encode(b"yard:hunter2").decode()
    (folder / "config.json").write_text(json.dumps({"auths": {f"127.0.0.1:{registry.port}": {"auth": auth}}}))
    return folder


@pytest.fixture(scope="module")
def base(registry: Registry, login: Path) -> Iterator[str]:
    """A reference to Debian in the registry, put there by us."""
    if reason := debian.missing():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(login))
        asyncio.run(copied(registry.url))
    yield f"127.0.0.1:{registry.port}/bases/debian:12"


async def copied(url: str) -> None:
    source, target = LayoutImages(debian.base()), await urls.open_images(url)
    found = await source.get_manifest("any", "latest")
    assert found is not None
    manifest = json.loads(found[0])
    for part in (manifest["config"], *manifest["layers"]):
        await target.put_blob("bases/debian", part["digest"], source.get_blob("any", part["digest"]))
    await target.put_manifest("bases/debian", "12", *found)
    await target.close()


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    need("docker")
    with Docker(tmp_path_factory.mktemp("docker")) as found:
        yield found


@pytest.fixture(scope="module")
def yard(registry: Registry, login: Path, docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    found = Yard.start(
        "all-in-one", tmp_path_factory.mktemp("yard") / "data", MODELYARD_IMAGES=f"{registry.url}/yard",
        DOCKER_CONFIG=str(login), MODELYARD_TARGETS=json.dumps({"local": "process://", "docker": docker.url}))
    try:
        yield found
    finally:
        left = found.stop()
    assert left == [], found.log("all")[-2000:]


def deploy(yard: Yard, name: str, image: str, target: str) -> dict[str, Any]:
    answer = yard.call("POST", "/v1/deployments", {"name": name, "image": image, "target": target})
    assert answer.status == 202, answer.body
    healthy(yard, name, 1, seconds=120)
    scored = yard.call("POST", f"/v1/deployments/{name}/score", {"data": [1, 2, 3]})
    assert scored.status == 200, scored.body
    assert scored.json["sum"] == 6
    return dict(scored.json)


def remove(yard: Yard, name: str) -> None:
    assert yard.call("DELETE", f"/v1/deployments/{name}?wait=60").status in (200, 202)
    until(lambda: yard.call("GET", f"/v1/deployments/{name}").status == 404, 60)


def test_an_image_without_a_base_runs_on_local_only(yard: Yard) -> None:
    image = build(yard, name="plain", score=upload(yard, SCORE), env={"COLOUR": "red"})
    assert image["phase"] == "ready", image
    assert deploy(yard, "plain", image["id"], "local")["colour"] == "red"
    refused = yard.call("POST", "/v1/deployments", {"name": "plain-there", "image": image["id"], "target": "docker"})
    assert refused.status == 422 and refused.json["code"] == "needs-base", refused.body
    assert "--base" in refused.json["detail"]
    remove(yard, "plain")


def test_an_image_with_a_base_runs_in_a_container_and_on_local(yard: Yard, base: str) -> None:
    image = build(yard, name="based", score=upload(yard, SCORE), base=base, env={"COLOUR": "red"})
    assert image["phase"] == "ready" and image["python"] == "3.11", image
    inside = deploy(yard, "inside", image["id"], "docker")
    assert inside["python"] == "/usr/bin/python3.11" and inside["debian"] and inside["colour"] == "red"
    here = deploy(yard, "here", image["id"], "local")
    assert here["python"] != inside["python"] and here["colour"] == "red"
    for name in ("inside", "here"):
        remove(yard, name)


def test_a_second_image_sends_only_what_is_new(yard: Yard, registry: Registry, base: str) -> None:
    blobs = registry.data / "docker/registry/v2/blobs/sha256"

    def there() -> set[str]:
        return {path.name for path in blobs.glob("*/*")}

    def attached(image: dict[str, Any]) -> bool:
        tag = image["digest"].replace(":", "-")
        return (registry.data / f"docker/registry/v2/repositories/yard/{image['name']}/_manifests/tags/{tag}").is_dir()

    first = build(yard, name="sent", score=upload(yard, SCORE), base=base)
    until(lambda: attached(first), 20)
    before = there()
    again = build(yard, name="other", score=upload(yard, SCORE + b"# new\n"), base=base)
    assert again["phase"] == "ready", again
    until(lambda: attached(again), 20)
    new = there() - before
    assert len(new) == 3 + 5, new  # the scoring file's layer, config, manifest; two documents with theirs, an index
    assert sum((path / "data").stat().st_size for path in blobs.glob("*/*") if path.name in new) < 40_000


def test_the_context_and_the_deletion_of_an_image_in_a_registry(yard: Yard, base: str) -> None:
    image = build(yard, name="gone", score=upload(yard, SCORE), base=base)
    context = yard.call("GET", f"/v1/images/{image['id']}/context")
    assert context.status == 200 and b"FROM " + base.encode() in context.body
    assert yard.call("DELETE", f"/v1/images/{image['id']}").status == 202
    until(lambda: yard.call("GET", f"/v1/images/{image['id']}").status == 404, 30)
    again = build(yard, name="gone", score=upload(yard, SCORE), base=base)
    assert again["phase"] == "ready" and again["id"] == "gone:2" and again["digest"] == image["digest"]


@pytest.mark.parametrize(("where", "told"), [
    ("bases/debian:13", "there is no base image"), ("bases/nothing", "there is no base image")])
def test_a_base_that_is_not_there(yard: Yard, registry: Registry, where: str, told: str) -> None:
    image = build(yard, name="lost", score=upload(yard, SCORE), base=f"127.0.0.1:{registry.port}/{where}")
    assert image["phase"] == "failed" and told in image["reason"], image


def test_a_base_in_a_registry_that_does_not_know_us(yard: Yard, tmp_path: Path) -> None:
    with Registry(tmp_path, htpasswd=USERS) as other:
        image = build(yard, name="strange", score=upload(yard, SCORE), base=f"127.0.0.1:{other.port}/x:1")
    assert image["phase"] == "failed" and f"docker login 127.0.0.1:{other.port}" in image["reason"], image
