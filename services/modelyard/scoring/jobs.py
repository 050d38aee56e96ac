"""Jobs and batches: admitted calls on their way through a model's lane."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.errors import ModelyardError
from .calls import Answer, Asked, Call, PastDeadline, Served, statuses
from .ids import new_id
from .parts import Part
from .tally import Finished

if TYPE_CHECKING:
    from .lanes import Lane

QUEUED, BEGUN, GIVEN_UP = range(3)
Done = Callable[[Answer], None]
Outcome = tuple[ModelyardError | None, bytes, str]
"""How a job ended: an error, or the answer's bytes and their type. Put in its place at once: a thread may come late."""


def failed(error: ModelyardError) -> Outcome:
    """The outcome of a job that has no result."""
    return error, b"", ""


class Job(Finished):
    """One admitted call, from arrival to answer: in the end it is what is recorded of it (``Finished``) and what is
    answered (``calls.Answer``). Settled once, by the event loop; what comes later is dropped."""

    __slots__ = ("arrived", "asked", "body", "body_type", "call", "deadline", "done", "error", "lane", "outcome",
                 "part", "served", "settled", "state")

    def __init__(self, call: Call, done: Done) -> None:
        self.call = call
        self.done = done
        self.started_ns = now = time.time_ns()
        self.prediction_id = new_id(now)
        if not call.request_id:
            call.request_id = self.prediction_id
        self.request_id = call.request_id
        self.arrived = time.perf_counter_ns()
        self.queue_ns = -1
        """The time it waited before it was begun; -1: it was not."""
        self.deadline = math.inf
        self.model = ""
        self.asked: Asked
        self.served: Served
        self.part: Part | None = None
        self.lane: Lane | None = None
        self.outcome: Outcome | None = None
        self.error: ModelyardError | None
        self.body: bytes
        self.body_type: str
        self.settled = False
        self.state = QUEUED

    def settle(self, ticks: int) -> None:
        """It is over: its outcome is answered, and recorded before."""
        assert self.outcome is not None
        self.settled = True
        call = self.call
        self.error, body, body_type = self.outcome
        if self.error is None:
            self.status = "OK"
        else:
            self.status = statuses(self.error)[0]
            body, body_type = call.codec.write_error(call, self.error)
        self.body = self.response = body
        self.body_type = self.response_type = body_type
        self.request, self.request_type, self.protocol, self.method = call.body, call.body_type, call.protocol, \
            call.method
        self.trace_id, self.parent = call.trace_id, call.parent
        self.latency_ns = ticks - self.arrived
        if self.queue_ns < 0:
            self.queue_ns = self.latency_ns

    @property
    def waited_ns(self) -> int:
        return time.perf_counter_ns() - self.arrived


class Batch:
    """Jobs that one prediction answers (or one by one, where they cannot be joined)."""

    __slots__ = ("began", "calls", "jobs", "model_ns")

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.began = 0.0
        """``time.monotonic()``."""
        self.calls = 0
        """How many calls the largest prediction answered; 0: none ran."""
        self.model_ns = 0


def late() -> PastDeadline:
    """The error of a call that was not begun in time."""
    return PastDeadline("the deadline passed before the call was begun; it was not run")
