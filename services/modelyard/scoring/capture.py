"""Capture: every answered call is appended to the spool before its reply leaves.

The page cache outlives the process, so what was appended survives SIGKILL. Nothing here raises into the data plane:
a write that the disk refuses is counted, scoring goes on, and recording goes on when the disk takes writes again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.segments import COUNTS, END, FORMAT, pack_json
from .notices import Trouble
from .records import Names, Records
from .sampling import Sampler
from .spool import LiveSegment, in_children, sync_folder, used_bytes
from .tally import Finished, Tally, fitting

if TYPE_CHECKING:
    from .calls import Call

__all__ = ["CaptureLog", "Finished"]

SEGMENT_BYTES = 16 * 2**20
QUIET_AGE_S, QUIET_S, BUSY_AGE_S = 1.0, 0.5, 5.0
"""A segment with something in it is closed after a second when the last half of it was quiet, else after five:
fresh when somebody looks, and not 86,400 files a day under load."""
COUNTS_EVERY_S = 5.0
TICK_S = 0.25
REOPEN_S = 0.2
SPOOL_BYTES = 2**30
OK = "OK"


class CaptureLog:
    """The capture of one scoring process. Thread-safe.

    ``policy`` is ``core.specs.Capture`` as JSON; ``spool_bytes`` in it, or ``MODELYARD_SPOOL_BYTES``, caps the spool
    (1 GiB). With ``on_pressure`` ``drop``, what does not fit is dropped and counted. With ``reject`` and ``block``
    the data plane asks ``pressed`` before it admits a call, and refuses or waits; what it admitted is recorded, so
    the cap may be passed by the calls in flight. With ``sync`` ``always`` each append is on the disk when it returns.
    """

    def __init__(self, spool: Path, replica: str, about: Mapping[str, Any], policy: Mapping[str, Any]) -> None:
        self.replica = replica
        self.enabled = bool(policy.get("enabled"))
        self.on_pressure = str(policy.get("on_pressure", "drop"))
        self._trouble, self._down = Trouble(), False
        self._spool = spool
        self._about = {"format": FORMAT, **about, "replica": replica, "capture": dict(policy)}
        self._sampler = Sampler(policy)
        self._records = Records(policy.get("redact") or ())
        self._sync = policy.get("sync") == "always"
        self._cap = int(policy.get("spool_bytes") or os.environ.get("MODELYARD_SPOOL_BYTES") or SPOOL_BYTES)
        self._started_ns = time.time_ns()
        self._live: LiveSegment | None = None
        self._next = 0
        self._sequence = self._collected = 0
        self._tally = Tally()
        self._spooled = 0
        self._opened = self._appended = self._flushed = self._looked = self._tried = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick_for_ever, name="capture", daemon=True)

    @classmethod
    def open(cls, spool: Path, replica: str, about: Mapping[str, Any], policy: Mapping[str, Any]) -> CaptureLog:
        """Begins this life's log: the start marker is shipped at once, as a segment of its own."""
        log = cls(Path(spool), replica, about, policy)
        with contextlib.suppress(OSError):
            log._spool.mkdir(parents=True, exist_ok=True, mode=0o700)
            if log._sync:
                sync_folder(log._spool.parent)
        with log._lock:
            log._flushed = time.monotonic()
            log._rotate()
            log._rotate()
        in_children(log, CaptureLog._after_fork)
        log._ticker.start()
        return log

    @property
    def totals(self) -> dict[str, int]:
        """Since the start: ``recorded``, ``collected``, ``rows-lost`` and each reason for a call not recorded."""
        return {"recorded": self._sequence, "collected": self._collected, **self._tally.totals}

    @property
    def pressed(self) -> bool:
        """The spool is full or takes nothing, and the policy says that calls must not go on unrecorded."""
        return self.enabled and self.on_pressure != "drop" and (self._down or self._used() >= self._cap)

    @property
    def sampling_header(self) -> str:
        """The header that calls are sampled by, for ``Call.key``; ""."""
        return self._sampler.header if self.enabled else ""

    @property
    def keyed(self) -> bool:
        """``expect`` wants to hear of each call that is admitted."""
        return self.enabled and self._sampler.keyed

    def learn(self, model: str, names: Names) -> None:
        """What is called how in the calls of a model: before the first of them."""
        self._records.learn(model, names)
        self._sampler.learn(model, names.inputs)

    def expect(self, prediction_id: str, call: Call, model: str = "") -> None:
        """This call was admitted: ``append`` will have it. Never raises."""
        self._sampler.expect(prediction_id, call, model)

    def append(self, calls: Sequence[Finished]) -> None:
        """Records these calls, or counts why not; with one write, and durable against the death of the process
        when it returns. Never raises."""
        with self._lock:
            try:
                calls = self._choose(calls)
                if calls:
                    self._append(calls)
            except Exception as exc:  # noqa: BLE001 - the answer leaves, whatever becomes of its record
                self._trouble.met(exc)
                self._not_recorded(calls, "write-failed")

    def refused(self, model: str, status: str, started_ns: int | None = None, reason: str = "refused") -> None:
        """Counts a call that was turned away before it was admitted (unknown model, queue full, too large …);
        ``pressed``: for want of room in the spool."""
        with self._lock:
            self._tally.count(time.time_ns() if started_ns is None else started_ns, model, status, reason)

    def collect(self, collector: str, prediction_id: str, columns: Sequence[str] | None,
                rows: Sequence[Sequence[Any]]) -> None:
        """Records rows that a scoring file collected; follows the call's own sampling. Never raises."""
        if not self.enabled or not self._sampler.peek(prediction_id):
            return
        try:
            with self._lock:
                self._collect(collector, prediction_id, columns, rows)
        except Exception:  # noqa: BLE001 - collecting must not fail a call
            self._tally.lose_rows(len(rows))

    def close(self) -> None:
        """Flushes counts, writes the end frame, closes the segment. Closing twice is fine."""
        self._stop.set()
        if self._ticker.is_alive():
            self._ticker.join()
        with self._lock:
            try:
                if self._live is None and self._next:
                    self._open()
                if self._live is not None:
                    self._write_end(self._live)
            except OSError as exc:
                self._trouble.met(exc)
            finally:
                if self._live is not None:
                    self._live.abandon()
                self._live, self._next = None, 0

    def _append(self, calls: Sequence[Finished]) -> None:
        live = self._live or self._reopen()
        if live is None:
            return self._not_recorded(calls, "write-failed")
        try:
            live.write(self._records.pieces(live.mark, calls, self._sequence), len(calls))
        except OSError as exc:
            self._retire(exc)
            return self._not_recorded(calls, "write-failed")
        self._sequence += len(calls)
        self._appended = time.monotonic()
        if live.size >= SEGMENT_BYTES:
            self._rotate()

    def _choose(self, calls: Sequence[Finished]) -> Sequence[Finished]:
        """Those to be recorded, redacted; the others are counted, with the reason, once nothing can fail any more."""
        if not self.enabled:
            self._not_recorded(calls, "off")
            return ()
        passed: Sequence[Finished] = ()
        if not self._sampler.every:
            drawn = [(self._sampler.take(call.prediction_id) or call.status != OK, call) for call in calls]
            passed, calls = [call for kept, call in drawn if not kept], [call for kept, call in drawn if kept]
        self._records.redact(calls)
        if self.on_pressure == "drop":
            calls, dropped = fitting(calls, self._cap - self._used())
            self._not_recorded(dropped, "dropped")
        self._not_recorded(passed, "sampled")
        return calls

    def _used(self) -> int:
        """Bytes in the spool: as last looked, and what this process wrote since."""
        return self._spooled + (self._live.size if self._live else 0)

    def _not_recorded(self, calls: Sequence[Finished], reason: str) -> None:
        for call in calls:
            self._tally.count(call.started_ns, call.model, call.status, reason, call.latency_ns)

    def _collect(self, collector: str, prediction_id: str, columns: Sequence[str] | None,
                 rows: Sequence[Sequence[Any]]) -> None:
        live = self._live or self._reopen()
        if live is None or self._used() > self._cap:
            return self._tally.lose_rows(len(rows))
        frame = self._records.rows(live.mark, self._collected + 1, time.time_ns(), collector, prediction_id, columns,
                                   rows)
        try:
            live.write([frame])
        except OSError as exc:
            self._retire(exc)
            return self._tally.lose_rows(len(rows))
        self._collected += 1
        self._appended = time.monotonic()
        if live.size >= SEGMENT_BYTES:
            self._rotate()

    def _flush_counts(self) -> None:
        """Writes what was counted since the last time; what the disk refuses is kept for the next time."""
        if self._tally and self._live is not None:
            self._live.write([pack_json(self._live.mark, COUNTS, self._tally.body(), b"", self._sequence)])
            self._tally.clear()
        self._flushed = time.monotonic()

    def _write_end(self, live: LiveSegment) -> None:
        self._flush_counts()
        body = {"recorded": self._sequence, "collected": self._collected, "ended": time.time_ns()}
        live.write([pack_json(live.mark, END, body, b"", self._sequence)])
        live.close()

    def _retire(self, exc: OSError) -> None:
        """The segment takes no more writes: it is shipped, which may make room, and a new one is tried soon."""
        self._trouble.met(exc)
        live, self._live, self._down = self._live, None, True
        self._tried = time.monotonic()
        if live is not None:
            self._close(live)

    def _close(self, live: LiveSegment) -> None:
        self._spooled += live.size
        with contextlib.suppress(OSError):  # it stays there as a dead writer's then: the shipper adopts it
            live.close()

    def _rotate(self) -> None:
        """Closes the segment and begins the next; leaves none open when the disk refuses."""
        live, self._live = self._live, None
        if live is not None:
            self._close(live)
        try:
            self._open()
            self._down = False
        except OSError as exc:
            self._down = True
            self._trouble.met(exc)

    def _open(self) -> None:
        about = {**self._about, "segment": self._next, "first": self._sequence + 1, "started": self._started_ns,
                 "opened": time.time_ns()}
        number, self._next = self._next, self._next + 1
        self._tried = self._opened = time.monotonic()
        try:
            self._live = LiveSegment(self._spool, self.replica, number, about, self._started_ns, self._sync)
        except OSError:
            self._next = number
            raise

    def _reopen(self) -> LiveSegment | None:
        """Tries again for a segment, a few times a second at most."""
        if not self._stop.is_set() and time.monotonic() - self._tried >= REOPEN_S:
            self._rotate()
        return self._live

    def _tick_for_ever(self) -> None:
        while not self._stop.wait(TICK_S):
            try:
                spooled = used_bytes(self._spool) if time.monotonic() - self._looked >= 1.0 else None
                with self._lock:
                    self._tick(time.monotonic(), spooled)
            except Exception as exc:  # noqa: BLE001 - the next tick tries again; the data plane never hears of it
                self._trouble.met(exc)

    def _tick(self, now: float, spooled: int | None) -> None:
        live = self._live or self._reopen()
        if live is None:
            return
        if spooled is not None:
            self._looked, self._spooled = now, max(spooled - live.size, 0)
        age, quiet = now - self._opened, now - self._appended
        due = live.holds and age >= (QUIET_AGE_S if quiet >= QUIET_S else BUSY_AGE_S)
        if due or now - self._flushed >= COUNTS_EVERY_S:
            self._flush_counts()
        if due:
            self._rotate()
        self._trouble.calm(now)

    def _after_fork(self) -> None:
        """In a forked child: this log is the parent's. The child's copy lets go and records nothing."""
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._stop.set()
        self.enabled = False
        live, self._live, self._next = self._live, None, 0
        if live is not None:
            live.abandon()
