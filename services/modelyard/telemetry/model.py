"""What telemetry keeps: a stream per deployment, a manifest per raw segment, a record per scoring process, windows.

Everything here can be repeated: a segment's manifest has an id made from its replica and number, and a process
absorbs a number once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from ..core.documents import Document, Part, Time
from ..core.segments import LOSSES
from .windows import Cell

Run = tuple[int, int]
"""``first <= n <= last``, both there."""


class CaptureStream(Document):
    """The ingest of one deployment; its id is the deployment's name. Never deleted with the deployment: what was
    captured stays until its retention ends."""

    kind: ClassVar[str] = "capture-stream"

    retention_days: int = 30
    image: str = ""
    gone: bool = False
    heard: str = ""
    """The sequence of the newest deployment event heeded: a repeat may come after newer ones."""
    aside: list[str] = []
    """Raw segments that cannot be told to belong to an image: left where they are."""
    unsettled: list[int] = []
    """Starts (epoch seconds) of windows with contributions that ``telemetry.window`` has not told of yet."""
    longest_s: float = 0.0
    """The longest time any segment spans: how far before a moment a segment that holds it may begin."""
    busy: Time | None = None
    """When a segment was last found."""
    sweep: Time | None = None
    """When to look for what is past its retention."""


class File(Part):
    """One Parquet file of a segment. ``collector`` names the collector whose rows it holds."""

    key: str
    rows: int
    bytes: int
    first: int
    last: int
    collector: str | None = None


class Life(Part):
    """What start and end frames tell of a process; ``recorded`` and ``collected`` are its numbers in all."""

    models: list[str] = []
    started: Time | None = None
    ended: Time | None = None
    recorded: int | None = None
    collected: int | None = None


class Segment(Document):
    """The manifest of one raw segment, and what it contributes to windows and completeness.

    ``first``/``last`` are its lowest and highest sequence (0: no record), ``begin``/``end`` the times of its
    earliest and latest call, ``not_recorded`` counts calls by reason, ``damaged`` frames that were unreadable.
    """

    kind: ClassVar[str] = "segment"
    indexed: ClassVar[frozenset[str]] = frozenset({"deployment", "replica", "begin", "end"})
    hidden: ClassVar[frozenset[str]] = frozenset({"cells", "runs", "collected", "life"})

    deployment: str
    image: str
    replica: str
    number: int
    first: int = 0
    last: int = 0
    rows: int = 0
    bytes: int = 0
    begin: Time
    end: Time
    files: list[File] = []
    not_recorded: dict[str, int] = {}
    rows_lost: int = 0
    damaged: int = 0
    torn: int = 0
    cells: list[Cell] = []
    runs: list[Run] = []
    collected: list[Run] = []
    life: Life = Life()

    @property
    def empty(self) -> bool:
        """It tells of nothing but its process: no manifest is kept of it."""
        return not (self.files or self.cells or self.lost())

    def lost(self) -> dict[str, int]:
        """What is missing because of a fault or pressure, by reason; empty: nothing."""
        found = {reason: self.not_recorded.get(reason, 0) for reason in LOSSES}
        return {k: n for k, n in {**found, "damaged": self.damaged, "rows-lost": self.rows_lost}.items() if n}


class Process(Document):
    """One life of one scoring process: what has arrived of it."""

    kind: ClassVar[str] = "capture-process"
    indexed: ClassVar[frozenset[str]] = frozenset({"deployment", "seen"})

    deployment: str
    image: str
    replica: str
    models: list[str] = []
    started: Time | None = None
    ended: Time | None = None
    seen: Time
    """The latest moment that anything of it tells of."""
    segments: list[Run] = []
    runs: list[Run] = []
    collected: list[Run] = []
    recorded_in_all: int | None = None
    collected_in_all: int | None = None
    not_recorded: dict[str, int] = {}
    rows_lost: int = 0
    damaged: int = 0
    told: bool = False
    """``capture.lost`` was announced for its gaps."""

    @property
    def gaps(self) -> list[Run]:
        """Sequences that are missing below the highest known one."""
        return missing(self.runs, 1, self.recorded_in_all)

    @property
    def collector_gaps(self) -> list[Run]:
        """The same for collected rows, which are numbered apart."""
        return missing(self.collected, 1, self.collected_in_all)

    @property
    def lost_segments(self) -> list[Run]:
        """Numbers of segments that are missing: they may have held counts."""
        return missing(self.segments, 0, None)

    @property
    def state(self) -> str:
        """``complete``, ``gaps`` or ``open-ended`` (nothing missing so far, no end frame: running or killed)."""
        if self.gaps or self.collector_gaps or self.lost_segments:
            return "gaps"
        return "open-ended" if self.ended is None else "complete"

    def absorb(self, segment: Segment) -> Process | None:
        """With this segment; None when it was absorbed before."""
        if any(a <= segment.number <= b for a, b in self.segments):
            return None
        life = segment.life
        return self.evolve(
            segments=join([*self.segments, (segment.number, segment.number)]), runs=join([*self.runs, *segment.runs]),
            collected=join([*self.collected, *segment.collected]),
            not_recorded=added(self.not_recorded, segment.not_recorded),
            rows_lost=self.rows_lost + segment.rows_lost, damaged=self.damaged + segment.damaged,
            seen=max(self.seen, segment.end), models=life.models or self.models,
            started=life.started or self.started, ended=life.ended or self.ended,
            recorded_in_all=self.recorded_in_all if life.recorded is None else life.recorded,
            collected_in_all=self.collected_in_all if life.collected is None else life.collected)


class Window(Document):
    """One settled window, as ``telemetry.window`` tells it."""

    kind: ClassVar[str] = "telemetry-window"
    indexed: ClassVar[frozenset[str]] = frozenset({"deployment", "start"})

    deployment: str
    image: str
    model: str
    start: Time
    end: Time
    requests: int
    errors: dict[str, int]
    latency_ms: dict[str, float | None]


def segment_id(deployment: str, replica: str, number: int) -> str:
    """``iris:0-1a2b3c4d:7``."""
    return f"{deployment}:{replica}:{number}"


def process_id(deployment: str, replica: str) -> str:
    """``iris:0-1a2b3c4d``."""
    return f"{deployment}:{replica}"


def window_id(deployment: str, start: str, image: str, model: str) -> str:
    """``iris:2026-11-23T14:05:00.000000Z:iris-scorer:7:iris:4``."""
    return f"{deployment}:{start}:{image}:{model}"


def join(runs: Iterable[Sequence[int]]) -> list[Run]:
    """Runs sorted and merged where they touch: ``[(1, 3), (4, 6), (9, 9)]`` → ``[(1, 6), (9, 9)]``."""
    merged: list[Run] = []
    for first, last in sorted((a, b) for a, b in runs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def missing(runs: Sequence[Sequence[int]], first: int, last: int | None) -> list[Run]:
    """What lies between the runs, from ``first`` to ``last`` (None: to the end of the last run)."""
    gaps: list[Run] = []
    for a, b in runs:
        if a > first:
            gaps.append((first, a - 1))
        first = max(first, b + 1)
    if last is not None and last >= first:
        gaps.append((first, last))
    return gaps


def added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Counts added by key."""
    return {key: one.get(key, 0) + other.get(key, 0) for key in sorted({*one, *other})}
