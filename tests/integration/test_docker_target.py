"""What a container of ours may do and may not, where its image comes from, and what is left when things die."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import docker
import pytest

from infra.stack.registry import Registry
from modelyard.adapters import urls
from modelyard.adapters.targets_docker import DockerTarget
from modelyard.core.errors import Invalid
from modelyard.ports.images import ImageStore
from modelyard.ports.targets import Observed, Workload
from tests import contained, handmade
from tests.backends import MATRIX, need, url_of
from tests.contract.test_targets import score

pytestmark = pytest.mark.slow

PRY = """import os

def may_write(path):
    try:
        with open(path, 'w') as out:
            out.write('x')
        return True
    except OSError as exc:
        return False

def run(data):
    status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
    return {'uid': os.getuid(), 'caps': [int(status[c], 16) for c in ('CapEff', 'CapPrm', 'CapBnd')],
            'no_new': status['NoNewPrivs'].strip(), 'env': dict(os.environ),
            'writes': [p for p in ('/x', '/opt/modelyard/x', '/etc/x', '/tmp/x') if may_write(p)],
            'sees': sorted(os.listdir('/run/modelyard')), 'sockets': os.path.exists('/var/run/docker.sock')}
"""
GREEDY = "def run(data):\n    hog = b'x' * (data['data'] << 20)\n    return len(hog)\n"


class Bench:
    def __init__(self, target: DockerTarget, images: ImageStore, engine: docker.DockerClient, data: Path,
                 grant: str) -> None:
        self.target, self.images, self.engine, self.data, self.grant = target, images, engine, data, grant
        self.generation = 0

    async def apply(self, digest: str, **changes: Any) -> Observed:
        self.generation += 1
        plain: dict[str, Any] = {"replicas": 1, "models": (), "ports": {}, "capture": {"enabled": False}, "limits": {},
                                 "progress_deadline_s": 60, "grant": self.grant}
        return await self.target.apply(Workload(
            workspace="default", name="iris", generation=self.generation, image="scorer:1", repo="scorer",
            digest=digest, **{**plain, **changes}))

    async def until(self, when: Callable[[Observed], bool], within_s: float = 40) -> Observed:
        async with asyncio.timeout(within_s):
            while not when(seen := await self.target.observe("default", "iris")):
                await asyncio.sleep(0.05)
        return seen

    async def serve(self, code: str, **changes: Any) -> Observed:
        await self.apply(await contained.image(self.images, "scorer", "1", code), **changes)
        return await self.until(lambda o: o.serving == self.generation and o.ready == len(o.replicas))

    def containers(self) -> list[Any]:
        return self.engine.containers.list(
            all=True, filters={"label": f"dev.modelyard.yard={self.target.yard}"}, ignore_removed=True)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    url = url_of(MATRIX["targets"][1], tmp_path)
    images = await urls.open_images(f"oci-layout://{tmp_path}/images")
    target = await urls.open_target("docker", url, images=images, data=tmp_path)
    assert isinstance(target, DockerTarget)
    client = await asyncio.to_thread(docker.DockerClient, url.replace("docker://", "unix://"))
    grants = await urls.open_grants(f"file://{tmp_path}/blobs")
    bench = Bench(target, images, client, tmp_path, await grants.lend("default", "iris", 600))
    yield bench
    await bench.target.remove("default", "iris")
    assert bench.containers() == [] and client.images.list(f"modelyard-{bench.target.yard}") == []
    client.close()


async def test_a_container_has_what_it_needs_and_nothing_else(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "from the environment")
    monkeypatch.setenv("MODELYARD_TOKEN", "nobody's business")
    (bench.data / "secret").write_text("from a file\n")
    seen = await bench.serve(PRY, resources={"cpu": 0.5, "memory": "512Mi"}, env={"LEVEL": "3"}, secrets={
        "A": {"env": "MY_SECRET"}, "B": {"file": str(bench.data / "secret")}})
    told = await score(seen)
    assert (told["uid"], told["caps"], told["no_new"]) == (10001, [0, 0, 0], "1")
    assert told["writes"] == ["/tmp/x"] and told["sees"] == ["admin", "grpc", "rest"] and not told["sockets"]
    env = told["env"]
    assert (env["A"], env["B"], env["LEVEL"], env["FROM_IMAGE"]) == ("from the environment", "from a file", "3", "1")
    assert "MODELYARD_TOKEN" not in env and env["OMP_NUM_THREADS"] == "1" and env["HOME"] == "/tmp"
    one, = bench.containers()
    limits = one.attrs["HostConfig"]
    assert (limits["NanoCpus"], limits["Memory"], limits["MemorySwap"]) == (500_000_000, 512 << 20, 512 << 20)
    assert limits["PidsLimit"] == 1024 and limits["ReadonlyRootfs"] and not one.attrs["NetworkSettings"]["Ports"]
    labels = {k.removeprefix("dev.modelyard."): v for k, v in one.labels.items() if k.startswith("dev.modelyard.")}
    assert labels == {"yard": bench.target.yard, "workspace": "default", "deployment": "iris", "generation": "1",
                      "replica": seen.replicas[0].name}
    assert all(end.removeprefix("http://").startswith("127.0.0.1:") for end in seen.endpoints.values())


async def test_more_memory_than_its_limit_ends_a_replica_that_comes_back(bench: Bench) -> None:
    seen = await bench.serve(GREEDY, resources={"memory": "256Mi"})
    before = seen.replicas[0].pid
    told = asyncio.ensure_future(_post(seen, {"data": 600}))
    after = await bench.until(lambda o: o.ready == 1 and o.replicas[0].pid not in (None, before))
    assert after.replicas[0].restarts == 1
    assert not 200 <= await told < 300
    log = b"".join([part async for part in bench.target.logs("default", "iris")]).decode()
    assert "killed: it used more than its limit of 256 MiB" in log


async def test_what_was_told_to_end_with_us_ends_and_comes_back(bench: Bench) -> None:
    """For a deployer in a container: its supervisors cannot outlive it, so nothing of theirs is left running."""
    url = url_of(MATRIX["targets"][1], bench.data) + "?at_exit=end"
    bench.target = await urls.open_target("docker", url, images=bench.images, data=bench.data)
    before = await bench.serve(PRY)
    await bench.target.close()
    assert bench.containers() == [] and (await bench.target.observe("default", "iris")).state == "absent"
    after = await bench.serve(PRY)
    assert after.endpoints == before.endpoints and after.replicas[0].pid != before.replicas[0].pid


async def _post(seen: Observed, body: dict[str, Any]) -> int:
    """The status; 0 when the connection ended without one."""
    host, _, port = seen.endpoints["rest"].removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = json.dumps(body).encode()
    writer.write(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                 % (len(raw), raw))
    try:
        line = await reader.readline()
        return int(line.split()[1]) if line else 0
    except ConnectionError:
        return 0
    finally:
        writer.close()


async def test_an_engine_pulls_from_a_registry_by_digest(
        bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("registry")
    with Registry(tmp_path / "registry") as registry:
        images = await urls.open_images(f"{registry.url}/team")
        digest = await contained.image(images, "scorer", "1", "def run(data):\n    return {'who': 'pulled'}\n")
        target = await urls.open_target("docker", url_of(MATRIX["targets"][1], tmp_path), images=images, data=tmp_path)
        assert isinstance(target, DockerTarget)
        bench.target, bench.images = target, images
        monkeypatch.delattr(type(images), "get_blob")  # whoever sends the image needs it
        await bench.apply(digest)
        seen = await bench.until(lambda o: o.ready == 1)
        assert (await score(seen))["who"] == "pulled"
        image = bench.engine.images.get(f"modelyard-{target.yard}:{digest[7:39]}")
        assert len(image.attrs["RepoTags"]) == 1 and not image.attrs["RepoDigests"], "it goes with the deployment"
        await target.remove("default", "iris")
        with pytest.raises(docker.errors.ImageNotFound):
            bench.engine.images.get(image.id)
        await images.close()


async def test_what_a_supervisor_that_died_left_running_makes_way(bench: Bench) -> None:
    seen = await bench.serve(handmade.ECHO)
    orphan, = bench.containers()
    run = bench.data / "docker/docker/default/iris"
    compiled, = (run / "compiled").iterdir()
    assert list(compiled.rglob("dataplane.*.pyc")), "the next start of this image need not compile again"
    told = await bench.target._ask(run, {"op": "observe"})
    assert told is not None
    os.kill(told["pid"], signal.SIGKILL)
    while (await bench.target.observe("default", "iris")).state == "present":
        await asyncio.sleep(0.05)
    assert [one.id for one in bench.containers()] == [orphan.id], "nobody ended it"
    assert await bench.target.list() == [("default", "iris")]
    again = await bench.serve(handmade.ECHO)
    assert again.ports == seen.ports and await score(again) == {"data": 1}
    assert orphan.id not in [one.id for one in bench.containers()] and len(bench.containers()) == 1


async def test_containers_without_a_folder_are_found_and_removed(bench: Bench) -> None:
    await bench.serve(handmade.ECHO)
    run = bench.data / "docker/docker/default/iris"
    told = await bench.target._ask(run, {"op": "observe"})
    assert told is not None
    os.kill(told["pid"], signal.SIGKILL)
    shutil.rmtree(run)
    assert await bench.target.list() == [("default", "iris")] and len(bench.containers()) == 1
    await bench.target.remove("default", "iris")
    assert await bench.target.list() == [] and bench.containers() == []


async def test_an_image_that_cannot_run_in_a_container_is_told_why(bench: Bench) -> None:
    empty = await contained.image(bench.images, "scorer", "1", "", system=False)
    await bench.apply(empty)
    bad = await bench.until(lambda o: o.failed != "")
    assert "the image holds no Python: build it with a base" in bad.failed
    with pytest.raises(Invalid, match="is not in the image store"):
        await bench.apply("sha256:" + "0" * 64)
