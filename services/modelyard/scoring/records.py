"""What is appended of a call, as the bytes to write: redacted first, in the format of ``core.segments``.

``Records.pieces`` is ``segments.pack`` for a row of calls, with nothing called that can be written out: it is on the
path of every answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.segments import COLLECT, FORMAT, HEAD, RECORD, WORDS_LIMIT, crc32, pack_json, pack_words
from .tally import Finished

if TYPE_CHECKING:
    from .redaction import Redactor


class Names(NamedTuple):
    """What a model calls what it takes and gives. ``columns``: those of its only input; ``alone``: the output that
    stands for itself in an answer of ``/score``, where it has several."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    alone: str = ""


class Records:
    """``redact``: the names whose values must not be written."""

    def __init__(self, redact: Collection[str]) -> None:
        self._redactor: Redactor | None = None
        if redact:
            from .redaction import Redactor

            self._redactor = Redactor(redact)

    def learn(self, model: str, names: Names) -> None:
        """What is called how in the calls of a model."""
        if self._redactor is not None:
            self._redactor.learn(model, names)

    def redact(self, calls: Sequence[Finished]) -> None:
        """Takes the named values out of these calls."""
        if (redactor := self._redactor) is not None:
            for c in calls:
                c.request, c.request_type = redactor.request(c.protocol, c.request, c.request_type, c.model)
                c.response, c.response_type = redactor.response(
                    c.protocol, c.status, c.response, c.response_type, c.model)

    def pieces(self, mark: bytes, calls: Sequence[Finished], sequence: int) -> list[bytes]:
        """Frames of calls that were redacted; ``sequence`` is the last one's before them."""
        pieces: list[bytes] = []
        head_of, crc = HEAD.pack, crc32
        for c in calls:
            sequence += 1
            request, response = c.request, c.response
            words = (f"{c.prediction_id}\0{c.request_id}\0{c.model}\0{c.protocol}\0{c.method}\0{c.status}\0"
                     f"{c.request_type}\0{c.response_type}\0{c.trace_id}").encode("utf-8", "replace")
            if words.count(0) != 8 or len(words) > WORDS_LIMIT:
                words = pack_words((c.prediction_id, c.request_id, c.model, c.protocol, c.method, c.status,
                                    c.request_type, c.response_type, c.trace_id))
            head = head_of(mark, RECORD, FORMAT, len(words), len(request), len(response), sequence, c.started_ns,
                           c.latency_ns, c.queue_ns, crc(response, crc(request, crc(words))))
            pieces += (head, crc(head).to_bytes(4, "little"), words, request, response)
        return pieces

    def rows(self, mark: bytes, sequence: int, now_ns: int, collector: str, prediction_id: str,
             columns: Sequence[str] | None, rows: Sequence[Sequence[Any]]) -> bytes:
        """A frame of collected rows. Raises ValueError for rows that cannot be redacted."""
        names = None if columns is None else list(columns)
        if self._redactor is not None:
            names, rows = self._redactor.rows(names or [f"c{n}" for n in range(max(map(len, rows), default=0))], rows)
        return pack_json(mark, COLLECT, {"columns": names, "rows": rows}, pack_words((prediction_id, collector)),
                         sequence, now_ns)
