"""One timer for all calls that wait for a worker: at each deadline it lets whoever waits go."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable

from .jobs import Job


class Deadlines:
    """Of the event loop. ``expire`` is called with the jobs whose deadline is there and that have no answer yet."""

    def __init__(self, expire: Callable[[list[Job]], None]) -> None:
        self._expire = expire
        self._jobs: set[Job] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._at = math.inf

    def watch(self, job: Job) -> None:
        """From now on. Watching twice is fine."""
        self._jobs.add(job)
        if job.deadline < self._at:
            self._set(job.deadline)

    def forget(self, jobs: Iterable[Job]) -> None:
        """They are answered. The timer stays: it finds out, and most calls are answered long before."""
        if self._jobs:
            self._jobs.difference_update(jobs)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, deadline: float) -> None:
        self.close()
        self._at = deadline
        if deadline < math.inf:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(loop.time() + max(deadline - time.monotonic(), 0.0), self._look)

    def _look(self) -> None:
        now = time.monotonic()
        past = [job for job in self._jobs if job.deadline <= now]
        self._jobs.difference_update(past)
        self._set(min((job.deadline for job in self._jobs), default=math.inf))
        if past:
            self._expire(past)
