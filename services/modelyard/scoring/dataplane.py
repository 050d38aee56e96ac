"""The data plane: every call of every protocol comes through ``handle``, in lists.

Admit (size, name, queue, pressure) → run in the model's lane → capture → answer. A refused call is counted only;
an admitted one is recorded by capture before its answer leaves, whatever its outcome.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Protocol

from ..core.errors import ModelyardError, TooLarge, Unavailable
from .calls import Answer, Call, Cancelled, PastDeadline, Plane, QueueFull, Served, statuses
from .capture import CaptureLog, Finished
from .image import Image
from .lanes import Job, Lane, Outcome, late
from .metrics import Metrics
from .runners import Runner, openers
from .settings import Limits
from .table import Table

UNKNOWN = "(unknown)"
PRESSURE_S = 0.02


class Log(Protocol):
    """What the data plane needs of capture."""

    on_pressure: str

    @property
    def pressed(self) -> bool: ...
    def append(self, calls: Sequence[Finished]) -> None: ...
    def refused(self, model: str, status: str, started_ns: int | None = None) -> None: ...


def new_id() -> str:
    """A prediction id: 32 hexadecimal digits that sort by time."""
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


class DataPlane(Plane):
    """Behind every transport. ``load`` first; ``handle`` refuses with Unavailable until then."""

    def __init__(self, deployment: str, limits: Limits, log: CaptureLog | Log | None = None) -> None:
        self.deployment = deployment
        self.limits = limits
        self.metrics = Metrics()
        self.last_call = 0.0
        self._log = log
        self._table: Table | None = None
        self._lanes: list[Lane] = []
        self._draining = False
        self.metrics.gauge("modelyard_scoring_queue", "Calls waiting for their model.", "model",
                           lambda: {lane.name: lane.waiting for lane in self._lanes})

    async def load(self, image: Image, image_version: str = "") -> None:
        """Opens every model in its own thread. Raises CannotStart."""
        made = []
        for models, open_runner in openers(image):
            name = models[0].id if len(models) == 1 else self.deployment
            made.append((models, Lane(name, open_runner, self._finish)))
        self._lanes = [lane for _, lane in made]
        await asyncio.gather(*(lane.open() for lane in self._lanes))
        self._table = Table(self.deployment, image, image_version, made)

    @property
    def ready(self) -> bool:
        return self._table is not None and not self._draining

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Not ready any more; calls are still answered."""
        self._draining = True

    def close(self) -> None:
        """Ends the lanes. What still runs is not waited for."""
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
        self.last_call = time.monotonic()
        self.metrics.in_flight += len(calls)
        try:
            if self._log is not None and self._log.on_pressure == "block":
                await self._wait_for_room(self._log, calls)
            jobs = [self._admit(call) for call in calls]
            ended = [job for job in jobs if job.answer is None and job.future is None]
            if ended:
                self._finish(ended)
            await self._settle(jobs)
            return [job.answer for job in jobs if job.answer is not None]
        finally:
            self.metrics.in_flight -= len(calls)

    async def _settle(self, jobs: Sequence[Job]) -> None:
        try:
            for job in jobs:
                if job.answer is None and job.future is not None:
                    await job.future
        except asyncio.CancelledError:
            self._give_up([j for j in jobs if j.answer is None], Cancelled("the caller went away"))
            raise

    def _admit(self, call: Call) -> Job:
        """A job that is queued (it has a future), ended (an outcome) or refused (an answer)."""
        job = Job(call, new_id())
        if not call.request_id:
            call.request_id = job.prediction_id
        try:
            self._begin(job)
        except ModelyardError as exc:
            self._refuse(job, exc)
        return job

    def _begin(self, job: Job) -> None:
        call, limits = job.call, self.limits
        if len(call.body) > limits.max_message_bytes:
            raise too_large(limits.max_message_bytes, len(call.body))
        if self._log is not None and self._log.pressed:
            raise QueueFull("the capture spool is full, and calls must not go unrecorded (capture.on_pressure)",
                            retry_after=1)
        table = self.table
        job.asked = call.codec.open(call)
        name = job.asked.model or call.model or table.default
        job.served, entry = table.find(name, job.asked.version or call.version)
        lane = job.lane = entry.lane
        if lane.waiting >= limits.max_queue:
            raise QueueFull(f"{limits.max_queue} calls wait for '{job.served.name}' already; try again soon",
                            retry_after=1)
        now = time.monotonic()
        job.deadline = min(call.deadline, now + limits.timeout_ms / 1000)
        if now >= job.deadline:
            job.outcome = Outcome(late(), b"", "", 0)
        elif lane.may_inline(job):
            lane.run_inline(job)
        else:
            lane.submit(job)
            loop = asyncio.get_running_loop()
            job.timer = loop.call_at(loop.time() + job.deadline - now, self._expire, job)

    def _refuse(self, job: Job, error: ModelyardError) -> None:
        status, _ = statuses(error)
        model = job.served.model if job.lane is not None else UNKNOWN
        self.metrics.refused(job.call.protocol, status)
        if self._log is not None:
            self._log.refused(model, status, job.started_ns)
        body, body_type = job.call.codec.write_error(job.call, error)
        job.answer = Answer(body, body_type, status, job.call.request_id, job.prediction_id, "", error)

    def _expire(self, job: Job) -> None:
        if job.answer is None:
            self._give_up([job], PastDeadline("no answer before the deadline"))

    def _give_up(self, jobs: Sequence[Job], error: ModelyardError) -> None:
        """Settles jobs that are still queued or running; what becomes of them in the lane is dropped."""
        for job in jobs:
            if job.lane is not None:
                job.lane.give_up(job)
            job.outcome = Outcome(error, b"", "", job.waited_ns)
        self._finish(jobs)

    def _finish(self, jobs: Sequence[Job]) -> None:
        """Answers jobs that have an outcome: first capture, then the reply."""
        finished = [self._answer(job) for job in jobs]
        if self._log is not None:
            self._log.append(finished)
        for job in jobs:
            if job.timer is not None:
                job.timer.cancel()
            if job.future is not None and not job.future.done():
                job.future.set_result(None)

    def _answer(self, job: Job) -> Finished:
        call, served, outcome = job.call, job.served, job.outcome
        assert outcome is not None
        error, body, body_type, queue_ns = outcome
        status = "OK"
        if error is not None:
            status = statuses(error)[0]
            body, body_type = call.codec.write_error(call, error)
        job.answer = Answer(body, body_type, status, call.request_id, job.prediction_id, served.model, error)
        latency = job.waited_ns
        self.metrics.finished(served.model, call.protocol, status, latency / 1e9)
        return Finished(job.prediction_id, call.request_id, served.model, call.protocol, call.method, status,
                        job.started_ns, latency, queue_ns, call.body, call.body_type, body, body_type, call.trace_id)

    async def _wait_for_room(self, log: Log, calls: Sequence[Call]) -> None:
        """Until the shipper has made room in the spool, or a deadline is there (then ``_begin`` refuses)."""
        end = min(*(call.deadline for call in calls), time.monotonic() + self.limits.timeout_ms / 1000)
        while log.pressed and time.monotonic() < end:  # noqa: ASYNC110 - another process makes the room
            await asyncio.sleep(PRESSURE_S)


def too_large(limit: int, size: int | None = None) -> TooLarge:
    """The error for a message over the limit, which it states."""
    given = f"{size} bytes are" if size is not None else "the message is"
    return TooLarge(f"{given} more than the limit of {limit} bytes (limits.max_message_bytes)", limit=limit)
