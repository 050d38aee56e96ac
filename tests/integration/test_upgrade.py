"""No failed call: clients of every kind call without pause while a deployment is upgraded, scaled and hurt."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from modelyard import AsyncScoringClient
from modelyard.adapters import urls
from modelyard.client.inference import CONNECTIONS
from modelyard.ports.targets import DeploymentTarget, Observed, Workload
from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests import handmade
from tests.integration.load import OPTIONS

pytestmark = pytest.mark.slow
WHO = "import os\nimport numpy as np\ndef run(data):\n    return np.array([os.getpid()])\n"
KINDS = ("grpc", "channel", "kept", "once")


class Stage:
    """One deployment of two images that answer 1 and 2, and one that breaks."""

    def __init__(self, target: DeploymentTarget, digests: dict[int, str], grant: str) -> None:
        self.target, self.digests, self.grant = target, digests, grant
        self.generation = 0

    async def apply(self, version: int, replicas: int = 2) -> None:
        self.generation += 1
        await self.target.apply(Workload(
            workspace="default", name="iris", generation=self.generation, image=f"scorer:{version}", repo="scorer",
            digest=self.digests[version], replicas=replicas, models=(), ports={}, capture={"enabled": True},
            limits={}, grant=self.grant, progress_deadline_s=60))

    async def until(self, when: Callable[[Observed], bool], within_s: float = 60) -> Observed:
        async with asyncio.timeout(within_s):
            while not when(seen := await self.target.observe("default", "iris")):
                await asyncio.sleep(0.05)
        return seen

    async def serve(self, version: int, replicas: int = 2) -> Observed:
        """Applies and waits until it serves and nothing else is left."""
        await self.apply(version, replicas)
        return await self.until(lambda o: o.serving == self.generation and o.ready == len(o.replicas) == replicas)

    async def hurt(self, sig: signal.Signals) -> None:
        """Ends one ready replica and waits for another in its place."""
        before = await self.until(lambda o: o.ready == 2)
        victim = before.replicas[0].pid
        assert victim is not None
        os.kill(victim, sig)
        await self.until(lambda o: o.ready == 2 and victim not in [r.pid for r in o.replicas])


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    images = await urls.open_images(f"oci-layout://{tmp_path}/images")
    grants = await urls.open_grants(f"file://{tmp_path}/blobs")
    target = await urls.open_target("local", "process://", images=images, data=tmp_path)
    scores = {1: handmade.SLOW % 1, 2: handmade.SLOW % 2, 3: handmade.BROKEN, 4: WHO}
    digests = {n: await handmade.image(images, "scorer", str(n), score) for n, score in scores.items()}
    yield Stage(target, digests, await grants.lend("default", "iris", 3600))
    await target.remove("default", "iris")
    assert await target.list() == []


@asynccontextmanager
async def called(seen: Observed, every_s: float = 0.0) -> AsyncIterator[dict[str, Any]]:
    """Clients of every kind call meanwhile, each once in ``every_s`` or as soon as it can; at the end the dict is what
    they saw."""
    told: dict[str, Any] = {}
    load = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).with_name("load.py")), seen.endpoints["grpc"], seen.endpoints["rest"],
        "0.01", str(every_s), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        await asyncio.sleep(1)
        yield told
        await asyncio.sleep(0.5)
        out, _ = await asyncio.wait_for(load.communicate(b""), 60)
        told |= json.loads(out)
    finally:
        if load.returncode is None:
            load.kill()
            await load.wait()


def nothing_failed(told: dict[str, Any], answers: set[int]) -> None:
    print(json.dumps({kind: {k: told[kind][k] for k in ("calls", "failures", "p50_ms", "p99_ms", "max_ms")}
                      for kind in KINDS}))
    for kind in KINDS:
        assert told[kind]["failures"] == 0, (kind, told[kind]["failed"])
        assert told[kind]["calls"] >= 50
        assert {json.loads(answer)["answer"] for answer in told[kind]["answers"]} == answers


async def test_upgrades_and_scaling_fail_no_call(stage: Stage) -> None:
    async with called(await stage.serve(1)) as told:
        await stage.serve(2)
        await stage.serve(2, replicas=3)
        await stage.serve(2, replicas=1)
        await stage.serve(1, replicas=2)
    nothing_failed(told, {1, 2})


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
async def test_a_replica_that_ends_fails_no_call(stage: Stage, sig: signal.Signals) -> None:
    async with called(await stage.serve(1)) as told:
        await stage.hurt(sig)
        await stage.hurt(sig)
    nothing_failed(told, {1})


async def test_open_channels_move_to_a_replica_that_joins(stage: Stage) -> None:
    """A connection belongs to one replica, so without this a replica that came later would have nothing to do."""
    address = (await stage.serve(4, replicas=1)).endpoints["grpc"]
    channels = [grpc.aio.insecure_channel(address, OPTIONS) for _ in range(4)]

    async def who() -> set[str]:
        return set(await asyncio.gather(*(infer(channel) for channel in channels)))

    first = await who()
    assert len(first) == 1
    await stage.serve(4, replicas=2)
    async with asyncio.timeout(30):
        while len(await who()) < 2:
            await asyncio.sleep(0.05)
    for channel in channels:
        await channel.close()


async def test_one_scoring_client_uses_every_replica(stage: Stage) -> None:
    """Also one that joins while it is open, the one that was there before, and one that takes a dead one's place."""
    address = (await stage.serve(4, replicas=1)).endpoints["grpc"]
    async with AsyncScoringClient(address, model="iris", timeout_s=20) as client:
        async def who() -> set[int]:
            answers = await asyncio.gather(*(client.infer({"data": np.zeros(1)}) for _ in range(4 * CONNECTIONS)))
            return {int(answer["output-0"][0]) for answer in answers}

        async def are(seen: Observed) -> None:
            pids = {replica.pid for replica in seen.replicas}
            async with asyncio.timeout(30):
                while await who() != pids:
                    await asyncio.sleep(0.05)

        await are(await stage.serve(4, replicas=1))
        three = await stage.serve(4, replicas=3)
        await are(three)
        victim = three.replicas[-1].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        await are(await stage.until(lambda o: o.ready == 3 and victim not in [r.pid for r in o.replicas]))


async def infer(channel: grpc.aio.Channel) -> str:
    tensor = pb.ModelInferRequest.InferInputTensor(name="data", datatype="INT64", shape=[1])
    tensor.contents.int64_contents.append(1)
    reply = await GRPCInferenceServiceStub(channel).ModelInfer(
        pb.ModelInferRequest(model_name="iris", inputs=[tensor]), timeout=20)
    return str(reply.outputs[0].contents)


async def test_a_broken_candidate_fails_no_call(stage: Stage) -> None:
    async with called(await stage.serve(1)) as told:
        await stage.apply(3)
        bad = await stage.until(lambda o: o.failed != "")
        assert bad.serving == 1 and bad.ready == 2
        await stage.serve(1)
    nothing_failed(told, {1})


async def test_a_change_of_mind_in_the_middle_fails_no_call(stage: Stage) -> None:
    async with called(await stage.serve(1)) as told:
        for version in (2, 3, 1, 2):
            await stage.apply(version)
            await asyncio.sleep(0.3)
        await stage.serve(2)
    nothing_failed(told, {1, 2})
