"""One seed of the simulator, in the fast lane: what stands in there for a part of ours still fits the others.

The fault lane plays hundreds, and runs seldom.
"""

from __future__ import annotations

from tests.simulator.run import simulate


def test_a_seed_ends_well() -> None:
    outcome = simulate(11)
    assert outcome.problems == (), outcome.told()
