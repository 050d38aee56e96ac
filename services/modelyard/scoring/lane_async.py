"""An async ``run`` or ``run_batch``: an event loop of its own, in the lane's thread, with several calls under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from .batches import execute_awaiting
from .calls import ScoringFailed
from .jobs import GIVEN_UP, Batch, Job, failed
from .runners import Runner, log_failure
from .speed import Speed

CONCURRENT = 64
"""Calls that an async ``run`` may have under way at once."""
BATCHES = 4
"""As many batches of an async ``run_batch``: few, so that calls find each other."""


class AsyncWork:
    """Made and entered in the lane's thread; ``wake``, ``give_up`` and ``close`` are for the server's event loop."""

    def __init__(self, runner: Runner, next_: Callable[[Runner], Batch | None], claim: Callable[[Batch], None],
                 running: dict[int, Batch], give_back: Callable[[Iterable[Batch]], None],
                 speed: Speed) -> None:
        self._runner, self._next, self._claim = runner, next_, claim
        self._running, self._give_back, self._speed = running, give_back, speed
        self._most = BATCHES if runner.batched else CONCURRENT
        speed.overlapping = True
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._of: dict[Job, int] = {}
        self._woken = self._closed = False
        self._asyncio = asyncio.Runner()

    def __enter__(self) -> AsyncWork:
        self._asyncio.__enter__()
        self._loop = self._asyncio.get_loop()
        return self

    def __exit__(self, *error: Any) -> None:
        self._asyncio.__exit__(*error)

    def run(self) -> None:
        """Until ``close``. A task that scoring code began may end with what asyncio lets through: SystemExit."""
        while not self._closed:
            try:
                self._loop.run_forever()
            except BaseException:  # noqa: BLE001 - it ended that task, and must not end the lane
                log_failure()

    def wake(self) -> None:
        """There is something in the queue."""
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._start_some)

    def give_up(self, job: Job) -> None:
        """Nobody waits for the job any more: its task is cancelled if it has one of its own, or was the last of it."""
        self._loop.call_soon_threadsafe(self._cancel, job)

    def close(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _start_some(self) -> None:
        self._woken = False  # before looking: what is queued from now on wakes us again
        while len(self._tasks) < self._most and (batch := self._next(self._runner)) is not None:
            self._claim(batch)
            if not batch.jobs:
                continue
            self._running[id(batch)] = batch
            task = self._loop.create_task(execute_awaiting(self._runner, batch))
            self._tasks[id(batch)] = task
            self._of.update(dict.fromkeys(batch.jobs, id(batch)))
            task.add_done_callback(partial(self._over, batch))

    def _cancel(self, job: Job) -> None:
        number = self._of.get(job)
        if number is not None and all(j.state == GIVEN_UP for j in self._running[number].jobs):
            self._tasks[number].cancel()

    def _over(self, batch: Batch, task: asyncio.Task[None]) -> None:
        self._speed.took(time.monotonic() - batch.began, self._speed.running, len(self._tasks) >= self._most)
        self._speed.ended(len(batch.jobs))
        del self._tasks[id(batch)], self._running[id(batch)]
        for job in batch.jobs:
            del self._of[job]
            if job.outcome is None:
                job.outcome = failed(ScoringFailed("the call was cancelled by scoring code"))
        self._give_back((batch,))
        self._start_some()
