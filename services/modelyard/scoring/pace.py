"""How much of the machine the shipper may have: what nobody else wants, and a little more when much waits.

On Linux a thread has a scheduling policy of its own. The reading and sending is done by threads at idle priority
(SCHED_IDLE), which any other thread pushes aside at once. On a machine that is full for long these get next to
nothing, so a backlog is worked off by threads that are merely last among equals (nice 19): below everything else,
never starved.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

NICENESS = 19
BACKLOG = 4
"""Closed segments that wait: more are a backlog."""
THREADS = 2


class Pace:
    """Of one event loop, whose default executor it sets. ``os.nice`` is the caller's."""

    def __init__(self) -> None:
        self._idle = ThreadPoolExecutor(THREADS, "shipper-idle", initializer=idle)
        self._hurried = ThreadPoolExecutor(THREADS, "shipper")
        self.hurries = False
        self._set()

    def waiting(self, segments: int) -> None:
        """So many closed segments wait now. Hurries from a backlog on until nothing waits."""
        hurries = segments > BACKLOG or (self.hurries and segments > 0)
        if hurries != self.hurries:
            self.hurries = hurries
            self._set()

    def close(self) -> None:
        """What is begun is ended."""
        for pool in (self._idle, self._hurried):
            pool.shutdown()

    def _set(self) -> None:
        asyncio.get_running_loop().set_default_executor(self._hurried if self.hurries else self._idle)


def idle() -> None:
    """This thread runs when nobody else wants to; where the system has no such thing, as it ran before."""
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
