"""One raw segment → its manifest and its Parquet files. Pure; runs in a thread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from ..core.latency import bucket, slot
from ..core.layout import COLLECTOR_NAME, SegmentName, collector_key, parquet_key
from ..core.segments import COLLECT, COUNTS, END, RECORD, RECORD_WORDS, START, Frame, Reader
from . import parquet
from .model import File, Life, Run, Segment, join, segment_id
from .windows import Cell, moment

HOUR_NS = 3600 * 10**9
RESERVED = frozenset(parquet.COLLECTED.names)


class Unpacked(NamedTuple):
    """``blobs``: key and bytes of every file that the manifest names, in its order."""

    segment: Segment
    blobs: list[tuple[str, bytes]]


class Place(NamedTuple):
    """Where a segment belongs."""

    workspace: str
    deployment: str
    image: str
    name: SegmentName


def unpack(workspace: str, deployment: str, name: SegmentName, data: bytes, image: str) -> Unpacked:
    """``image`` is used when the start frame is unreadable. Raises Invalid when there is no image at all."""
    reader = Reader(data)
    by_kind: dict[int, list[Frame]] = defaultdict(list)
    for frame in reader:
        by_kind[frame.kind].append(frame)
    about = by_kind[START][0].body() if by_kind[START] else {}
    place = Place(workspace, deployment, str(about.get("image") or image), name)
    found = [*_records(place, by_kind[RECORD]), *_collected(place, by_kind[COLLECT])]
    cells, not_recorded, rows_lost = _counts(by_kind)
    begin, end = _span(by_kind, about)
    records = [f.sequence for f in by_kind[RECORD]]
    segment = Segment(
        id=segment_id(deployment, name.replica, name.number), workspace=workspace, deployment=deployment,
        image=place.image, replica=name.replica, number=name.number, first=min(records, default=0),
        last=max(records, default=0), rows=len(records), bytes=sum(f.bytes for f, _ in found), begin=begin, end=end,
        files=[f for f, _ in found], not_recorded=not_recorded, rows_lost=rows_lost, damaged=reader.errors,
        torn=reader.torn, cells=cells, runs=_runs(records), collected=_runs(f.sequence for f in by_kind[COLLECT]),
        life=_life(about, by_kind[END]))
    return Unpacked(segment, [(f.key, raw) for f, raw in found])


def _records(place: Place, frames: Iterable[Frame]) -> list[tuple[File, bytes]]:
    """One file per hour of the clock."""
    hours: dict[int, list[Frame]] = defaultdict(list)
    for frame in frames:
        hours[frame.started_ns // HOUR_NS].append(frame)
    files = []
    for hour, rows in sorted(hours.items()):
        first, last = min(f.sequence for f in rows), max(f.sequence for f in rows)
        key = parquet_key(place.workspace, place.deployment, place.image, moment(hour * 3600), place.name.replica,
                          first, last)
        raw = parquet.write(_columns(place, rows))
        files.append((File(key=key, rows=len(rows), bytes=len(raw), first=first, last=last), raw))
    return files


def _columns(place: Place, frames: list[Frame]) -> dict[str, list[Any]]:
    words = [(f.text() + [""] * len(RECORD_WORDS))[:len(RECORD_WORDS)] for f in frames]
    columns: dict[str, list[Any]] = {name: list(values) for name, values in
                                     zip(RECORD_WORDS, zip(*words, strict=True), strict=True)}
    return columns | _shared(place, frames) | {
        "latency_ms": [f.latency_ns / 1e6 for f in frames], "queue_ms": [f.queue_ns / 1e6 for f in frames],
        "request": [f.request for f in frames], "response": [f.response for f in frames]}


def _shared(place: Place, frames: list[Frame]) -> dict[str, list[Any]]:
    count = len(frames)
    return {"sequence": [f.sequence for f in frames], "time": [f.started_ns // 1000 for f in frames],
            "replica": [place.name.replica] * count, "deployment": [place.deployment] * count,
            "image": [place.image] * count}


def _collected(place: Place, frames: Iterable[Frame]) -> list[tuple[File, bytes]]:
    """One file per collector and hour."""
    groups: dict[tuple[str, int], list[tuple[str, Frame]]] = defaultdict(list)
    for frame in frames:
        prediction_id, collector = (*frame.text(), "")[:2]
        if COLLECTOR_NAME.match(collector):
            groups[collector, frame.started_ns // HOUR_NS].append((prediction_id, frame))
    files = []
    for (collector, hour), rows in sorted(groups.items(), key=lambda item: item[0]):
        first, last = min(f.sequence for _, f in rows), max(f.sequence for _, f in rows)
        key = collector_key(place.workspace, place.deployment, place.image, collector, moment(hour * 3600),
                            place.name.replica, first, last)
        count, raw = _collected_file(place, rows)
        files.append((File(key=key, rows=count, bytes=len(raw), first=first, last=last, collector=collector), raw))
    return files


def _collected_file(place: Place, calls: list[tuple[str, Frame]]) -> tuple[int, bytes]:
    spread: list[tuple[str, Frame, int, dict[str, Any]]] = []
    for prediction_id, frame in calls:
        body = frame.body()
        for number, values in enumerate(body["rows"]):
            columns = body["columns"] or [f"c{i}" for i in range(len(values))]
            spread.append((prediction_id, frame, number, dict(zip(columns, values, strict=False))))
    names = [n for n in dict.fromkeys(n for *_, row in spread for n in row) if n not in RESERVED]
    fixed = _shared(place, [frame for _, frame, _, _ in spread]) | {
        "prediction_id": [p for p, *_ in spread], "row": [number for _, _, number, _ in spread]}
    return len(spread), parquet.write_collected(fixed, {n: [row.get(n) for *_, row in spread] for n in names})


def _counts(by_kind: Mapping[int, list[Frame]]) -> tuple[list[Cell], dict[str, int], int]:
    """Cells of recorded and of counted calls, counted calls by reason, collected rows lost."""
    cells: dict[tuple[int, str, str], dict[int, int]] = {}
    not_recorded: dict[str, int] = {}
    rows_lost = 0

    def add(start: int, model: str, status: str, index: int, calls: int) -> None:
        latency = cells.setdefault((start, model, status), {})
        latency[index] = latency.get(index, 0) + calls

    for frame in by_kind.get(RECORD, ()):
        words = frame.text()
        add(slot(frame.started_ns), words[2], words[5], bucket(frame.latency_ns), 1)
    for frame in by_kind.get(COUNTS, ()):
        body = frame.body()
        rows_lost += int(body.get("rows_lost", 0))
        for start, model, status, reason, index, calls in body["counts"]:
            add(start, model, status, index, calls)
            not_recorded[reason] = not_recorded.get(reason, 0) + calls
    return [Cell(*key, latency) for key, latency in sorted(cells.items())], not_recorded, rows_lost


def _span(by_kind: Mapping[int, list[Frame]], about: Mapping[str, Any]) -> tuple[datetime, datetime]:
    """When its earliest and its latest call began; without calls, when its process did."""
    times = [f.started_ns / 1e9 for kind in (RECORD, COLLECT) for f in by_kind.get(kind, ())]
    times += [entry[0] for frame in by_kind.get(COUNTS, ()) for entry in frame.body()["counts"]]
    if not times:
        times = [int(about.get("opened") or about.get("started") or 0) / 1e9]
    # counts know the slot only, and stored times are cut to microseconds: round outwards
    return moment(min(times)) - timedelta(microseconds=1), moment(max(times)) + timedelta(microseconds=1)


def _runs(sequences: Iterable[int]) -> list[Run]:
    return join((n, n) for n in sequences)


def _life(about: Mapping[str, Any], ends: list[Frame]) -> Life:
    end = ends[-1].body() if ends else {}
    return Life(
        models=[str(m) for m in about.get("models") or []],
        started=moment(int(about["started"]) / 1e9) if about.get("started") else None,
        ended=moment(int(end["ended"]) / 1e9) if end else None,
        recorded=end.get("recorded"), collected=end.get("collected"))
