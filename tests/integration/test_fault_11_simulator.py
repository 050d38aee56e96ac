"""Fault 11: the kernel and the services in a simulator of one seed: crash, duplicate, delay, reorder, lost lease,
conflict, outage before and after the work, on a virtual clock. A failing seed prints the line that plays it again."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.simulator.mutants import MUTANTS
from tests.simulator.run import simulate

pytestmark = [pytest.mark.slow, pytest.mark.fault]
SEEDS = int(os.environ.get("MODELYARD_SEEDS", "500"))
CAUGHT_WITHIN = 40


def play(first: int, end: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "tests.simulator", str(first), str(end)], text=True,
                            env={**os.environ, "PYTHONHASHSEED": "0"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_every_seed_ends_well() -> None:
    """All effects once, in order, nothing lost or left over, on each of the seeds."""
    half = SEEDS // 2
    for process in (players := [play(0, half), play(half, SEEDS)]):
        out, _ = process.communicate(timeout=540)
        print(out)
    assert [process.returncode for process in players] == [0, 0], "see the lines above: each seed can be played again"


def test_one_seed_replays_bit_for_bit() -> None:
    """``SEED=n`` plays that seed; two processes see the same steps at the same virtual times."""
    seed = int(os.environ.get("SEED", "11"))
    told = [play(seed, seed + 1).communicate(timeout=120)[0] for _ in range(2)]
    print(told[0])
    assert "WRONG" not in told[0]
    first, second = (re.search("trace ([0-9a-f]{64})", text) for text in told)
    assert first and second and first[1] == second[1]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_put_in_on_purpose_is_found(name: str) -> None:
    with MUTANTS[name]():
        for seed in range(CAUGHT_WITHIN):
            if problems := simulate(seed).problems:
                print(f"seed {seed}: {problems[0]}")
                return
    pytest.fail(f"{CAUGHT_WITHIN} seeds did not notice: {name}")
