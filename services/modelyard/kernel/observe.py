"""Seeing what happens: JSON logs, the trace that a request or an event belongs to, metrics.

Logs go through the standard ``logging``: ``log.info("image built", extra=fields(image="iris:7"))``.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..core.documents import rfc3339
from ..core.events import random_hex

TRACEPARENT = re.compile(r"^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(?:-.*)?$")
_trace: ContextVar[str | None] = ContextVar("modelyard_traceparent", default=None)
_service: ContextVar[str | None] = ContextVar("modelyard_service", default=None)


# Trace context (W3C) ---------------------------------------------------------------------------------------------


def new_traceparent() -> str:
    """A fresh, sampled W3C traceparent: ``00-<trace id>-<span id>-01``."""
    return f"00-{random_hex(32)}-{random_hex(16)}-01"


def current_traceparent() -> str | None:
    """The traceparent of what this task works on, or None outside of any trace."""
    return _trace.get()


def current_trace_id() -> str | None:
    """The 32 hexadecimal digits that join logs and events of one piece of work."""
    value = _trace.get()
    return None if value is None else value[3:35]


@contextmanager
def trace_from(traceparent: str | None) -> Iterator[str]:
    """Works inside the trace that came in, under a span of its own; a missing or malformed one starts a trace."""
    match = TRACEPARENT.match(traceparent) if traceparent else None
    value = f"00-{match[1]}-{random_hex(16)}-{match[2]}" if match else new_traceparent()
    token = _trace.set(value)
    try:
        yield value
    finally:
        _trace.reset(token)


# Logs ------------------------------------------------------------------------------------------------------------


def in_service(name: str) -> None:
    """Log lines of this task, and of the tasks it starts, name this service."""
    _service.set(name)


def fields(**values: Any) -> dict[str, Any]:
    """What to give to ``extra=``: these become fields of the log line."""
    return {"fields": values}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, service, message, trace_id, then the fields of the call."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": rfc3339(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "service": _service.get() or "modelyard",
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (trace := current_trace_id()) is not None:
            line["trace_id"] = trace
        line.update({k: v for k, v in getattr(record, "fields", {}).items() if k not in line})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class HumanLines(logging.Formatter):
    """For a person at a terminal: ``14:05:06 registry  message  key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        more = "".join(f"  {k}={v}" for k, v in getattr(record, "fields", {}).items())
        start = f"{self.formatTime(record, '%H:%M:%S')} {_service.get() or 'modelyard'}"
        text = f"{start}  {level}{record.getMessage()}{more}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


TALKATIVE = ("azure", "pymongo", "docker", "urllib3")
"""Drivers that log each request, or each step of every connection, as information."""


def setup_logging(level: str = "INFO", *, human: bool | None = None, stream: TextIO | None = None) -> None:
    """Logs of the whole process to ``stream`` (stderr). ``human`` None: human-readable on a terminal, else JSON.

    Called again, it replaces what it set up; handlers that others put up stay.
    """
    out = stream or sys.stderr
    handler = logging.StreamHandler(out)
    handler.setFormatter(HumanLines() if (out.isatty() if human is None else human) else JsonLines())
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, HumanLines | JsonLines):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING if root.level >= logging.INFO else logging.NOTSET)


class Once:
    """Lets a complaint through when it is new, and not again until it changes or is cleared."""

    def __init__(self) -> None:
        self._last: dict[object, str] = {}

    def new(self, about: object, what: object) -> bool:
        """True the first time ``what`` is said about ``about``."""
        text = str(what)
        if self._last.get(about) == text:
            return False
        self._last[about] = text
        return True

    def clear(self, about: object) -> bool:
        """The trouble is over: True when there had been some."""
        return self._last.pop(about, None) is not None


# Metrics ---------------------------------------------------------------------------------------------------------

REGISTRY = CollectorRegistry()
"""What ``/metrics`` shows. Rooms may add their own metrics to it, named ``modelyard_…``."""

OUTBOX_UNSENT = Gauge("modelyard_outbox_unsent", "Events committed but not yet on the bus (seen by the last look)",
                      ["service"], registry=REGISTRY)
PUBLISHED = Counter("modelyard_events_published_total", "Events put on the bus", ["service"], registry=REGISTRY)
CONSUMER_IN_FLIGHT = Gauge("modelyard_consumer_in_flight", "Deliveries taken and not yet acknowledged",
                           ["service"], registry=REGISTRY)
CONSUMER_OLDEST = Gauge("modelyard_consumer_oldest_seconds", "Age of the event that was handled last, when it was "
                        "taken up: how far behind this service is", ["service"], registry=REGISTRY)
HANDLER_SECONDS = Histogram("modelyard_handler_seconds", "Time a handler took, by event type and outcome",
                            ["service", "type", "outcome"], registry=REGISTRY)
CONFLICTS = Counter("modelyard_conflicts_total", "Commits refused because the document was changed meanwhile, or is "
                    "there already: each costs a look and another try", ["service", "kind"], registry=REGISTRY)
RETRIES = Counter("modelyard_retries_total", "Events tried again after a passing failure", ["service", "type"],
                  registry=REGISTRY)
DEAD_LETTERS = Counter("modelyard_dead_letters_total", "Events put aside as dead letters", ["service", "type"],
                       registry=REGISTRY)
PARKED_KEYS = Gauge("modelyard_parked_keys", "Keys whose events wait for a failure to pass", ["service"],
                    registry=REGISTRY)
UNREADABLE = Gauge("modelyard_documents_unreadable", "Stored documents that this version met and cannot read",
                   ["service", "kind"], registry=REGISTRY)
LOOP_SECONDS = Histogram("modelyard_loop_seconds", "Time a loop's step took, by outcome",
                         ["service", "loop", "outcome"], registry=REGISTRY,
                         buckets=(.01, .05, .1, .5, 1, 5, 15, 60, 300))
LOOP_RUNNING = Gauge("modelyard_loop_running", "Steps that a loop runs now", ["service", "loop"], registry=REGISTRY)
LOOP_LOST = Counter("modelyard_loop_leases_lost_total", "Steps given up because somebody else holds the lease",
                    ["service", "loop"], registry=REGISTRY)


def metrics_text() -> bytes:
    """All metrics in Prometheus' text format (version 0.0.4)."""
    return generate_latest(REGISTRY)
