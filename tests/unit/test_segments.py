"""The segment format: what is damaged is counted and passed over, what is torn is cut, nothing else is lost."""

import random
import subprocess
import sys
from zlib import crc32

import pytest

from modelyard.core.latency import SLOT_S, bucket, edges, percentile, percentiles, slot
from modelyard.core.segments import (
    COUNTS,
    END,
    HEADER,
    MAGIC,
    RECORD,
    RECORD_WORDS,
    START,
    WORDS_LIMIT,
    Reader,
    new_mark,
    pack,
    pack_json,
    pack_words,
)
from modelyard.scoring.records import Records
from modelyard.scoring.tally import Finished


def segment(records: int, seed: int = 1, size: int = 60) -> tuple[bytes, list[int]]:
    """A whole segment and the offset of each frame in it."""
    lot = random.Random(seed)
    mark = new_mark(lot.randbytes(4))
    frames = [pack_json(mark, START, {"image": "iris-scorer:7", "segment": seed})]
    for n in range(1, records + 1):
        words = pack_words([f"p{n}", "r", "iris:4", "grpc", "ModelInfer", "OK", "a/b", "a/b", ""])
        frames.append(b"".join(pack(mark, RECORD, words, lot.randbytes(lot.randrange(size)),
                                    lot.randbytes(lot.randrange(size)), n, n * 1000, 5, 6)))
    frames.append(pack_json(mark, COUNTS, {"counts": [], "rows_lost": 0}))
    frames.append(pack_json(mark, END, {"recorded": records}, sequence=records))
    offsets = [sum(map(len, frames[:i])) for i in range(len(frames))]
    return b"".join(frames), offsets


def test_everything_comes_back() -> None:
    mark = new_mark(b"abcd")
    words = ["p1", "r1", "iris:4", "grpc", "ModelInfer", "INTERNAL", "application/grpc+proto", "", "t" * 32]
    raw = b"".join(pack(mark, RECORD, pack_words(words), b"\x00\xffask", b"", 2**40, 1_700_000_000_123_456_789, -1, 7))
    reader = Reader(raw)
    (frame,) = list(reader)
    assert frame.text() == words and len(words) == len(RECORD_WORDS)
    assert frame[1:5] == (2**40, 1_700_000_000_123_456_789, -1, 7)
    assert (frame.request, frame.response, reader.errors, reader.torn) == (b"\x00\xffask", b"", 0, 0)


def test_words_hold_anything() -> None:
    odd = ["a\0b", "ü" * 10, "\ud800"]
    mark = new_mark(b"abcd")
    (frame,) = list(Reader(b"".join(pack(mark, RECORD, pack_words(odd)))))
    assert frame.text() == ["a b", "ü" * 10, "?"]
    assert len(pack_words(["x" * 10**6] * 9)) <= WORDS_LIMIT


def test_torn_at_every_byte_loses_only_the_last_frame() -> None:
    raw, offsets = segment(6)
    for cut in range(len(raw)):
        reader = Reader(raw[:cut])
        frames = list(reader)
        whole = sum(1 for i, _ in enumerate(offsets) if (offsets[i + 1] if i + 1 < len(offsets) else len(raw)) <= cut)
        assert len(frames) == whole, cut
        assert reader.errors == 0, cut
        assert reader.torn == cut - (offsets[whole] if whole < len(offsets) else len(raw)), cut


def test_one_flipped_byte_in_each_of_100_segments_is_100_frame_errors() -> None:
    lot = random.Random(7)
    errors = read = 0
    for seed in range(100):
        raw, offsets = segment(20, seed)
        at = lot.randrange(len(raw))
        reader = Reader(raw[:at] + bytes([raw[at] ^ lot.randrange(1, 256)]) + raw[at + 1:])
        read += len(list(reader))
        errors += reader.errors
        assert reader.torn == 0, (seed, at)
    assert errors == 100
    assert read == 100 * (len(offsets) - 1)


def test_every_flipped_byte_of_one_segment_costs_one_frame() -> None:
    raw, offsets = segment(4)
    for at in range(len(raw)):
        reader = Reader(raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1:])
        assert len(list(reader)) == len(offsets) - 1, at
        assert (reader.errors, reader.torn) == (1, 0), at


def test_a_captured_segment_inside_a_segment_is_only_bytes() -> None:
    inner, _ = segment(3, seed=1)
    mark = new_mark(b"zzzz")
    frames = [b"".join(pack(mark, RECORD, b"", inner, b"", n)) for n in (1, 2, 3)]
    raw = bytearray(b"".join(frames))
    raw[len(frames[0]) + HEADER + 5] ^= 1
    reader = Reader(bytes(raw))
    assert [f.sequence for f in reader] == [1, 3]
    assert reader.errors == 1


def test_a_write_that_stopped_half_way_and_went_on() -> None:
    mark = new_mark(b"zzzz")
    frames = [b"".join(pack(mark, RECORD, b"", b"x" * 100, b"y" * 100, n)) for n in range(1, 5)]
    reader = Reader(frames[0] + frames[1][:90] + frames[2] + frames[3])
    assert [f.sequence for f in reader] == [1, 3, 4]
    assert (reader.errors, reader.torn) == (1, 0)


@pytest.mark.parametrize("raw", [b"", b"\0" * 500, b"not a segment at all" * 20, MAGIC, MAGIC * 200])
def test_rubbish_has_no_frames(raw: bytes) -> None:
    reader = Reader(raw)
    assert list(reader) == []
    assert reader.errors + (reader.torn > 0) == (1 if raw else 0)


def test_header_checksum_covers_the_lengths() -> None:
    raw, offsets = segment(2)
    head = raw[offsets[1]:offsets[1] + HEADER]
    assert crc32(head[:-4]) == int.from_bytes(head[-4:], "little")


def test_a_reader_without_zlib_ng_takes_the_same_checksums() -> None:
    raw, offsets = segment(20, size=3000)
    told = ("import sys; sys.modules['zlib_ng'] = None\n"
            "from modelyard.core import segments; import zlib; assert segments.crc32 is zlib.crc32\n"
            "reader = segments.Reader(sys.stdin.buffer.read())\n"
            "print(len(list(reader)), reader.errors, reader.torn)")
    done = subprocess.run([sys.executable, "-c", told], input=raw, capture_output=True, timeout=60)
    assert done.stdout.split() == [b"%d" % len(offsets), b"0", b"0"], done.stderr.decode()


def test_buckets_meet_without_holes() -> None:
    for index in range(600):
        low, high = edges(index)
        assert bucket(low * 1000) == index == bucket(high * 1000 - 1)
        assert high == edges(index + 1)[0]
        assert index < 32 or (high - low) / low <= 1 / 16
    assert bucket(-5) == 0


def test_percentiles_are_close() -> None:
    lot = random.Random(3)
    times = sorted(int(lot.lognormvariate(14, 1.2)) for _ in range(20_000))
    counts: dict[int, int] = {}
    for t in times:
        counts[bucket(t)] = counts.get(bucket(t), 0) + 1
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        true = times[min(int(share * len(times)), len(times) - 1)] / 1e6
        assert percentile(counts, share) == pytest.approx(true, rel=0.07)
    assert percentiles({-1: 5}) == {"p50": None, "p90": None, "p99": None}
    assert slot(1_700_000_009_999_999_999) == 1_700_000_000 and SLOT_S == 10


@pytest.mark.parametrize("odd", ["r1", "", "a\0b", "\ud800", "ü" * 70_000])
def test_calls_are_packed_as_any_frame_is(odd: str) -> None:
    mark = new_mark(b"abcd")
    calls = [Finished(f"p{n}", odd, "iris:4", "grpc", "ModelInfer", "OK", n, n + 1, n + 2, b"ask" * n, "a/b",
                      b"say" * n, "c/d", "t" * 32) for n in range(3)]
    words = [pack_words((c.prediction_id, odd, c.model, c.protocol, c.method, c.status, "a/b", "c/d", c.trace_id))
             for c in calls]
    expected = b"".join(b"".join(pack(mark, RECORD, words[n], c.request, c.response, 8 + n, c.started_ns, c.latency_ns,
                                      c.queue_ns)) for n, c in enumerate(calls))
    assert b"".join(Records(()).pieces(mark, calls, 7)) == expected
