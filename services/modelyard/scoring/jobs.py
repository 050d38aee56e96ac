"""Jobs and batches: admitted calls on their way through a model's lane."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..core.errors import ModelyardError
from .calls import Answer, Asked, Call, PastDeadline, Served
from .parts import Part

if TYPE_CHECKING:
    from .lanes import Lane

QUEUED, BEGUN, GIVEN_UP = range(3)
Done = Callable[[Answer], None]


class Outcome(NamedTuple):
    """How a job ended: an error, or the answer's bytes and their type."""

    error: ModelyardError | None
    body: bytes = b""
    body_type: str = ""


class Job:
    """One admitted call. Settled once, by the event loop; what comes later is dropped."""

    __slots__ = ("answer", "arrived", "asked", "call", "deadline", "done", "lane", "outcome", "part", "prediction_id",
                 "queue_ns", "served", "started_ns", "state")

    def __init__(self, call: Call, prediction_id: str, done: Done) -> None:
        self.call = call
        self.prediction_id = prediction_id
        self.done = done
        self.started_ns = time.time_ns()
        self.arrived = time.perf_counter_ns()
        self.queue_ns = -1
        """The time it waited before it was begun; -1: it was not."""
        self.deadline = math.inf
        self.asked: Asked
        self.served: Served
        self.part: Part | None = None
        self.lane: Lane | None = None
        self.answer: Answer | None = None
        self.outcome: Outcome | None = None
        self.state = QUEUED

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
