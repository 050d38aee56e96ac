"""From queued jobs to outcomes: read, join what may be joined, ask the runner, take apart, write.

Nothing here raises, but for the cancellation of an async ``run``: whatever goes wrong is the outcome of the calls that
it concerns. A prediction that raises for several calls is repeated for each half of them, down to the bad call.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from ..core.errors import ModelyardError
from .calls import Served, Writer, WrongRows
from .context import CURRENT, Current
from .jobs import QUEUED, Batch, Job, failed, late
from .parts import Rows
from .runners import Runner, log_failure


def plan(runner: Runner, jobs: Iterable[Job], max_rows: int) -> list[Batch]:
    """The batches that these jobs make, in order of their first calls. A call is never split; one of more than
    ``max_rows`` rows is a batch alone, as is each call that may not be joined."""
    if not runner.batched:
        return [Batch([job]) for job in jobs]
    batches: list[Batch] = []
    open_: dict[Hashable, tuple[Batch, int]] = {}
    for job in jobs:
        key = _prepare(runner, job) if job.state == QUEUED else None
        if key is None or job.part is None:
            batches.append(Batch([job]))
            continue
        batch, rows = open_.get(key, (None, 0))
        rows += job.part.rows
        if batch is None or rows > max_rows:
            batch, rows = Batch([]), job.part.rows
            batches.append(batch)
        batch.jobs.append(job)
        open_[key] = batch, rows
    return batches


def _prepare(runner: Runner, job: Job) -> Hashable:
    """Reads a call and makes its part; what is wrong with it is its outcome."""
    try:
        part = runner.known(job.asked)
        if part is None:
            job.call.codec.read(job.asked)
            part = runner.prepare(job.asked)
        job.part = part
        return part.key
    except ModelyardError as exc:
        job.outcome = failed(exc)
    except BaseException:  # noqa: BLE001 - one call's failure, whatever it is, must not end the thread
        job.outcome = failed(log_failure())
    return None


def execute(runner: Runner, batch: Batch) -> None:
    """Runs what is still to be run of a batch whose jobs are begun."""
    todo = deque([batch.jobs])
    while todo:
        jobs = _wanted(todo.popleft())
        if not jobs:
            continue
        token = _enter(jobs)
        try:
            if len(jobs) == 1:
                _alone(runner, batch, jobs[0])
            elif not _together(runner, batch, jobs):
                todo.extendleft(_less(runner, jobs))
        finally:
            CURRENT.reset(token)


def _together(runner: Runner, batch: Batch, jobs: Sequence[Job]) -> bool:
    began = time.perf_counter_ns()
    try:
        results = runner.many([job.part for job in jobs])  # type: ignore[misc]
    except BaseException as exc:  # noqa: BLE001 - as above; it is told by the call whose own it is
        results = exc
    return _given(batch, jobs, results, began)


def _alone(runner: Runner, batch: Batch, job: Job) -> None:
    try:
        if job.part is None:
            job.call.codec.read(job.asked)
        began = time.perf_counter_ns()
        result = runner.run(job.asked) if job.part is None else runner.one(job.part)
        _ran(batch, 1, began)
        job.outcome = (None, *job.call.codec.write(job.asked, result, job.served))
    except ModelyardError as exc:
        job.outcome = failed(exc)
    except BaseException:  # noqa: BLE001 - as above
        job.outcome = failed(log_failure())


async def execute_awaiting(runner: Runner, batch: Batch) -> None:
    """As ``execute``, for an async runner. Raises CancelledError when it is cancelled."""
    todo = deque([batch.jobs])
    while todo:
        jobs = _wanted(todo.popleft())
        if not jobs:
            continue
        _enter(jobs)
        if len(jobs) == 1:
            await _alone_awaiting(runner, batch, jobs[0])
        elif not await _together_awaiting(runner, batch, jobs):
            todo.extendleft(_less(runner, jobs))


async def _together_awaiting(runner: Runner, batch: Batch, jobs: Sequence[Job]) -> bool:
    began = time.perf_counter_ns()
    try:
        results = await runner.many([job.part for job in jobs])  # type: ignore[misc]
    except BaseException as exc:  # noqa: BLE001 - as above
        _raise_if_cancelled(exc)
        results = exc
    return _given(batch, jobs, results, began)


async def _alone_awaiting(runner: Runner, batch: Batch, job: Job) -> None:
    try:
        if job.part is None:
            job.call.codec.read(job.asked)
        began = time.perf_counter_ns()
        result = await (runner.run(job.asked) if job.part is None else runner.one(job.part))
        _ran(batch, 1, began)
        job.outcome = (None, *job.call.codec.write(job.asked, result, job.served))
    except ModelyardError as exc:
        job.outcome = failed(exc)
    except BaseException as exc:  # noqa: BLE001 - as above
        _raise_if_cancelled(exc)
        job.outcome = failed(log_failure())


def _raise_if_cancelled(exc: BaseException) -> None:
    """A cancellation of ours goes on; one that user code raised by itself is its failure."""
    task = asyncio.current_task()
    if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
        raise exc


def _wanted(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are to be run now: without an outcome yet, and in time."""
    now, ticks = time.monotonic(), time.perf_counter_ns()
    wanted = []
    for job in jobs:
        if job.outcome is not None:
            continue
        if job.queue_ns < 0:
            job.queue_ns = ticks - job.arrived
        if now >= job.deadline:
            job.outcome = failed(late())
        else:
            wanted.append(job)
    return wanted


def _enter(jobs: Sequence[Job]) -> Any:
    """What user code may know of the call, or of the calls, that it is in. A pickled model may be user code too."""
    first = jobs[0]
    rows = tuple([(job.prediction_id, job.part.rows) for job in jobs if job.part is not None]) \
        if len(jobs) > 1 else ()
    return CURRENT.set(Current(first.prediction_id, first.request_id, first.served.model, rows))


def _ran(batch: Batch, calls: int, began: int) -> None:
    batch.calls = max(batch.calls, calls)
    batch.model_ns += time.perf_counter_ns() - began


def _less(runner: Runner, jobs: list[Job]) -> list[list[Job]]:
    """What is asked next when ``jobs`` cannot be answered together, last first: each half, and where rows turned out
    not to go together each job."""
    if not runner.batched:
        return [[job] for job in reversed(jobs)]
    middle = len(jobs) // 2
    return [jobs[middle:], jobs[:middle]]


def _given(batch: Batch, jobs: Sequence[Job], results: Any, began: int) -> bool:
    """Gives each call what it has of a prediction for all. False: there was none."""
    _ran(batch, 0 if isinstance(results, BaseException) else len(jobs), began)
    if isinstance(results, WrongRows):
        for job in jobs:
            job.outcome = failed(results)
        return True
    if isinstance(results, BaseException):
        return False
    if type(results) is Rows:
        _write(jobs, results)
        return True
    for job, result in zip(jobs, results, strict=True):
        try:
            job.outcome = (None, *job.call.codec.write(job.asked, result, job.served))
        except ModelyardError as exc:
            job.outcome = failed(exc)
        except BaseException:  # noqa: BLE001 - a result may hold anything, also what raises when it is looked at
            job.outcome = failed(log_failure())
    return True


def _write(jobs: Sequence[Job], rows: Rows) -> None:
    """As above, of arrays: what calls of one codec have in common is looked at once."""
    served: Served | None = None
    writer: Writer | None = None
    codec = None
    for job, (start, end) in zip(jobs, rows.edges, strict=True):
        try:
            if job.served is not served or job.call.codec is not codec:
                served, codec = job.served, job.call.codec
                writer = codec.writer(rows, served)
            written = writer(job.asked, start, end) if writer is not None else None
            if written is None:
                written = job.call.codec.write(job.asked, rows.piece(start, end), job.served)
            job.outcome = None, written[0], written[1]
        except ModelyardError as exc:
            job.outcome = failed(exc)
        except BaseException:  # noqa: BLE001 - as above
            job.outcome = failed(log_failure())
