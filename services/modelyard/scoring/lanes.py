"""Lanes: one worker thread for each model. The event loop hands jobs over and gets them back in bunches.

User code runs here and nowhere else, so that whatever it does, health, refusals and other models go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..core.errors import ModelyardError
from .calls import Answer, Asked, Call, PastDeadline, Served
from .context import CURRENT, Current
from .runners import Runner, log_failure

INLINE_NS = 1_000_000
INLINE_BYTES = 65_536
CONCURRENT = 64
"""Calls that an async ``run`` may have under way at once."""


QUEUED, BEGUN, GIVEN_UP = range(3)


class Outcome(NamedTuple):
    """How a job ended. ``queue_ns`` is the time it waited before it was begun."""

    error: ModelyardError | None
    body: bytes
    body_type: str
    queue_ns: int


class Job:
    """One admitted call on its way. Settled once, by the event loop; what comes later is dropped."""

    __slots__ = ("answer", "arrived", "asked", "call", "deadline", "future", "lane", "outcome", "prediction_id",
                 "served", "started_ns", "state", "timer")

    def __init__(self, call: Call, prediction_id: str) -> None:
        self.call = call
        self.prediction_id = prediction_id
        self.started_ns = time.time_ns()
        self.arrived = time.perf_counter_ns()
        self.deadline = math.inf
        self.asked: Asked
        self.served: Served
        self.lane: Lane | None = None
        self.answer: Answer | None = None
        self.outcome: Outcome | None = None
        self.future: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.state = QUEUED

    @property
    def waited_ns(self) -> int:
        return time.perf_counter_ns() - self.arrived


def late() -> PastDeadline:
    """The error of a call that was not begun in time."""
    return PastDeadline("the deadline passed before the call was begun; it was not run")


class Lane:
    """A runner, its thread and its queue. ``done`` is called in the event loop with the jobs that ended."""

    def __init__(self, name: str, open_runner: Callable[[], Runner], done: Callable[[Sequence[Job]], None]) -> None:
        self.name = name
        self.runner: Runner | None = None
        self.busy = 0
        self.waiting = 0
        """Jobs that are queued, not begun and still wanted."""
        self._open, self._done = open_runner, done
        self._lock = threading.Lock()  # around ``waiting`` and each job's ``state``
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._backlog: deque[Job] = deque()
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._typical_ns = INLINE_NS
        self._finished: deque[Job] = deque()
        self._told = False
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[Runner] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, name=f"model-{name}", daemon=True)

    async def open(self) -> None:
        """Starts the thread and loads the model in it. Raises what loading raised."""
        self._thread.start()
        self.runner = await self._opened

    def may_inline(self, job: Job) -> bool:
        """Short predictions of ours need no thread: handing over costs more than they do."""
        return (self.busy == 0 and self._typical_ns < INLINE_NS and self.runner is not None and self.runner.inline
                and len(job.call.body) <= INLINE_BYTES)

    def run_inline(self, job: Job) -> None:
        """Runs the job here and now; its outcome is set when this returns."""
        assert self.runner is not None
        began = time.perf_counter_ns()
        job.outcome = _execute(self.runner, job)
        self._learn(time.perf_counter_ns() - began)

    def submit(self, job: Job) -> None:
        """Queues the job."""
        job.future = self._loop.create_future()
        self.busy += 1
        with self._lock:
            self.waiting += 1
        if self._own_loop is None:
            self._queue.put(job)
        else:
            self._backlog.append(job)
            self._own_loop.call_soon_threadsafe(self._start_some)

    def give_up(self, job: Job) -> None:
        """The event loop settles a job that is still queued or running. Queued: it will never be begun."""
        with self._lock:
            if job.state == QUEUED:
                self.waiting -= 1
            began, job.state = job.state == BEGUN, GIVEN_UP
        if began and self._own_loop is not None:
            self._own_loop.call_soon_threadsafe(self._cancel, job)

    def close(self) -> None:
        """Tells the thread to end; it is a daemon, so user code that hangs does not keep the process."""
        if self._own_loop is not None:
            self._own_loop.call_soon_threadsafe(self._own_loop.stop)
        self._queue.put(None)

    def _learn(self, took_ns: int) -> None:
        """What a prediction typically takes: rises at once, falls slowly."""
        self._typical_ns = max(took_ns if took_ns > 4 * INLINE_NS else 0, (self._typical_ns * 7 + took_ns) // 8)

    # In the worker's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            runner = self._open()
        except BaseException as exc:  # noqa: BLE001 - carried to whoever waits for the model
            self._tell_opened(None, exc)
            return
        if runner.asynchronous:
            self._work_async(runner)
            return
        self._tell_opened(runner, None)
        while (job := self._queue.get()) is not None:
            if self._claim(job):
                began = time.perf_counter_ns()
                job.outcome = _execute(runner, job)
                self._learn(time.perf_counter_ns() - began)
            self._give_back(job)

    def _claim(self, job: Job) -> bool:
        """Begins the job, unless it was given up meanwhile."""
        with self._lock:
            if job.state != QUEUED:
                return False
            job.state = BEGUN
            self.waiting -= 1
            return True

    def _work_async(self, runner: Runner) -> None:
        with asyncio.Runner() as own:
            self._own_loop = own.get_loop()
            self._tell_opened(runner, None)
            self._own_loop.run_forever()

    def _start_some(self) -> None:
        while self._backlog and len(self._tasks) < CONCURRENT:
            job = self._backlog.popleft()
            if not self._claim(job):
                self._give_back(job)
                continue
            assert self._own_loop is not None
            task = self._own_loop.create_task(self._execute_async(job))
            self._tasks[job] = task
            task.add_done_callback(partial(self._ended, job))

    async def _execute_async(self, job: Job) -> None:
        assert self.runner is not None
        job.outcome = await _execute_awaiting(self.runner, job)

    def _cancel(self, job: Job) -> None:
        if job in self._tasks:
            self._tasks[job].cancel()

    def _ended(self, job: Job, _: asyncio.Task[None]) -> None:
        del self._tasks[job]
        self._give_back(job)
        self._start_some()

    def _tell_opened(self, runner: Runner | None, error: BaseException | None) -> None:
        def tell() -> None:
            if self._opened.cancelled():
                return
            if error is not None:
                self._opened.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            else:
                assert runner is not None
                self._opened.set_result(runner)

        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
            self._loop.call_soon_threadsafe(tell)

    def _give_back(self, job: Job) -> None:
        """Hands an ended job to the event loop; one wake-up takes all that ended meanwhile."""
        self._finished.append(job)
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._collect)

    # In the event loop --------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        self._told = False  # before looking: what is appended from now on wakes us again
        jobs = []
        while self._finished:
            job = self._finished.popleft()
            self.busy -= 1
            if job.answer is None and job.outcome is not None:
                jobs.append(job)
        if jobs:
            self._done(jobs)


def _begin(job: Job) -> tuple[int, Any]:
    waited = job.waited_ns
    if time.monotonic() >= job.deadline:
        raise late()
    return waited, CURRENT.set(Current(job.prediction_id, job.call.request_id, job.served.model))


def _execute(runner: Runner, job: Job) -> Outcome:
    """Decode, run, encode. Never raises."""
    waited, token = job.waited_ns, None
    try:
        waited, token = _begin(job)
        codec = job.call.codec
        codec.read(job.asked)
        result = runner.run(job.asked)
        return Outcome(None, *codec.write(job.asked, result, job.served), waited)
    except ModelyardError as exc:
        return Outcome(exc, b"", "", waited)
    except BaseException:  # noqa: BLE001 - one call's failure, whatever it is, must not end the thread
        return Outcome(log_failure(), b"", "", waited)
    finally:
        if token is not None:
            CURRENT.reset(token)


async def _execute_awaiting(runner: Runner, job: Job) -> Outcome:
    """As ``_execute``, for an async ``run``. Raises CancelledError only."""
    waited = job.waited_ns
    try:
        waited, _ = _begin(job)
        codec = job.call.codec
        codec.read(job.asked)
        result = await runner.run(job.asked)
        return Outcome(None, *codec.write(job.asked, result, job.served), waited)
    except ModelyardError as exc:
        return Outcome(exc, b"", "", waited)
    except asyncio.CancelledError:
        raise
    except BaseException:  # noqa: BLE001 - as above
        return Outcome(log_failure(), b"", "", waited)
