"""One seed from its beginning to its end."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from modelyard.image_builder import build

from .checks import wrong
from .clock import VirtualLoop, run
from .story import HEAL_S, play
from .world import QuickBuild, World


@dataclass(frozen=True)
class Outcome:
    """``problems`` empty: all was well. ``trace`` is the same whenever the same seed runs on the same code."""

    seed: int
    problems: tuple[str, ...]
    trace: str
    steps: int
    events: int
    virtual_s: float
    last: tuple[str, ...]

    def told(self) -> str:
        lines = [*self.last[-40:], *(f"  WRONG: {problem}" for problem in self.problems)]
        return "\n".join([*lines, again(self.seed)])


def again(seed: int) -> str:
    """The line that plays a seed again."""
    return f"SEED={seed} .venv/bin/python -m pytest tests/integration/test_fault_11_simulator.py -k one_seed -s"


def simulate(seed: int) -> Outcome:
    """Plays one seed."""
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(build, "Build", QuickBuild):
            outcome: Outcome = run(seed, lambda loop: _seed(loop, seed, Path(folder)))
            return outcome
    finally:
        logging.disable(logging.NOTSET)


async def _seed(loop: VirtualLoop, seed: int, data: Path) -> Outcome:
    world = World(loop, seed, data)
    try:
        await play(world)
        end = loop.time() + HEAL_S
        while (problems := wrong(world)) and loop.time() < end:
            await asyncio.sleep(5.0)
    except AssertionError as exc:
        problems = [f"a caller: {exc}"]
    finally:
        await world.stop()
    events = sum(len(shelf.committed) for shelf in world.shelves.values())
    return Outcome(seed, tuple(problems), world.trace.hash.hexdigest(), world.trace.steps, events, loop.time(),
                   tuple(world.trace.lines))
