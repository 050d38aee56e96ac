"""What is refused because it would wait too long: the estimate, and the data plane that goes by it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Call, QueueFull
from modelyard.scoring.speed import Speed
from tests.unit.scoring.planes import grpc_call, open_plane

SLOW = "import time\ndef run(data):\n    time.sleep(0.01)\n    return data\n"


def test_nobody_is_refused_before_calls_have_waited_for_each_other() -> None:
    speed = Speed()
    speed.took(5.0, 1, more=False)
    speed.begun(64, time.monotonic())
    assert speed.hopeless(0.001, 500) == 0.0 and speed.together(time.monotonic(), 64) == 64


def test_a_call_is_hopeless_when_what_is_before_it_needs_its_time() -> None:
    speed = Speed()
    speed.took(0.1, 10, more=True)
    assert speed.hopeless(1.0, 60) == 0.0
    assert speed.hopeless(1.0, 80) == pytest.approx(0.8)
    speed.begun(20, time.monotonic())
    assert speed.hopeless(1.0, 60) == pytest.approx(0.8, abs=0.05), "what is begun has yet to end"
    speed.ended(20)
    assert speed.hopeless(1.0, 60) == 0.0
    speed.begun(20, time.monotonic() - 5)
    assert speed.hopeless(1.0, 60) == 0.0, "what takes longer than it should says nothing"
    speed.overlapping = True
    assert speed.hopeless(1.0, 60) == pytest.approx(0.8), "of several at once none is known to be nearly done"


def test_batches_are_small_enough_for_their_first_call() -> None:
    speed = Speed()
    speed.took(0.1, 10, more=True)
    assert 30 < speed.together(time.monotonic() + 0.5, 64) <= 35
    assert speed.together(time.monotonic() + 60, 64) == 64 and speed.together(time.monotonic() - 1, 64) == 1


def test_the_estimate_follows_what_is_seen() -> None:
    """A batch that might have been larger says only what a call costs at most: larger ones may cost each call less."""
    speed = Speed()
    speed.took(0.01, 1, more=True)
    for _ in range(200):
        speed.took(0.02, 1, more=False)
    assert speed.call_s == pytest.approx(0.01)
    for _ in range(200):
        speed.took(0.01, 50, more=False)
    assert speed.call_s == pytest.approx(0.0002, rel=0.1)
    for _ in range(200):
        speed.took(0.03, 1, more=True)
    assert speed.call_s == pytest.approx(0.03, rel=0.1)


def call(seconds: float) -> Call:
    return grpc_call("flower", Tensor("x", np.zeros(1)), deadline=time.monotonic() + seconds)


async def test_what_would_wait_too_long_is_refused_at_once_and_the_rest_is_answered(tmp_path: Path) -> None:
    async with open_plane(tmp_path, SLOW) as plane:
        assert {a.status for a in await plane.handle([call(60) for _ in range(20)])} == {"OK"}
        began = time.monotonic()
        waiting = [asyncio.ensure_future(plane.handle([call(1.0)])) for _ in range(300)]
        await asyncio.sleep(0)
        answers = [task.result()[0] for task in waiting if task.done()]
        assert time.monotonic() - began < 0.5 and len(answers) >= 200
        for answer in answers:
            assert answer.status == "RESOURCE_EXHAUSTED" and isinstance(answer.error, QueueFull)
            assert answer.error.detail["retry_after"] >= 1 and "try again soon" in answer.error.message
        taken = [(await task)[0].status for task in waiting if not task.done()]
        assert "OK" in taken and set(taken) <= {"OK", "DEADLINE_EXCEEDED"}
        assert plane.metrics.in_flight == 0


@pytest.mark.slow
async def test_who_has_time_waits(tmp_path: Path) -> None:
    async with open_plane(tmp_path, SLOW) as plane:
        await plane.handle([call(60) for _ in range(20)])
        assert {a.status for a in await plane.handle([call(60) for _ in range(100)])} == {"OK"}


async def test_a_lane_with_nothing_to_do_takes_any_call(tmp_path: Path) -> None:
    """However little time it has: otherwise nobody would learn that predictions are quicker now."""
    async with open_plane(tmp_path, SLOW) as plane:
        await plane.handle([call(60) for _ in range(20)])
        plane._lanes[0].speed.call_s = 1_000.0
        assert (await plane.handle([call(10)]))[0].status == "OK"
        assert plane._lanes[0].speed.call_s < 1_000.0
