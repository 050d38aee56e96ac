"""Calls that wait for room in the spool: how many, and for how long."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Answer
from tests.unit.scoring.planes import grpc_call, score_call
from tests.unit.scoring.test_capture_policy import planned

ONE = "def run(data):\n    return 1\n"


async def test_what_waits_for_room_is_bounded_by_the_queue(tmp_path: Path) -> None:
    async with planned(tmp_path, ONE, {"max_queue": 8, "max_message_bytes": 4096}, spool_bytes=1,
                       on_pressure="block") as (plane, log):
        answers: list[Answer] = []
        jobs = [plane.submit(score_call({"n": n}), answers.append) for n in range(30)]
        assert len(answers) == 22 and {a.status for a in answers} == {"RESOURCE_EXHAUSTED"}
        assert {a.error.code for a in answers if a.error} == {"queue-full"}
        plane.submit(score_call(b" " * 5000), answers.append)
        assert answers[-1].error is not None and answers[-1].error.code == "too-large", "nor is what is refused anyway"
        plane.cancel(jobs[0])
        assert answers[-1].status == "CANCELLED"
        again = plane.submit(score_call({"n": 1}), answers.append)
        assert not again.settled, "who went away leaves room for another"
        log._cap = 2**20  # the shipper has made room
        async with asyncio.timeout(10):
            while not again.settled:
                await asyncio.sleep(0.01)
        assert Counter(a.status for a in answers) == {"OK": 8, "RESOURCE_EXHAUSTED": 23, "CANCELLED": 1}
        assert log.totals == {"recorded": 8, "collected": 0, "pressed": 1, "refused": 23}


async def test_who_waits_in_vain_is_told_so_before_its_own_clock_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    import grpc

    from modelyard.scoring import held
    from modelyard.scoring.transport_h2 import H2Transport

    monkeypatch.setattr(held, "PRESSURE_S", 3600.0)  # its deadline answers it, not who looks for room now and then
    async with planned(tmp_path, ONE, spool_bytes=1, on_pressure="block") as (plane, log):
        began = time.monotonic()
        answers: list[Answer] = []
        call = score_call({"n": 1})
        call.deadline = began + 0.3
        job = plane.submit(call, answers.append)
        async with asyncio.timeout(10):
            while not job.settled:
                await asyncio.sleep(0.01)
        assert answers[0].error is not None and answers[0].error.code == "spool-full" and log.totals["pressed"] == 1
        assert time.monotonic() >= call.deadline
        transport = H2Transport(f"unix:{tmp_path}/grpc", plane)
        await transport.start()
        try:
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/grpc") as channel:
                ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                with pytest.raises(grpc.aio.AioRpcError):  # on a busy machine the caller's clock may be first
                    await ask(grpc_call("flower", Tensor("n", np.array([1]))).body, timeout=0.4)
            async with asyncio.timeout(10):
                while plane.metrics.in_flight:
                    await asyncio.sleep(0.01)
        finally:
            await transport.stop(2)
        assert log.totals == {"recorded": 0, "collected": 0, "pressed": 2}, "whichever clock was first"
