"""Many answers leave together: h2corn's thread does not take the processor at the first of them.

A ``send`` wakes that thread, and where it shares a core with us the kernel lets it in at once, for one answer; at the
next it does so again. Those switches were a fifth of what a call costs. Linux lets a thread say that it does not mind
waiting when it wakes: ``SCHED_BATCH``. It is said for the thread only while a bunch of calls is taken in or answered:
said for good it would cost whoever calls one by one on a busy core four milliseconds a call.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

BUNCH = 4
"""Calls under way, from which on a call or an answer is taken for one of a bunch."""
THREAD = "tokio-rt-worker"


class Cork:
    """In the event loop. ``idle``: there are threads to hold, and none is held."""

    def __init__(self) -> None:
        self.idle = False
        self._threads: list[int] = []
        self._known: set[int] = set()
        self._loop = asyncio.get_running_loop()

    async def look(self) -> None:
        """Finds the threads of the server that has just started; none where the system does not let us hold them.
        Those of the one before are let alone: when it ends, its numbers may be anybody's."""
        found = await asyncio.to_thread(_threads)
        self.leave()
        self._threads, self._known = [thread for thread in found if thread not in self._known], set(found)
        self.idle = bool(self._threads)

    def leave(self) -> None:
        """From now on nothing is held."""
        self._set(os.SCHED_OTHER)
        self._threads, self.idle = [], False

    def hold(self) -> None:
        """Until the end of this turn of the loop."""
        self.idle = False
        self._set(os.SCHED_BATCH)
        self._loop.call_soon(self._release)

    def _release(self) -> None:
        self._set(os.SCHED_OTHER)
        self.idle = bool(self._threads)

    def _set(self, policy: int) -> None:
        for thread in tuple(self._threads):
            try:
                os.sched_setscheduler(thread, policy, os.sched_param(0))
            except OSError:
                self._threads.remove(thread)  # its server has ended, or it is not ours to change


def _threads() -> list[int]:
    """Those that run as everybody does: whoever starts us may have said otherwise."""
    found = []
    with suppress(OSError, AttributeError):
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                if (task / "comm").read_text().strip() == THREAD and \
                        os.sched_getscheduler(int(task.name)) == os.SCHED_OTHER:
                    found.append(int(task.name))
    return found
