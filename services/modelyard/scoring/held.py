"""Calls that wait for room in the spool: nothing may go unrecorded, and the shipper has to make room first."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from .jobs import Job

PRESSURE_S = 0.02


class Held:
    """Of the event loop. ``admit`` gets each when there is room, or its deadline is there (then it is refused)."""

    def __init__(self, admit: Callable[[Job], None], pressed: Callable[[], bool]) -> None:
        self._admit, self._pressed = admit, pressed
        self._jobs: deque[Job] = deque()
        self.in_all = 0
        """So far."""

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job, deadline: float) -> None:
        """In order, behind those that wait already."""
        if not self._jobs:
            self._look_soon()
        job.deadline = deadline
        self._jobs.append(job)
        self.in_all += 1

    def _look_soon(self) -> None:
        asyncio.get_running_loop().call_later(PRESSURE_S, self._look)

    def _look(self) -> None:
        held, self._jobs = self._jobs, deque()
        now = time.monotonic()
        for job in held:
            if not job.settled:
                if self._pressed() and now < job.deadline:
                    self._jobs.append(job)
                else:
                    self._admit(job)
        if self._jobs:
            self._look_soon()
