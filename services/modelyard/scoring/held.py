"""Calls that wait for room in the spool: nothing may go unrecorded, and the shipper has to make room first."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable

from .jobs import Job
from .lanes import Lane

PRESSURE_S = 0.02


class Held:
    """Of the event loop. ``admit`` gets each, in order, when there is room; who waits no longer is to ``leave``."""

    def __init__(self, admit: Callable[[Job], None], pressed: Callable[[], bool]) -> None:
        self._admit, self._pressed = admit, pressed
        self._jobs: OrderedDict[Job, None] = OrderedDict()
        self._of: Counter[Lane] = Counter()
        self._look_due = False
        self.in_all = 0
        """So far."""

    def __len__(self) -> int:
        return len(self._jobs)

    def of(self, lane: Lane) -> int:
        """How many wait for this lane."""
        return self._of[lane]

    def add(self, job: Job) -> None:
        """In order, behind those that wait already. It has a lane."""
        assert job.lane is not None
        self._jobs[job] = None
        self._of[job.lane] += 1
        self.in_all += 1
        self._look_soon()

    def leave(self, job: Job) -> bool:
        """It is not to be admitted any more; whether it waited here."""
        if job not in self._jobs:
            return False
        assert job.lane is not None
        del self._jobs[job]
        self._of[job.lane] -= 1
        return True

    def _look_soon(self) -> None:
        if self._jobs and not self._look_due:
            self._look_due = True
            asyncio.get_running_loop().call_later(PRESSURE_S, self._look)

    def _look(self) -> None:
        self._look_due = False
        while self._jobs and not self._pressed():
            job = next(iter(self._jobs))
            self.leave(job)
            self._admit(job)
        self._look_soon()
