"""Is anything missing? What each scoring process wrote against what arrived."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from ..core.documents import Range, rfc3339
from ..kernel.service import Context
from .model import CaptureStream, Process, Run, added

PAGE = 500


async def verify(ctx: Context, stream: CaptureStream, start: datetime | None, end: datetime | None) -> dict[str, Any]:
    """The answer of ``GET /v1/capture/{deployment}/verify`` for the processes that ran in this stretch of time."""
    processes: list[Process] = []
    where: dict[str, object] = {"deployment": stream.id}
    if start is not None:
        where["seen"] = Range(gte=start)
    after: tuple[str | int | float, str] | None = None
    while True:
        page = await ctx.store.find(Process, where, workspace=stream.workspace, order="seen", after=after, limit=PAGE)
        processes += [p for p in page if end is None or (p.started or p.seen) < end]
        if len(page) < PAGE:
            break
        after = (rfc3339(page[-1].seen), page[-1].id)
    return answer(stream.id, processes)


def answer(deployment: str, processes: Iterable[Process]) -> dict[str, Any]:
    """``state`` of each process, and the totals. ``missing`` counts records known to have been written."""
    told, not_recorded = [], dict[str, int]()
    totals = {"recorded": 0, "collected": 0, "missing": 0, "damaged": 0, "rows_lost": 0}
    for process in sorted(processes, key=lambda p: (p.started or p.seen, p.id)):
        one = describe(process)
        told.append(one)
        not_recorded = added(not_recorded, process.not_recorded)
        totals = added(totals, {name: one[name] for name in totals})
    return {"deployment": deployment, "complete": not totals["missing"] and not any(p["state"] == "gaps" for p in told),
            "processes": told, "totals": {**totals, "not_recorded": not_recorded}}


def describe(process: Process) -> dict[str, Any]:
    """One process: ``gaps`` are sequences, ``lost_segments`` numbers of segments; both ends included."""
    return {
        "replica": process.replica, "image": process.image, "models": process.models, "state": process.state,
        "started": rfc3339(process.started) if process.started else None,
        "ended": rfc3339(process.ended) if process.ended else None, "seen": rfc3339(process.seen),
        "recorded": _length(process.runs), "collected": _length(process.collected), "missing": _length(process.gaps),
        "gaps": process.gaps, "collector_gaps": process.collector_gaps, "lost_segments": process.lost_segments,
        "not_recorded": process.not_recorded, "rows_lost": process.rows_lost, "damaged": process.damaged,
    }


def _length(runs: Iterable[Run]) -> int:
    return sum(b - a + 1 for a, b in runs)
