"""The capture log: one write before the reply, and a count for whatever was not written."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelyard.core.segments import COLLECT, COUNTS, END, RECORD, START, Frame, Reader
from modelyard.scoring import capture, spool
from modelyard.scoring.capture import CaptureLog, Finished

ABOUT = {"workspace": "default", "deployment": "iris", "image": "iris-scorer:7", "models": ["iris:4"]}
REPLICA = "0-1a2b3c4d"


def call(n: int, status: str = "OK", body: bytes = b"ask", model: str = "iris:4") -> Finished:
    return Finished(f"p{n}", f"r{n}", model, "grpc", "ModelInfer", status, time.time_ns(), 1_500_000, 20_000, body,
                    "application/grpc+proto", b"answer", "application/grpc+proto", "")


def frames(folder: Path) -> list[Frame]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".seg", ".live"):
            reader = Reader(path.read_bytes())
            found += list(reader)
            assert (reader.errors, reader.torn) == (0, 0), path
    return found


def counted(found: list[Frame]) -> Counter[tuple[str, str, str]]:
    """(model, status, reason) → calls, of all counts frames."""
    totals: Counter[tuple[str, str, str]] = Counter()
    for frame in found:
        if frame.kind == COUNTS:
            for _, model, status, reason, _, n in frame.body()["counts"]:
                totals[model, status, reason] += n
    return totals


@contextmanager
def opened(folder: Path, **policy: object) -> Iterator[CaptureLog]:
    log = CaptureLog.open(folder, REPLICA, ABOUT, {"enabled": True, **policy})
    try:
        yield log
    finally:
        log.close()


def until(what: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_a_life_from_start_to_end(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        assert [p.name for p in tmp_path.glob("*.seg")] == [f"{REPLICA}-00000000.seg"], "the start marker ships at once"
        log.append([call(1), call(2, "INTERNAL")])
        log.append([call(3)])
        assert [f.sequence for f in frames(tmp_path) if f.kind == RECORD] == [1, 2, 3], "before append returned"
    found = frames(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".seg", ".seg"]
    start, end = found[0], found[-1]
    assert start.kind == START and start.body()["image"] == "iris-scorer:7" and start.body()["segment"] == 0
    assert end.kind == END and end.sequence == 3 and end.body()["recorded"] == 3
    record = [f for f in found if f.kind == RECORD][1]
    assert record.text()[:6] == ["p2", "r2", "iris:4", "grpc", "ModelInfer", "INTERNAL"]
    assert (record.latency_ns, record.queue_ns, record.request, record.response) == (1_500_000, 20_000, b"ask",
                                                                                      b"answer")


def test_closing_twice_and_appending_after(tmp_path: Path) -> None:
    log = CaptureLog.open(tmp_path, REPLICA, ABOUT, {"enabled": True})
    log.close()
    before = frames(tmp_path)
    log.close()
    log.append([call(1)])
    assert frames(tmp_path) == before and log.totals["write-failed"] == 1


def test_rotates_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "QUIET_AGE_S", 0.2)
    monkeypatch.setattr(capture, "QUIET_S", 0.1)
    with opened(tmp_path) as log:
        log.append([call(1)])
        until(lambda: (tmp_path / f"{REPLICA}-00000001.seg").exists())
        assert (tmp_path / f"{REPLICA}-00000002.live").exists(), "the next is open before it is needed"
        log.append([call(2)])
    assert [f.sequence for f in frames(tmp_path) if f.kind == RECORD] == [1, 2]


def test_rotates_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "SEGMENT_BYTES", 4096)
    with opened(tmp_path) as log:
        for n in range(1, 101):
            log.append([call(n, body=b"x" * 1000)])
    sizes = [p.stat().st_size for p in tmp_path.glob("*.seg")]
    assert len(sizes) > 20 and max(sizes) < 6000
    assert [f.sequence for f in frames(tmp_path) if f.kind == RECORD] == list(range(1, 101))
    firsts = [f.body()["first"] for f in frames(tmp_path) if f.kind == START]
    assert firsts == sorted(firsts)


def test_a_batch_of_a_thousand_is_one_append(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.append([call(n) for n in range(1, 1001)])
    assert [f.sequence for f in frames(tmp_path) if f.kind == RECORD] == list(range(1, 1001))


def test_off_means_counts_only(tmp_path: Path) -> None:
    with opened(tmp_path, enabled=False) as log:
        log.append([call(1), call(2), call(3, "INTERNAL")])
        log.collect("features", "p1", ["a"], [[1]])
    found = frames(tmp_path)
    assert {f.kind for f in found} == {START, COUNTS, END}
    assert counted(found) == {("iris:4", "OK", "off"): 2, ("iris:4", "INTERNAL", "off"): 1}


def test_sampling_keeps_its_share_and_every_failure(tmp_path: Path) -> None:
    with opened(tmp_path, sampling=0.25) as log:
        for n in range(4000):
            log.append([call(n, "INTERNAL" if n % 10 == 0 else "OK")])
    found = frames(tmp_path)
    kept = [f.text() for f in found if f.kind == RECORD]
    assert sum(words[5] == "INTERNAL" for words in kept) == 400
    successes = sum(words[5] == "OK" for words in kept)
    assert successes == pytest.approx(900, rel=0.1)
    assert counted(found) == {("iris:4", "OK", "sampled"): 3600 - successes}
    with opened(tmp_path / "again", sampling=0.25) as log:
        for n in range(4000):
            log.append([call(n, "INTERNAL" if n % 10 == 0 else "OK")])
    assert [f.text()[0] for f in frames(tmp_path / "again") if f.kind == RECORD] == [words[0] for words in kept]


def test_refused_calls_are_counted_with_no_latency(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.refused("iris:4", "RESOURCE_EXHAUSTED")
        for n in range(1000):
            log.refused(f"guess-{n}", "NOT_FOUND")
    totals = counted(frames(tmp_path))
    assert totals["iris:4", "RESOURCE_EXHAUSTED", "refused"] == 1
    assert sum(totals.values()) == 1001 and len(totals) <= 257, "a caller cannot make endless names"


def test_a_full_spool_drops_and_counts_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, spool_bytes=64 * 1024) as log:
        assert not log.pressed
        for n in range(200):
            log.append([call(n, body=b"x" * 1024)])
        assert log.totals["recorded"] + log.totals["dropped"] == 200 and log.totals["dropped"] > 100
    found = frames(tmp_path)
    recorded = sum(f.kind == RECORD for f in found)
    assert recorded + counted(found)["iris:4", "OK", "dropped"] == 200
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 72 * 1024


@pytest.mark.slow
def test_under_pressure_nothing_that_was_admitted_is_dropped(tmp_path: Path) -> None:
    with opened(tmp_path, spool_bytes=32 * 1024, on_pressure="reject") as log:
        admitted = 0
        while not log.pressed:
            log.append([call(admitted, body=b"x" * 1024)])
            admitted += 1
        log.append([call(admitted)])
        assert log.totals == {"recorded": admitted + 1, "collected": 0}
        until(lambda: ([p.unlink() for p in tmp_path.glob("*.seg")], not log.pressed)[1])


def test_recording_goes_on_when_the_spool_has_room_again(tmp_path: Path) -> None:
    with opened(tmp_path, spool_bytes=32 * 1024) as log:
        until(lambda: (log.append([call(1, body=b"x" * 1024)]), log.totals.get("dropped"))[1])
        before = log.totals["recorded"]
        until(lambda: [p.unlink() for p in tmp_path.glob("*.seg")])
        until(lambda: (log.append([call(2)]), log.totals["recorded"] > before)[1])


@pytest.mark.slow
def test_a_refused_write_is_counted_and_leaves_no_half_frame(tmp_path: Path) -> None:
    """A file size limit refuses writes as a full disk does: with a short write first."""
    script = f"""
import resource, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.unit.test_capture_log import ABOUT, REPLICA, call
from modelyard.scoring.capture import CaptureLog
log = CaptureLog.open(Path({str(tmp_path)!r}), REPLICA, ABOUT, {{"enabled": True}})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
for n in range(20):
    log.append([call(n, body=b"x" * 4000 if n == 5 else b"x" * 500)])
full = dict(log.totals)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
end = time.monotonic() + 5
while log.totals["recorded"] == full["recorded"] and time.monotonic() < end:
    log.append([call(100)])
    time.sleep(0.02)
log.close()
print(full["recorded"], full["write-failed"], log.totals["recorded"], log.totals["write-failed"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    recorded, failed, recorded_after, failed_after = map(int, done.stdout.split())
    assert recorded + failed == 20 and failed >= 1 and recorded >= 3
    assert recorded_after == recorded + 1, "recording goes on when the disk takes writes again"
    found = frames(tmp_path)
    assert [f.sequence for f in found if f.kind == RECORD] == list(range(1, recorded_after + 1))
    assert counted(found)["iris:4", "OK", "write-failed"] == failed_after


def test_a_spool_that_cannot_be_made_never_stops_scoring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with opened(tmp_path / "file" / "spool") as log:
        log.append([call(1)])
        assert log.totals["write-failed"] == 1


def test_many_threads_write_one_gapless_row(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        threads = [threading.Thread(target=lambda: [log.append([call(n)]) for n in range(200)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [f.sequence for f in frames(tmp_path) if f.kind == RECORD] == list(range(1, 1601))


def test_a_forked_child_leaves_the_log_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.append([call(1)])
        child = os.fork()
        if child == 0:
            log.append([call(2)])
            log.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert spool.adopt_dead(tmp_path, 0) == 0, "the parent's lock still holds"
        log.append([call(3)])
    assert [f.text()[0] for f in frames(tmp_path) if f.kind == RECORD] == ["p1", "p3"]


def test_a_dead_writers_tail_is_adopted_and_a_live_one_is_not(tmp_path: Path) -> None:
    with opened(tmp_path):
        live = next(tmp_path.glob("*.live"))
        dead = tmp_path / "0-ffffffff-00000001.live"
        dead.write_bytes(live.read_bytes())
        making = tmp_path / "0-ffffffff-00000002.new"
        making.write_bytes(b"")
        assert spool.adopt_dead(tmp_path, older_than=0) == 1
        assert making.exists()
        assert spool.adopt_dead(tmp_path, older_than=time.time() + 1) == 0
        assert not making.exists() and live.exists() and dead.with_suffix(".seg").exists()
        fd = os.open(live, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


def test_collected_rows_have_their_own_numbers_and_follow_sampling(tmp_path: Path) -> None:
    with opened(tmp_path, sampling=0.5) as log:
        for n in range(100):
            log.append([call(n)])
            log.collect("features", f"p{n}", ["a", "b"], [[n, None]])
    found = frames(tmp_path)
    calls = {f.text()[0] for f in found if f.kind == RECORD}
    collected = [f for f in found if f.kind == COLLECT]
    assert {f.text()[0] for f in collected} == calls and 20 < len(calls) < 80
    assert [f.sequence for f in collected] == list(range(1, len(calls) + 1))
    assert collected[0].body()["columns"] == ["a", "b"]
    assert found[-1].body()["collected"] == len(calls)


