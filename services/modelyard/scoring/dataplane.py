"""The data plane: every call of every protocol comes through ``submit``.

Admit (size, name, queue, pressure) → run in the model's lane → capture → answer. A refused call is counted only;
an admitted one is recorded by capture before its answer leaves, whatever its outcome. Calls that one batch answered
are recorded by one append.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from ..core.errors import ModelyardError, Unavailable
from .calls import Answer, Call, Cancelled, PastDeadline, Plane, QueueFull, Served, SpoolFull, statuses, too_large
from .capture import CaptureLog, Finished
from .deadlines import Deadlines
from .held import Held
from .image import Image
from .jobs import Batch, Job, failed, late
from .lanes import Lane
from .metrics import Metrics
from .otlp import Otlp
from .records import Names
from .runners import Runner, openers
from .settings import Limits
from .table import Table
from .transport import request_id

UNKNOWN = "(unknown)"
STUCK_S = 60.0
"""A model's thread that has run for so long what nobody waits for any more will not come back."""
LATE = "no answer before the deadline"
NO_ROOM = "the capture spool is full or cannot be written, and calls must not go unrecorded (capture.on_pressure)"


class Log(Protocol):
    """What the data plane needs of capture."""

    on_pressure: str

    @property
    def pressed(self) -> bool: ...
    @property
    def sampling_header(self) -> str: ...
    @property
    def keyed(self) -> bool: ...
    @property
    def totals(self) -> Mapping[str, int]: ...
    def learn(self, model: str, names: Names) -> None: ...
    def expect(self, prediction_id: str, call: Call, model: str = ...) -> None: ...
    def append(self, calls: Sequence[Finished]) -> None: ...
    def refused(self, model: str, status: str, started_ns: int | None = None, reason: str = ...) -> None: ...


class DataPlane(Plane):
    """Behind every transport. ``load`` first; ``handle`` refuses with Unavailable until then."""

    def __init__(self, deployment: str, limits: Limits, log: CaptureLog | Log | None = None) -> None:
        self.deployment = deployment
        self.limits = limits
        self._timeout_s = limits.timeout_ms / 1000
        self.metrics = Metrics()
        self.last_call = 0.0
        self.otlp: Otlp | None = None
        self._log = log
        self._table: Table | None = None
        self._lanes: list[Lane] = []
        self._draining = self._trickle = False
        self._held = Held(self._begin, lambda: log is not None and log.pressed)
        self._deadlines = Deadlines(self._expire)
        self._stuck_s = max(float(os.environ.get("MODELYARD_STUCK_S") or STUCK_S), 2 * self._timeout_s)
        self.metrics.gauge("modelyard_scoring_queue", "Calls waiting for their model.", "model",
                           lambda: {lane.name: lane.waiting for lane in self._lanes})
        self._keyed = log if log is not None and log.keyed else None
        if log is not None:
            self.metrics.gauge("modelyard_scoring_capture", "Calls recorded, not recorded by reason, and held for want "
                               "of room; rows collected and lost.", "what",
                               lambda: {**log.totals, "held": self._held.in_all})

    async def load(self, image: Image, image_version: str = "") -> None:
        """Opens every model in its own thread. Raises CannotStart."""
        made = []
        for models, open_runner in openers(image):
            name = models[0].id if len(models) == 1 else self.deployment
            made.append((models, Lane(name, open_runner, self._ended, self._deadlines.watch,
                                      self.limits.max_batch_rows)))
        self._lanes = [lane for _, lane in made]
        for lane in self._lanes:
            lane.trickle = self._trickle
        await asyncio.gather(*(lane.open() for lane in self._lanes))
        table = Table(self.deployment, image, image_version, made)
        if self._log is not None:
            for entry in table.entries:
                assert entry.lane.runner is not None
                self._log.learn(entry.model, entry.lane.runner.names)
        self._table = table

    def calls_trickle(self) -> None:
        """A transport takes several turns of the loop to hand over what has arrived: batches wait for that. Before
        ``load``."""
        self._trickle = True

    @property
    def ready(self) -> bool:
        return self._table is not None and not self._draining and not self.stuck

    @property
    def stuck(self) -> str:
        """Which model's code hangs, in words; "" when none does. Only a new process helps then."""
        for lane in self._lanes:
            if (seconds := lane.stuck_s()) > self._stuck_s:
                return f"'{lane.name}' hangs: what nobody waits for any more runs for {seconds:.0f} s"
        return ""

    @property
    def sampling_header(self) -> str:
        return "" if self._log is None else self._log.sampling_header

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Not ready any more; calls are still answered."""
        self._draining = True

    def close(self) -> None:
        """Ends the lanes. What still runs is not waited for."""
        self._deadlines.close()
        for lane in self._lanes:
            lane.close()

    @property
    def table(self) -> Table:
        """Who answers. Raises Unavailable before the models are loaded."""
        if self._table is None:
            raise Unavailable("the models are being loaded; try again soon", retry_after=1)
        return self._table

    def about(self, name: str, version: str = "") -> tuple[Served, Runner]:
        """Who answers under a name. Raises NotFound, Unavailable."""
        served, entry = self.table.find(name, version)
        assert entry.lane.runner is not None
        return served, entry.lane.runner

    async def handle(self, calls: Sequence[Call]) -> list[Answer]:
        """Answers in order. When it is cancelled (the caller went away) what was not begun never runs."""
        loop = asyncio.get_running_loop()
        if len(calls) == 1:
            future: asyncio.Future[Answer] = loop.create_future()
            jobs = [self.submit(calls[0], partial(_settle, future))]
        else:
            future = loop.create_future()
            left = len(calls)

            def one(answer: Answer) -> None:
                nonlocal left
                left -= 1
                if not left:
                    _settle(future, answer)

            jobs = [self.submit(call, one) for call in calls]
        try:
            if calls:
                await future
        except asyncio.CancelledError:
            self._give_up([job for job in jobs if not job.settled], Cancelled("the caller went away"))
            raise
        return list(jobs)

    def submit(self, call: Call, done: Callable[[Answer], None]) -> Job:
        job = Job(call, done)
        self.metrics.in_flight += 1
        try:
            waits = self._admit(job)
        except ModelyardError as exc:
            self._refuse(job, exc)
            return job
        if waits:
            self._held.add(job)
            self._deadlines.watch(job)
        else:
            self._begin(job)
        return job

    def cancel(self, submitted: Job) -> None:
        if not submitted.settled:
            self._give_up([submitted], Cancelled("the caller went away"))

    def _admit(self, job: Job) -> bool:
        """Who is to answer, and by when. True: it has to wait for room in the spool first. Raises why it is refused."""
        call, limits = job.call, self.limits
        if len(call.body) > limits.max_message_bytes:
            raise too_large(limits.max_message_bytes, len(call.body))
        job.asked = asked = call.codec.open(call)
        if asked.id and call.protocol == "stream" and (own := request_id(asked.id)):  # its messages share the headers
            job.request_id = call.request_id = own
        table = self._table or self.table
        job.served, entry = table.find(asked.model or call.model or table.default, asked.version or call.version)
        job.model = job.served.model
        lane = job.lane = entry.lane
        self.last_call = now = time.monotonic()
        job.deadline = min(call.deadline, now + self._timeout_s)
        if (log := self._log) is None or log.on_pressure == "drop" or not (self._held or log.pressed):
            return False
        if log.on_pressure == "reject":
            raise SpoolFull(NO_ROOM, retry_after=1)
        if self._held.of(lane) + lane.waiting >= limits.max_queue:
            raise self._queue_full(job)
        return True

    def _begin(self, job: Job) -> None:
        """Queues the job, or answers it at once: it is refused, or too late."""
        lane, left_s = job.lane, job.deadline - time.monotonic()
        assert lane is not None
        error: ModelyardError | None = None
        if lane.waiting >= self.limits.max_queue and not lane.make_room():
            error = self._queue_full(job)
        elif left_s > 0 and (wait_s := lane.hopeless(left_s)):
            error = QueueFull(f"{lane.waiting} calls wait for '{job.served.name}' already, about {wait_s:.1f} s; try "
                              f"again soon, or with more time than {left_s:.1f} s", retry_after=math.ceil(wait_s))
        if error is not None:
            self._refuse(job, error)
            return
        if self._keyed is not None:
            self._keyed.expect(job.prediction_id, job.call, job.served.model)
        if left_s > 0:
            lane.submit(job)
        else:
            job.outcome = failed(late())
            self._finish((job,))

    def _queue_full(self, job: Job) -> QueueFull:
        return QueueFull(f"{self.limits.max_queue} calls wait for '{job.served.name}' already; try again soon",
                         retry_after=1)

    def refused(self, protocol: str, error: ModelyardError, scoring: bool = True) -> None:
        """Counts what a transport has refused itself; ``scoring``: it would have been a call, else a question."""
        status = statuses(error)[0]
        self.metrics.refused(protocol, status)
        if scoring and self._log is not None:
            self._log.refused(UNKNOWN, status)

    def _refuse(self, job: Job, error: ModelyardError, reason: str = "refused") -> None:
        model, job.model = job.model if job.lane is not None else UNKNOWN, ""
        job.outcome = failed(error)
        job.settle(time.perf_counter_ns())
        self.last_call = time.monotonic()
        self.metrics.refused(job.call.protocol, job.status)
        if self._log is not None:
            self._log.refused(model, job.status, job.started_ns, "pressed" if isinstance(error, SpoolFull) else reason)
        self._deadlines.forget((job,))
        self.metrics.in_flight -= 1
        job.done(job)

    def _expire(self, jobs: Sequence[Job]) -> None:
        self._give_up([job for job in jobs if not job.settled], PastDeadline(LATE))

    def _give_up(self, jobs: Sequence[Job], error: ModelyardError) -> None:
        """Settles jobs that are still queued or running; what becomes of them in the lane is dropped."""
        admitted = []
        for job in jobs:
            if self._held.leave(job):  # for want of room, whatever ended it
                self._refuse(job, SpoolFull(NO_ROOM, retry_after=1) if isinstance(error, PastDeadline) else error,
                             "pressed")
                continue
            assert job.lane is not None
            job.lane.give_up(job)
            job.outcome = failed(error)
            admitted.append(job)
        if admitted:
            self._finish(admitted)

    def _ended(self, batches: Iterable[Batch]) -> None:
        """A lane has worked off these batches."""
        jobs = []
        for batch in batches:
            if batch.calls:
                self.metrics.batch(batch.jobs[0].served.model, batch.calls, batch.model_ns)
            jobs += [job for job in batch.jobs if not job.settled]
        if jobs:
            self._finish(jobs)

    def _finish(self, jobs: Sequence[Job]) -> None:
        """Answers jobs that have an outcome: first capture, then the reply."""
        ticks = time.perf_counter_ns()
        for job in jobs:
            job.settle(ticks)
        self.metrics.finished(jobs)
        if self._log is not None:
            self._log.append(jobs)
        if self.otlp is not None and self.otlp.plan.traces:
            self.otlp.offer(jobs)
        self.metrics.in_flight -= len(jobs)
        self._deadlines.forget(jobs)
        for job in jobs:
            job.done(job)


def _settle(future: asyncio.Future[Any], answer: Answer) -> None:
    if not future.done():
        future.set_result(answer)
