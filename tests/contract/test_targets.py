"""Deployment targets: what every one of them promises, tried with real images and the real scoring server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from modelyard.adapters import urls
from modelyard.core.errors import Conflict, NotFound
from modelyard.ports.blobs import CaptureGrants
from modelyard.ports.images import ImageStore
from modelyard.ports.targets import DeploymentTarget, Observed, Workload
from tests import contained, handmade
from tests.backends import backends, url_of

pytestmark = pytest.mark.slow  # real programs are started and stopped

WHO = "import os\n\ndef run(data):\n    return {'who': os.environ.get('WHO', 'nobody'), 'pid': os.getpid()}\n"
MAKE = {"process": handmade.image, "docker": contained.image}
"""How images are made that a target can run."""


@dataclass
class Bench:
    """A target, the store of its images, and a way to open it again."""

    target: DeploymentTarget
    images: ImageStore
    grants: CaptureGrants
    again: Callable[[], Any]
    make: Callable[[ImageStore, str, str, str], Any]
    made: dict[str, str] = field(default_factory=dict)

    async def workload(self, generation: int, *, score: str = WHO, name: str = "iris", **changes: Any) -> Workload:
        if score not in self.made:
            self.made[score] = await self.make(self.images, "scorer", str(len(self.made) + 1), score)
        plain: dict[str, Any] = {
            "workspace": "default", "replicas": 1, "models": (), "ports": {}, "capture": {"enabled": False},
            "limits": {"timeout_ms": 5000}, "progress_deadline_s": 60,
            "grant": await self.grants.lend("default", name, 600)}
        return Workload(name=name, generation=generation, image=f"scorer:{list(self.made).index(score) + 1}",
                        repo="scorer", digest=self.made[score], **{**plain, **changes})

    async def until(self, when: Callable[[Observed], bool], within_s: float = 40, name: str = "iris") -> Observed:
        async with asyncio.timeout(within_s):
            while not when(seen := await self.target.observe("default", name)):
                await asyncio.sleep(0.05)
        return seen

    async def serve(self, generation: int, **changes: Any) -> Observed:
        """Applies, and returns when that generation serves with all its replicas and nothing else is left."""
        workload = await self.workload(generation, **changes)
        await self.target.apply(workload)
        return await self.until(lambda o: o.serving == generation and o.ready == len(o.replicas) == workload.replicas,
                                name=workload.name)


@pytest.fixture(params=backends("targets"))
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    url = url_of(request.param, tmp_path)
    images = await urls.open_images(f"oci-layout://{tmp_path}/images")
    grants = await urls.open_grants(f"file://{tmp_path}/blobs")

    async def again() -> DeploymentTarget:
        return await urls.open_target("local", url, images=images, data=tmp_path)

    bench = Bench(await again(), images, grants, again, MAKE[request.param.name])
    await bench.target.check()
    yield bench
    for workspace, name in await bench.target.list():
        await bench.target.remove(workspace, name)
    for port in (bench.target, bench.target, grants, images):
        await port.close()


async def score(seen: Observed) -> dict[str, Any]:
    def call() -> dict[str, Any]:
        request = urllib.request.Request(seen.endpoints["rest"] + "/score", b'{"data": 1}',
                                         {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    return await asyncio.to_thread(call)


def pids(seen: Observed) -> set[int]:
    return {r.pid for r in seen.replicas if r.pid is not None}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


async def test_what_is_absent_is_said_to_be_absent(bench: Bench) -> None:
    assert (await bench.target.observe("default", "iris")).state == "absent"
    await bench.target.remove("default", "iris")
    await bench.target.remove("default", "iris")
    assert await bench.target.list() == []
    with pytest.raises(NotFound):
        await anext(aiter(bench.target.logs("default", "iris")))


async def test_what_is_applied_serves_and_repeating_changes_nothing(bench: Bench) -> None:
    seen = await bench.serve(1, replicas=2, env={"WHO": "me"})
    assert (seen.state, seen.generation, seen.candidate, seen.failed) == ("present", 1, 0, "")
    assert (await score(seen))["who"] == "me"
    assert await bench.target.list() == [("default", "iris")]
    told = await bench.target.apply(await bench.workload(1, replicas=2, env={"WHO": "me"}))
    assert pids(told) == pids(seen) and told.ports == seen.ports and told.serving == 1


async def test_an_older_generation_is_refused(bench: Bench) -> None:
    await bench.target.apply(await bench.workload(3))
    with pytest.raises(Conflict):
        await bench.target.apply(await bench.workload(2))
    assert (await bench.target.observe("default", "iris")).generation == 3


async def test_scaling_keeps_what_runs(bench: Bench) -> None:
    one = await bench.serve(1)
    three = await bench.serve(2, replicas=3)
    assert pids(one) < pids(three) and {r.generation for r in three.replicas} == {2}
    two = await bench.serve(3, replicas=2)
    assert pids(two) < pids(three) and two.ports == one.ports


async def test_a_change_rolls_on_the_same_address(bench: Bench) -> None:
    before = await bench.serve(1, env={"WHO": "old"})
    after = await bench.serve(2, env={"WHO": "new"})
    assert not pids(before) & pids(after) and after.endpoints == before.endpoints
    assert (await score(after))["who"] == "new"
    rolled = await bench.serve(3, score="def run(data):\n    return {'who': 'another image'}\n")
    assert rolled.image == "scorer:2" and (await score(rolled))["who"] == "another image"


async def test_a_broken_generation_leaves_the_old_one_serving(bench: Bench) -> None:
    good = await bench.serve(1)
    await bench.target.apply(await bench.workload(2, score=handmade.BROKEN))
    bad = await bench.until(lambda o: o.failed != "")
    assert "the weights are not here" in bad.failed
    assert (bad.generation, bad.serving, bad.candidate, bad.ready) == (2, 1, 0, 1) and bad.image == "scorer:1"
    assert (await score(bad))["who"] == "nobody" and pids(good) <= pids(bad)
    back = await bench.serve(3)
    assert pids(back) == pids(good) and back.failed == "", "what serves is what is wanted again: nothing was restarted"


async def test_a_first_generation_that_breaks_serves_nothing(bench: Bench) -> None:
    await bench.target.apply(await bench.workload(1, score=handmade.BROKEN))
    bad = await bench.until(lambda o: o.failed != "")
    assert (bad.serving, bad.ready, pids(bad)) == (0, 0, set())


async def test_a_generation_that_is_never_ready_is_given_up_at_its_deadline(bench: Bench) -> None:
    slow = "import time\n\ndef init():\n    time.sleep(60)\n\ndef run(data):\n    return 1\n"
    await bench.serve(1)
    await bench.target.apply(await bench.workload(2, score=slow, progress_deadline_s=2))
    late = await bench.until(lambda o: o.failed != "", 20)
    assert "2 s" in late.failed and late.serving == 1 and (await score(late))["who"] == "nobody"


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
async def test_what_is_killed_comes_back(bench: Bench, sig: signal.Signals) -> None:
    seen = await bench.serve(1, replicas=2)
    victim = min(pids(seen))
    os.kill(victim, sig)
    healed = await bench.until(lambda o: o.ready == 2 and victim not in pids(o))
    assert sum(r.restarts for r in healed.replicas) == 1 and len(pids(healed) & pids(seen)) == 1


async def test_a_target_that_is_opened_again_finds_what_runs(bench: Bench) -> None:
    seen = await bench.serve(1)
    await bench.target.close()
    bench.target = await bench.again()
    assert await bench.target.list() == [("default", "iris")]
    found = await bench.target.observe("default", "iris")
    assert pids(found) == pids(seen) and found.ready == 1
    assert pids(await bench.serve(2, replicas=2)) > pids(seen)


async def test_what_is_removed_is_gone(bench: Bench) -> None:
    seen = await bench.serve(4, replicas=2)
    other = await bench.serve(1, name="other")
    await bench.target.remove("default", "iris")
    assert (await bench.target.observe("default", "iris")).state == "absent"
    assert not any(alive(pid) for pid in pids(seen))
    with pytest.raises(urllib.error.URLError):
        await score(seen)
    assert await bench.target.list() == [("default", "other")] and (await score(other))["who"] == "nobody"
    await bench.serve(1)


async def test_two_deployments_do_not_mix(bench: Bench) -> None:
    first, second = await asyncio.gather(bench.serve(1, env={"WHO": "first"}),
                                         bench.serve(1, name="second", env={"WHO": "second"}))
    assert {(await score(first))["who"], (await score(second))["who"]} == {"first", "second"}


async def test_the_log_is_told_line_by_line_and_followed(bench: Bench) -> None:
    talks = "def run(data):\n    print('scored', data)\n    return data\n"
    seen = await bench.serve(1, score=talks)
    name = seen.replicas[0].name
    await score(seen)

    async def lines(tail: int) -> list[str]:
        return b"".join([part async for part in bench.target.logs("default", "iris", tail)]).decode().splitlines()

    async with asyncio.timeout(10):
        while not any(line.startswith(f"{name} ") and line.endswith("scored {'data': 1}") for line in await lines(50)):
            await asyncio.sleep(0.05)
    assert len(await lines(1)) == 1

    async with asyncio.timeout(10):
        following = bench.target.logs("default", "iris", 0, True)
        news = asyncio.ensure_future(anext(following))
        await asyncio.sleep(0.3)
        await score(seen)
        assert b"scored" in await news
        await following.aclose()
