"""h2corn's thread waits while a bunch of calls is handed to it, and at no other time."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

import grpc.aio
import pytest

from modelyard.core.inference import Inference, write_request
from modelyard.core.tensors import Tensor
from modelyard.scoring.h2_cork import BUNCH, THREAD
from modelyard.scoring.transport_h2 import H2Transport
from tests.unit.scoring.planes import open_plane
from tests.unit.scoring.test_life import RETRY

np = pytest.importorskip("numpy")
INFER = "/inference.GRPCInferenceService/ModelInfer"


def _allowed() -> bool:
    try:
        os.sched_setscheduler(0, os.sched_getscheduler(0), os.sched_param(0))
    except (OSError, AttributeError):
        return False
    return os.sched_getscheduler(0) == os.SCHED_OTHER


pytestmark = pytest.mark.skipif(not _allowed(), reason="the system gives no say in how threads are scheduled")


def policies() -> Counter[int]:
    tasks = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text().strip() == THREAD]
    return Counter(os.sched_getscheduler(int(task.name)) for task in tasks)


async def test_held_for_a_bunch_and_for_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    really = os.sched_setscheduler

    def say(thread: int, policy: int, how: os.sched_param) -> None:
        said.append(policy)
        really(thread, policy, how)

    monkeypatch.setattr(os, "sched_setscheduler", say)
    body = write_request(Inference("flower", tensors=[Tensor("x", np.ones((1, 2), np.float32))]))
    async with open_plane(tmp_path, "def run(data):\n    return 1\n") as plane:
        transport = H2Transport(f"unix:{tmp_path}/socket", plane)
        await transport.start()
        try:
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/socket", RETRY) as channel:
                infer = channel.unary_unary(INFER)
                for _ in range(BUNCH):
                    await infer(body, timeout=20)
                assert said == [], "one by one"
                async with asyncio.timeout(20):
                    while os.SCHED_BATCH not in said:
                        await asyncio.gather(*(infer(body) for _ in range(16 * BUNCH)))
                    while said[-1] != os.SCHED_OTHER:
                        await asyncio.sleep(0)
                assert said.count(os.SCHED_BATCH) == said.count(os.SCHED_OTHER)
                await transport.drain()
                await infer(body, timeout=20)
            seen = await asyncio.to_thread(policies)
            assert seen[os.SCHED_OTHER] >= 1 and not seen[os.SCHED_BATCH]
        finally:
            await transport.stop(2)
