"""One child process: in a group of its own, dying with its parent, its output in a log, its end awaited by a pidfd."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from .logfile import LogFile

_libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Runs in the child between fork and exec. Safe there: a supervisor has one thread."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(1)


class Child:
    """Raises OSError when the program cannot be started. ``exited`` gives the exit code, negative for a signal."""

    taken_away = False
    """Whether somebody ended it who did not mean its program: that is no failure of its own."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, log: LogFile) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = log
        parent = os.getpid()
        self._process = subprocess.Popen(
            list(argv), env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, process_group=0, preexec_fn=lambda: _die_with(parent),
        )
        self.pid: int | None = self._process.pid
        self._group = self._process.pid
        self._told = False
        self.exited: asyncio.Future[int] = self._loop.create_future()
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        os.set_blocking(self._out, False)
        self._loop.add_reader(self._out, self._read)
        self._pidfd = os.pidfd_open(self._group)
        self._loop.add_reader(self._pidfd, self._ended)

    @property
    def how(self) -> str:
        """How it ended, for a person."""
        code = self.exited.result()
        return f"exited with code {code}" if code >= 0 else f"was ended by signal {-code}"

    def kill(self) -> None:
        """The whole group, at once."""
        if not self.exited.done():
            self._signal_group()

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, and SIGKILL to its whole group when it is still there after ``grace_s``."""
        if not self.exited.done() and not self._told:
            self._told = True
            self._process.send_signal(signal.SIGTERM)
        done, _ = await asyncio.wait([self.exited], timeout=grace_s)
        if not done:
            self._signal_group()
        return await asyncio.shield(self.exited)

    def _signal_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)

    def _read(self) -> bool:
        try:
            data = os.read(self._out, 65536)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._out)
            return False
        self._log.feed(data)
        return True

    def _ended(self) -> None:
        """It is dead and not yet reaped, so its group id cannot mean anybody else: the group goes first."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._signal_group()
        code = self._process.wait()
        for _ in range(64):
            if not self._read():
                break
        self._loop.remove_reader(self._out)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.flush()
        self.exited.set_result(code)
