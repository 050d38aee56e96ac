"""Three times as many calls as the model can answer: it goes on answering as many as it can, within their deadlines,
and refuses the rest by the documented status. ``run`` sleeps, so what it can do does not hang on the machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import open_loop
from tests.contract.transports import ask, serving, wait_for

pytestmark = pytest.mark.slow  # real programs are started, and loaded for seconds
PEAK = 100
"""Calls a second: of 10 ms each, one at a time."""
DEADLINE_S, SECONDS = 0.6, 5.0
ONE_BY_ONE = """
import time
def run(data):
    time.sleep(0.01)
    return data
"""
TOGETHER = """
import time
import numpy as np
def run_batch(data: np.ndarray):
    time.sleep(0.01 * len(data))
    return data
"""
SLEEPING = """
import asyncio
turn = asyncio.Semaphore(2)
async def run(data):
    async with turn:
        await asyncio.sleep(0.02)
    return data
"""
REFUSED = {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "503", "504"}


@pytest.mark.parametrize(("kind", "score"), [
    ("h2", ONE_BY_ONE), ("h2", TOGETHER), ("h2", SLEEPING), ("grpc", ONE_BY_ONE), ("rest", ONE_BY_ONE)])
async def test_overload_is_refused_and_goodput_stays(tmp_path: Path, kind: str, score: str) -> None:
    transport = "grpc" if kind == "grpc" else "h2"
    with serving(tmp_path, transport, score=score, limits={"timeout_ms": int(DEADLINE_S * 1000)}) as served:
        body = json.dumps({"data": [[0.0]]}).encode()
        load = open_loop.by_rest(f"http://{served.replica.http}/score", body, {"Content-Type": "application/json"}) \
            if kind == "rest" else open_loop.by_grpc(served.address, ask(np.zeros((1, 1))), DEADLINE_S)
        async with load as call:
            assert set((await open_loop.offer(call, PEAK / 2, 1.0)).outcomes) == {"OK"}
            resident = served.resident_mib()
            seen = await open_loop.offer(call, 3 * PEAK, SECONDS)
            grown = served.resident_mib() - resident
            wait_for(lambda: served.in_flight() == 0, 20, "the end of its calls")
            after = await open_loop.offer(call, PEAK / 4, 1.0)
    print(f"{kind}: {seen.rate:.0f}/s of {PEAK}, p99 {seen.quantile_s(0.99):.2f} s, {dict(seen.outcomes)}")
    assert set(seen.outcomes) <= {"OK", *REFUSED}, seen.outcomes
    assert sum(seen.outcomes.values()) > 2 * PEAK * SECONDS, "the load was not what it should be"
    assert seen.rate > 0.5 * PEAK
    refused = seen.outcomes["RESOURCE_EXHAUSTED"] + seen.outcomes["503"]
    assert refused > seen.outcomes["DEADLINE_EXCEEDED"] + seen.outcomes["504"], "most are told at once"
    assert seen.quantile_s(0.99) < DEADLINE_S + 0.5
    assert grown < 48, f"{grown:.0f} MiB more, for calls that were mostly refused"
    assert set(after.outcomes) == {"OK"}, "as before, once the load is gone"
