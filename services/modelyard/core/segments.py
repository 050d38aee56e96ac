"""Capture segments: what a scoring process appends before it answers, as bytes. No I/O, no third party needed.

A segment is a row of frames and nothing else::

    START    JSON: who writes (workspace, deployment, image, models, replica), which segment of this life it is
    RECORD   one answered call: nine words, the request and the response as they were on the wire
    COLLECT  what a scoring file collected itself: two words and JSON
    COUNTS   JSON: calls counted but not recorded, since the last such frame
    END      JSON: the writer stopped of its own will; its sequence number is the last record's

Every frame begins with the segment's mark: four bytes of magic and four drawn by lot when the segment is begun. So
after damage a reader finds the next frame by its mark, and bytes that a caller sent are never taken for a frame.
The header has a checksum of its own: that tells a torn tail (whole header, missing bytes) from a damaged frame.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

try:  # the same checksum at a fraction of the cost: it is taken of every byte that is recorded
    from zlib_ng.zlib_ng import crc32 as crc32
except ImportError:  # no wheel for this machine, or an image of before
    from zlib import crc32 as crc32

FORMAT = 1
MAGIC = b"MYS1"
START, RECORD, COLLECT, COUNTS, END = 1, 2, 3, 4, 5
KINDS = frozenset((START, RECORD, COLLECT, COUNTS, END))
HEAD = struct.Struct("<8sBBHIIQqqqI")
"""Mark, kind, format, lengths of words, request and response, sequence, started, latency and queue time (all
nanoseconds), checksum of the payload. A checksum of these bytes follows."""
HEADER = HEAD.size + 4
WORDS_LIMIT = 65_535
WORD_LIMIT = 4096
REASONS = ("off", "sampled", "refused", "pressed", "dropped", "write-failed")
"""Why a counted call was not recorded: capture is off; not chosen by sampling; turned away before it was admitted, or
because the spool was full; the spool was full and it was answered all the same; the disk refused the write."""
LOSSES = ("dropped", "write-failed")
"""The reasons that nobody chose."""


class Frame(NamedTuple):
    """One frame. ``request`` holds the body of the kinds that have only one."""

    kind: int
    sequence: int
    started_ns: int
    latency_ns: int
    queue_ns: int
    words: bytes
    request: bytes
    response: bytes

    def text(self) -> list[str]:
        """The words: of a RECORD ``RECORD_WORDS``, of a COLLECT ``COLLECT_WORDS``."""
        return self.words.decode("utf-8", "replace").split("\0")

    def body(self) -> Any:
        """The JSON of START, COLLECT, COUNTS and END."""
        return json.loads(self.request)


RECORD_WORDS = ("prediction_id", "request_id", "model", "protocol", "method", "status", "request_type",
                "response_type", "trace_id")
COLLECT_WORDS = ("prediction_id", "collector")


def new_mark(lot: bytes) -> bytes:
    """The mark of a segment, from four random bytes."""
    if len(lot) != 4:
        raise ValueError("a mark needs four random bytes")
    return MAGIC + lot


def pack_words(words: Sequence[str]) -> bytes:
    """Words as one byte string; a NUL inside a word becomes a space, an over-long word is cut."""
    packed = "\0".join(words).encode("utf-8", "replace")
    if packed.count(0) != len(words) - 1 or len(packed) > WORDS_LIMIT:
        packed = b"\0".join(w.replace("\0", " ").encode("utf-8", "replace")[:WORD_LIMIT] for w in words)
    return packed


def pack(mark: bytes, kind: int, words: bytes = b"", request: bytes = b"", response: bytes = b"", sequence: int = 0,
         started_ns: int = 0, latency_ns: int = 0, queue_ns: int = 0) -> tuple[bytes, bytes, bytes, bytes]:
    """One frame as the pieces to write, in order; bodies are not copied."""
    head = HEAD.pack(mark, kind, FORMAT, len(words), len(request), len(response), sequence, started_ns, latency_ns,
                     queue_ns, crc32(response, crc32(request, crc32(words))))
    return head + crc32(head).to_bytes(4, "little"), words, request, response


def pack_json(mark: bytes, kind: int, body: Mapping[str, Any], words: bytes = b"", sequence: int = 0,
              started_ns: int = 0) -> bytes:
    """A frame of START, COLLECT, COUNTS or END in one piece."""
    raw = json.dumps(body, separators=(",", ":"), default=str).encode()
    return b"".join(pack(mark, kind, words, raw, b"", sequence, started_ns))


class Reader:
    """Iterates over the good frames of a segment. Afterwards ``errors`` is the number of damaged frames passed
    over, ``torn`` the length in bytes of an unfinished last frame (0: none)."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.errors = 0
        self.torn = 0

    def __iter__(self) -> Iterator[Frame]:
        self.errors = self.torn = 0
        mark, at = _mark_of(self.data), 0
        while at < len(self.data):
            frame, after = _frame_at(self.data, at, mark)
            if frame is not None:
                yield frame
                at = after
                continue
            ahead = self.data.find(mark, at + 1) if mark else -1
            if after == UNFINISHED and ahead < 0:
                self.torn = len(self.data) - at
                return
            self.errors += 1
            at = ahead if ahead >= 0 else len(self.data)


DAMAGED, UNFINISHED = -1, -2


def _frame_at(data: bytes, at: int, mark: bytes) -> tuple[Frame | None, int]:
    """The frame at an offset and the offset behind it, or None and what is wrong."""
    payload = at + HEADER
    if payload > len(data):
        return None, UNFINISHED
    if not _header_holds(data, at):
        return None, DAMAGED
    own, kind, _, n_words, n_request, n_response, sequence, started, latency, queue, check = HEAD.unpack_from(data, at)
    if own != mark or kind not in KINDS:
        return None, DAMAGED
    request = payload + n_words
    response = request + n_request
    end = response + n_response
    if end > len(data):
        return None, UNFINISHED
    if crc32(memoryview(data)[payload:end]) != check:
        return None, DAMAGED
    return Frame(kind, sequence, started, latency, queue, data[payload:request], data[request:response],
                 data[response:end]), end


def _header_holds(data: bytes, at: int) -> bool:
    view = memoryview(data)[at:at + HEAD.size]
    return crc32(view).to_bytes(4, "little") == data[at + HEAD.size:at + HEADER]


def _mark_of(data: bytes) -> bytes:
    """The segment's mark: of the first header that holds; empty when none does."""
    at = data.find(MAGIC)
    while at >= 0:
        if at + HEADER <= len(data) and _header_holds(data, at):
            return data[at:at + 8]
        at = data.find(MAGIC, at + 1)
    return b""
