"""OTLP: metrics, and a span of every call whose caller traces it, to the collector that the environment names.

The variables are OpenTelemetry's own (``OTEL_EXPORTER_OTLP_ENDPOINT`` and its kin). Without them nothing of this is
imported; with them the packages are imported in a thread, when the models are loaded already. What is exported is what
``/metrics`` shows; spans are made after the answer has left, and never hold up a call: what does not fit is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.errors import Invalid
from ..core.version import __version__
from .metrics import Metrics
from .tally import Finished

PACKAGE = "opentelemetry-exporter-otlp-proto-http"
ENDPOINT, PROTOCOL = "OTEL_EXPORTER_OTLP_ENDPOINT", "http/protobuf"
LAST_S = 3.0
"""What is left may take so long when the replica leaves."""
STARTED_NS = time.time_ns()


@dataclass(frozen=True)
class Plan:
    """What is exported and how often: seconds, spans."""

    traces: bool
    metrics: bool
    metrics_s: float = 60.0
    spans_s: float = 5.0
    spans_kept: int = 2048
    spans_sent: int = 512

    @classmethod
    def read(cls, env: Mapping[str, str] = os.environ) -> Plan | None:
        """None: nobody asks for it. Raises Invalid, naming the variable that is wrong."""
        if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        traces, metrics = _wanted(env, "TRACES"), _wanted(env, "METRICS")
        if not traces and not metrics:
            return None
        return cls(traces, metrics, _number(env, "OTEL_METRIC_EXPORT_INTERVAL", 60_000) / 1000,
                   _number(env, "OTEL_BSP_SCHEDULE_DELAY", 5_000) / 1000,
                   _number(env, "OTEL_BSP_MAX_QUEUE_SIZE", 2048), _number(env, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512))


def _wanted(env: Mapping[str, str], signal: str) -> bool:
    chosen = env.get(f"OTEL_{signal}_EXPORTER") or "otlp"
    if chosen not in ("otlp", "none"):
        raise Invalid(f"OTEL_{signal}_EXPORTER is '{chosen}'; it must be otlp or none")
    asked = env.get(ENDPOINT) or env.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    if chosen == "none" or not asked:
        return False
    protocol = env.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL") or PROTOCOL
    if protocol != PROTOCOL:
        raise Invalid(f"OTEL_EXPORTER_OTLP_PROTOCOL is '{protocol}'; a scoring server speaks {PROTOCOL} "
                      "(a collector takes it on port 4318)")
    return True


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    given = env.get(name) or str(default)
    if not given.isascii() or not given.isdigit() or not int(given):
        raise Invalid(f"{name} is '{given}'; it must be a whole number above 0")
    return int(given)


class Span(NamedTuple):
    """What is kept of a call until it is exported: its bodies are not."""

    trace_id: str
    parent: str
    name: str
    status: str
    started_ns: int
    latency_ns: int
    told: dict[str, Any]

    @classmethod
    def of(cls, call: Finished) -> Span:
        return cls(call.trace_id, call.parent, f"{call.method} {call.model}", call.status, call.started_ns,
                   call.latency_ns, {
            "modelyard.model": call.model, "modelyard.protocol": call.protocol,
            "modelyard.prediction_id": call.prediction_id, "modelyard.request_id": call.request_id,
            "modelyard.queue_ms": call.queue_ns / 1e6, "modelyard.status": call.status,
            "modelyard.request_bytes": len(call.request), "modelyard.response_bytes": len(call.response)})


@dataclass
class Otlp:
    """``offer`` takes what was answered, ``start`` begins to export, ``close`` sends what is left."""

    plan: Plan
    about: Mapping[str, str]
    """Attributes of the resource."""
    metrics: Metrics
    say: Callable[[str], None]
    totals: Counter[str] = field(default_factory=Counter)
    """``spans`` sent, ``spans-dropped``, and ``exports-failed`` of either kind."""
    _spans: deque[Span] = field(default_factory=deque)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None
    _failing: bool = False

    def offer(self, calls: Iterable[Finished]) -> None:
        """Answered calls. In the event loop, once a batch."""
        for call in calls:
            if call.parent:
                if len(self._spans) < self.plan.spans_kept:
                    self._spans.append(Span.of(call))
                else:
                    self.totals["spans-dropped"] += 1

    def start(self) -> None:
        """Exports from now on, in a task."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Sends what is left, for a few seconds at most."""
        self._over.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=LAST_S)

    async def _run(self) -> None:
        if importlib.util.find_spec("opentelemetry") is None:
            self.say(f"nothing goes to {ENDPOINT}: add {PACKAGE} to the image's requirements")
            return
        sink = await asyncio.to_thread(Sink, self.plan, self.about)
        self.say(f"OTLP: {' and '.join(sink.signals)} go to the collector")
        pause = self.plan.spans_s if self.plan.traces else self.plan.metrics_s
        loop = asyncio.get_running_loop()
        due = loop.time() + self.plan.metrics_s if self.plan.metrics else math.inf
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), max(min(pause, due - loop.time()), 0.0))
            now = loop.time()
            await self._export(sink, metrics=now >= due or (self._over.is_set() and self.plan.metrics))
            if now >= due:
                due = now + self.plan.metrics_s
        await asyncio.to_thread(sink.close)

    async def _export(self, sink: Sink, metrics: bool) -> None:
        if not self._spans and not metrics:
            return
        good = True
        while self._spans and good:
            spans = [self._spans.popleft() for _ in range(min(len(self._spans), self.plan.spans_sent))]
            good = await asyncio.to_thread(sink.spans, spans)
            self.totals["spans" if good else "spans-dropped"] += len(spans)
        if metrics:
            good = await asyncio.to_thread(sink.metrics, list(self.metrics.collect())) and good
        self.totals["exports-failed"] += not good
        if good == self._failing:
            self._failing = not good
            self.say("OTLP: the collector answers again" if good else
                     "OTLP: the collector does not answer; what it misses is counted and not sent again")


class Sink:
    """The exporters. Every method blocks, and none raises what a collector does."""

    def __init__(self, plan: Plan, about: Mapping[str, str]) -> None:
        import logging

        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # one line of ours tells it
        named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        self._resource = Resource.create({k: v for k, v in about.items() if k != "service.name" or not named})
        self._scope = InstrumentationScope("modelyard.scoring", __version__)
        self._traces = OTLPSpanExporter() if plan.traces else None
        self._metrics = OTLPMetricExporter() if plan.metrics else None

    @property
    def signals(self) -> list[str]:
        return [name for name, there in (("metrics", self._metrics), ("spans", self._traces)) if there is not None]

    def spans(self, spans: Sequence[Span]) -> bool:
        """Whether the collector took them."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        assert self._traces is not None
        return self._traces.export([self._span(span) for span in spans]) is SpanExportResult.SUCCESS

    def metrics(self, families: Sequence[Any]) -> bool:
        """Whether the collector took them. ``families``: as Prometheus has them."""
        from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, ResourceMetrics, ScopeMetrics

        assert self._metrics is not None
        scoped = ScopeMetrics(self._scope, list(converted(families)), "")
        data = MetricsData([ResourceMetrics(self._resource, [scoped], "")])
        return self._metrics.export(data) is MetricExportResult.SUCCESS

    def close(self) -> None:
        for exporter in (self._traces, self._metrics):
            if exporter is not None:
                exporter.shutdown()

    def _span(self, span: Span) -> Any:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        trace, flags = int(span.trace_id, 16), TraceFlags(TraceFlags.SAMPLED)
        good = span.status == "OK"
        return ReadableSpan(
            name=span.name, kind=SpanKind.SERVER, resource=self._resource,
            context=SpanContext(trace, secrets.randbits(64) or 1, False, flags),
            parent=SpanContext(trace, int(span.parent, 16), True, flags), attributes=span.told,
            status=Status(StatusCode.OK) if good else Status(StatusCode.ERROR, span.status),
            start_time=span.started_ns, end_time=span.started_ns + span.latency_ns, instrumentation_scope=self._scope)


def converted(families: Iterable[Any]) -> Iterator[Any]:
    """Prometheus families as OpenTelemetry's metrics, cumulative since this process started."""
    from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Histogram, Metric, Sum

    now, total = time.time_ns(), AggregationTemporality.CUMULATIVE
    for family in families:
        if family.type == "histogram":
            data: Any = Histogram(_histograms(family, now), total)
        elif family.type == "counter":
            data = Sum(_numbers(family, now, int), total, is_monotonic=True)
        else:
            data = Gauge(_numbers(family, now, float))
        if data.data_points:
            unit = "s" if family.name.endswith("_seconds") else "1"
            yield Metric(family.name, family.documentation, unit, data)


def _numbers(family: Any, now: int, kind: type[int] | type[float]) -> list[Any]:
    from opentelemetry.sdk.metrics.export import NumberDataPoint

    return [NumberDataPoint(s.labels, STARTED_NS, now, kind(s.value)) for s in family.samples]


def _histograms(family: Any, now: int) -> list[Any]:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    found: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for sample in family.samples:
        labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
        one = found.setdefault(labels, {"steps": [], "sum": 0.0})
        if sample.name.endswith("_bucket"):
            one["steps"].append((float(sample.labels["le"]), int(sample.value)))
        elif sample.name.endswith("_sum"):
            one["sum"] = sample.value
    points = []
    for labels, one in found.items():
        steps = sorted(one["steps"])
        counts = [count - before for (_, count), before in zip(steps, [0, *(c for _, c in steps)], strict=False)]
        points.append(HistogramDataPoint(
            dict(labels), STARTED_NS, now, sum(counts), one["sum"], counts,
            [edge for edge, _ in steps if not math.isinf(edge)], math.inf, -math.inf))  # as the SDK writes: not known
    return points

