"""Lanes: one worker thread for each model. The event loop hands jobs over and gets them back in bunches.

Batches are as large as what came while the last one ran: whoever is free, the event loop for short predictions of our
own flavours, else the lane's thread, takes what is queued. There is no timer, so a call alone never waits for others.
User code runs in the thread and nowhere else, so that whatever it does, health, refusals and other models go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from .batches import execute, plan
from .jobs import BEGUN, GIVEN_UP, QUEUED, Batch, Job
from .lane_async import AsyncWork
from .patience import Patience
from .runners import Runner
from .speed import Speed

INLINE_NS = 1_000_000
"""Shorter predictions run on the event loop, which is held up for so long at most between two looks at sockets."""
INLINE_BYTES = 131_072
SLACK = 64


class Lane:
    """A runner, its thread and its queue. ``done`` is called in the event loop with the batches that ended, ``watch``
    with each job that waits for the thread."""

    def __init__(self, name: str, open_runner: Callable[[], Runner], done: Callable[[Sequence[Batch]], None],
                 watch: Callable[[Job], None], max_rows: int) -> None:
        self.name = name
        self.runner: Runner | None = None
        self.waiting = 0
        """Jobs that are queued, not begun and still wanted."""
        self.trickle = False
        """Calls that are there take several turns of the loop to arrive, and batches wait for them (``Patience``)."""
        self.speed = Speed()
        self._open, self._done, self._watch, self._max_rows = open_runner, done, watch, max_rows
        self._lock = threading.Lock()  # around the queue and each job's ``state``
        self._queue: deque[Job] = deque()
        self._planned: deque[Batch] = deque()  # of whoever works: the event loop's turn or the thread, never both
        self._running: dict[int, Batch] = {}
        self._working = False  # the thread does
        self._turn_due = self._turning = False
        self._patience = Patience()
        self._large = self._last_calls = 0
        self._typical_ns = INLINE_NS
        self._ended: deque[Batch] = deque()
        self._own: AsyncWork | None = None
        self._wake = threading.Semaphore(0)
        self._told = self._closed = False
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[Runner] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, name=f"model-{name}", daemon=True)

    async def open(self) -> None:
        """Starts the thread and loads the model in it. Raises what loading raised."""
        self._thread.start()
        self.runner = await self._opened

    @property
    def busy(self) -> bool:
        """The thread has work."""
        return self._working or bool(self._running) or bool(self._queue)

    def submit(self, job: Job) -> None:
        """Queues the job, to be begun with what else comes in this turn of the loop; or runs it now, if it is the first
        of the turn, it is short, and calls come one by one: then nobody else is waited for."""
        with self._lock:
            self.waiting += 1
            self._queue.append(job)
            self._large += len(job.call.body) > INLINE_BYTES
            working = self._working
        if self._own is not None:
            self._watch(job)
            self._own.wake()
        elif working:
            self._watch(job)
        elif self._last_calls == 1 and not self._turn_due and not self._turning and self._is_short():
            self._turn()
            self._turn_soon()  # whatever else comes in this turn waits for the next
        else:
            self._turn_soon()

    def make_room(self) -> bool:
        """The queue is full, of what one turn brought: where predictions are short, some of it is run right now."""
        if self._turning or self._working or not self._is_short():
            return False
        self._turn()
        return True

    def hopeless(self, left_s: float) -> float:
        """The seconds that a call with so much time would wait, when that is too long; else 0.0."""
        return self.speed.hopeless(left_s, self.waiting)

    def give_up(self, job: Job) -> None:
        """The event loop settles a job that is still queued or running. Queued: it will never be begun."""
        with self._lock:
            if job.state == QUEUED:
                self.waiting -= 1
            began, job.state = job.state == BEGUN, GIVEN_UP
            if len(self._queue) > 2 * self.waiting + SLACK:  # the thread hangs, and what it left must not pile up
                self._queue = deque(job for job in self._queue if job.state == QUEUED)
                self._large = sum(len(job.call.body) > INLINE_BYTES for job in self._queue)
        if began and self._own is not None:
            self._own.give_up(job)

    def stuck_s(self) -> float:
        """For how many seconds the thread has run something that nobody waits for any more; 0: it has not."""
        now = time.monotonic()
        began = [b.began for b in list(self._running.values()) if all(j.state == GIVEN_UP for j in b.jobs)]
        return now - min(began) if began else 0.0

    def close(self) -> None:
        """Tells the thread to end; it is a daemon, so user code that hangs does not keep the process."""
        self._closed = True
        if self._own is not None:
            self._own.close()
        self._wake.release()

    # In the event loop --------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Runs what is queued here if that is short, else wakes the thread."""
        self._turn_due = False
        if self._working or not (self._queue or self._planned):
            return
        if not self._is_short():
            self._hand_over()
            return
        self._turning = True
        try:
            self._run_here()
        finally:
            self._turning = False
        if self._queue or self._planned:
            self._turn_soon()

    def _is_short(self) -> bool:
        """Whether the next predictions may run on the event loop."""
        return self.runner is not None and self.runner.inline and self._typical_ns < INLINE_NS and not self._large

    def _run_here(self) -> None:
        runner = self.runner
        assert runner is not None
        end = time.perf_counter_ns() + INLINE_NS
        while (batch := self._next(runner)) is not None:
            self._process(runner, batch)
            if batch.jobs:
                self._last_calls = len(batch.jobs)
                self._done((batch,))
            if time.perf_counter_ns() >= end:
                return

    def _turn_soon(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._patience.begin(len(self._queue))
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Begins, or lets the loop take a turn for what is on its way."""
        batched = self.trickle and self.runner is not None and self.runner.batched
        if not batched or self._planned or self._patience.enough(len(self._queue), self._max_rows):
            self._turn()
        else:
            self._loop.call_soon(self._look)

    def _hand_over(self) -> None:
        for batch in self._planned:
            for job in batch.jobs:
                self._watch(job)
        for job in self._queue:
            self._watch(job)
        self._working = True
        self._wake.release()

    def _collect(self) -> None:
        self._told = False  # before looking: what is appended from now on wakes us again
        batches = []
        while self._ended:
            batches.append(self._ended.popleft())
        if batches:
            self._done(batches)
        if not self._working and (self._queue or self._planned) and self._own is None:
            self._turn_soon()

    # In the event loop or in the worker's thread ------------------------------------------------------------------

    def _next(self, runner: Runner) -> Batch | None:
        """The next batch, of what is queued now; None: nothing is."""
        while not self._planned:
            jobs: list[Job] = []
            most = self._max_rows
            with self._lock:
                while self._queue and len(jobs) < most:
                    job = self._queue.popleft()
                    self._large -= len(job.call.body) > INLINE_BYTES
                    if job.state == QUEUED:
                        if not jobs and runner.batched:
                            most = self.speed.together(job.deadline, most)
                        jobs.append(job)
            if not jobs:
                return None
            self._planned.extend(plan(runner, jobs, self._max_rows))
        return self._planned.popleft()

    def _claim(self, batch: Batch) -> None:
        """Begins the jobs that were not given up meanwhile; the others leave the batch."""
        with self._lock:
            batch.jobs = [job for job in batch.jobs if job.state == QUEUED]
            for job in batch.jobs:
                job.state = BEGUN
            self.waiting -= len(batch.jobs)
        batch.began = time.monotonic()
        self.speed.begun(len(batch.jobs), batch.began)

    def _process(self, runner: Runner, batch: Batch) -> None:
        self._claim(batch)
        if not batch.jobs:
            return
        began, more = time.perf_counter_ns(), self.waiting > 0
        self._running[id(batch)] = batch
        execute(runner, batch)
        del self._running[id(batch)]
        took = time.perf_counter_ns() - began
        self.speed.ended(len(batch.jobs))
        self.speed.took(took / 1e9, len(batch.jobs), more)
        self._typical_ns = max(took if took > 4 * INLINE_NS else 0, (self._typical_ns * 7 + took) // 8)

    # In the worker's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            runner = self._open()
        except BaseException as exc:  # noqa: BLE001 - carried to whoever waits for the model
            self._tell_opened(None, exc)
            return
        if runner.asynchronous:
            with AsyncWork(runner, self._next, self._claim, self._running, self._give_back, self.speed) as own:
                self._own = own
                self._tell_opened(runner, None)
                own.run()
            return
        self._tell_opened(runner, None)
        while True:
            self._wake.acquire()
            if self._closed:
                return
            self._work_off(runner)

    def _work_off(self, runner: Runner) -> None:
        """Until nothing is queued. After a long prediction that may answer many the event loop comes first: it sends
        the answers, takes in the calls that they bring, and wakes us for all of them."""
        while True:
            batch = self._next(runner)
            if batch is None:
                with self._lock:
                    self._working = bool(self._queue)
                if not self._working:
                    return
                continue
            self._process(runner, batch)
            last = runner.batched and not self._planned and batch.model_ns > INLINE_NS
            if last:
                self._working = False
            if batch.jobs:
                self._give_back((batch,))
            if last:
                self._tell()
                return

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

    def _give_back(self, batches: Iterable[Batch]) -> None:
        """Hands ended batches to the event loop; one wake-up takes all that ended meanwhile."""
        self._ended.extend(batches)
        self._tell()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._collect)
