"""Notices that some process wrote to a SQLite file, without looking again and again: Linux tells (inotify).

Every commit in WAL mode writes to the ``-wal`` file. Where the kernel cannot watch it (a limit of watches, another
system), ``Watch.start`` says so and the file polls instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

IN_MODIFY = 0x2
PAUSE_S = 0.015
"""After a notice the next one waits so long: a burst of commits is one notice. It always comes, because a commit is
written to the file a moment before others can see it: who looks at the first notice may look too early."""


class Watch:
    """Calls ``notice`` in the event loop soon after a write, by this process or another."""

    def __init__(self, notice: Callable[[], None]) -> None:
        self._notice, self._fd = notice, -1
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self, database: Path) -> bool:
        """False when the kernel will not watch the file."""
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "inotify_init1"):
            return False
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            return False
        if libc.inotify_add_watch(self._fd, os.fsencode(f"{database}-wal"), IN_MODIFY) < 0:
            self.stop()
            return False
        self._loop.add_reader(self._fd, self._readable)
        return True

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 65536)
        self._loop.remove_reader(self._fd)
        self._timer = self._loop.call_later(PAUSE_S, self._again)
        self._notice()

    def _again(self) -> None:
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._readable)
            self._notice()
