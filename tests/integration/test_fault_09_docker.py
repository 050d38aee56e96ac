"""Fault 9: the Docker Engine under a deployment restarts or is killed, and containers are removed by hand.

And none: a roll while clients of every kind call, a hundred times a second altogether.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from infra.stack.docker import Docker
from modelyard.adapters import urls
from tests import contained, handmade
from tests.backends import need
from tests.integration.test_upgrade import Stage, called, nothing_failed

pytestmark = [pytest.mark.slow, pytest.mark.fault]
BACK_S = 15.0
HUNDRED_A_SECOND = 0.115
"""How often each of twelve clients calls."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    need("docker")
    with Docker(tmp_path_factory.mktemp("engine") / "docker") as engine:
        yield engine


@pytest.fixture
async def stage(engine: Docker, tmp_path: Path) -> AsyncIterator[Stage]:
    images = await urls.open_images(f"oci-layout://{tmp_path}/images")
    grants = await urls.open_grants(f"file://{tmp_path}/blobs")
    target = await urls.open_target("docker", engine.url, images=images, data=tmp_path)
    await target.check()
    scores = {1: handmade.SLOW % 1, 2: handmade.SLOW % 2, 3: handmade.BROKEN}
    digests = {n: await contained.image(images, "scorer", str(n), score) for n, score in scores.items()}
    yield Stage(target, digests, await grants.lend("default", "iris", 3600))
    await target.remove("default", "iris")
    assert await target.list() == []
    assert await containers(engine) == {}


async def containers(engine: Docker) -> dict[str, int]:
    """Pid → what ``docker ps`` shows, asked past our own adapter."""

    def look() -> dict[str, int]:
        client = docker.DockerClient(engine.docker_host)
        try:
            return {one.id: one.attrs["State"]["Pid"] for one in client.containers.list(all=True, ignore_removed=True)}
        finally:
            client.close()

    return await asyncio.to_thread(look)


async def remove(engine: Docker, ids: list[str]) -> None:
    def away() -> None:
        client = docker.DockerClient(engine.docker_host)
        for id_ in ids:
            client.containers.get(id_).remove(force=True)
        client.close()

    await asyncio.to_thread(away)


async def test_twenty_containers_removed_by_hand_are_each_back_within_15_s(stage: Stage, engine: Docker) -> None:
    seen = await stage.serve(1, replicas=4)
    waits: list[float] = []
    for _ in range(10):
        pids = {pid: id_ for id_, pid in (await containers(engine)).items()}
        victims = [r.pid for r in seen.replicas[:2]]
        began = time.monotonic()
        await remove(engine, [pids[pid] for pid in victims if pid is not None])
        seen = await stage.until(lambda o, victims=victims: (  # type: ignore[misc]
            o.ready == 4 and not set(victims) & {r.pid for r in o.replicas}), BACK_S)
        waits += [time.monotonic() - began] * 2
    print(f"removed: 20, back after at most {max(waits):.1f} s")
    assert len(waits) == 20 and max(waits) <= BACK_S and seen.failed == ""


@pytest.mark.parametrize("crash", [False, True], ids=["restarted", "killed"])
async def test_an_engine_that_restarts_has_its_replicas_back(stage: Stage, engine: Docker, crash: bool) -> None:
    before = await stage.serve(1)
    await asyncio.to_thread(engine.kill if crash else engine.stop)
    try:
        away = await stage.target.observe("default", "iris")
        assert (away.state, away.generation, away.ports) == ("present", 1, before.ports), "told without an engine too"
    finally:
        await asyncio.to_thread(engine.start)
    began = time.monotonic()
    old = {r.pid for r in before.replicas}
    after = await stage.until(lambda o: o.ready == 2 and not old & {r.pid for r in o.replicas}, BACK_S)
    print(f"two replicas back {time.monotonic() - began:.1f} s after the engine")
    assert after.endpoints == before.endpoints and len(await containers(engine)) == 2
    async with called(after, HUNDRED_A_SECOND) as told:
        await asyncio.sleep(1)
    assert sum(told[kind]["failures"] for kind in told) == 0


async def test_a_roll_under_a_hundred_calls_a_second_fails_none(stage: Stage) -> None:
    began = time.monotonic()
    async with called(await stage.serve(1), HUNDRED_A_SECOND) as told:
        began = time.monotonic()
        await stage.serve(2)
        await stage.serve(1)
        await stage.serve(1, replicas=3)
        await stage.serve(2, replicas=2)
        lasted = time.monotonic() - began
    rate = _calls(told) / lasted
    print(f"{rate:.0f} calls/s over {lasted:.1f} s")
    nothing_failed(told, {1, 2})
    assert rate >= 80, "the load was too small to show anything"


def _calls(told: dict[str, Any]) -> int:
    return sum(kind["calls"] for kind in told.values())
