"""Metrics: plain counters on the path of a call, turned into Prometheus families when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

EDGES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts calls. Written by the event loop only."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._calls: Counter[tuple[str, str, str]] = Counter()
        self._buckets: dict[str, list[int]] = defaultdict(lambda: [0] * (len(EDGES_S) + 1))
        self._seconds: dict[str, float] = defaultdict(float)
        self._gauges: dict[str, tuple[str, Callable[[], Mapping[str, float]], str]] = {}

    def finished(self, model: str, protocol: str, status: str, seconds: float) -> None:
        """One admitted call ended."""
        self._calls[model, protocol, status] += 1
        self._buckets[model][bisect_left(EDGES_S, seconds)] += 1
        self._seconds[model] += seconds

    def refused(self, protocol: str, status: str) -> None:
        """One call was turned away before it was admitted."""
        self._calls["", protocol, status] += 1

    def gauge(self, name: str, help_: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Values read when somebody asks: label's value → number."""
        self._gauges[name] = (help_, read, label)

    @property
    def total(self) -> int:
        """Every call counted so far."""
        return sum(self._calls.values())

    def collect(self) -> Iterator[Any]:
        """Prometheus families (the collector protocol of prometheus-client)."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        calls = CounterMetricFamily("modelyard_scoring_calls", "Calls by outcome; model is empty for refused ones.",
                                    labels=("model", "protocol", "status"))
        for labels, n in self._calls.items():
            calls.add_metric(labels, n)
        yield calls
        latency = HistogramMetricFamily("modelyard_scoring_latency_seconds", "From arrival to answer, admitted calls.",
                                        labels=("model",))
        for model, buckets in self._buckets.items():
            total = 0
            steps: list[tuple[str, float]] = []
            for edge, n in zip((*map(str, EDGES_S), "+Inf"), buckets, strict=True):
                total += n
                steps.append((edge, float(total)))
            latency.add_metric((model,), steps, self._seconds[model])
        yield latency
        flight = GaugeMetricFamily("modelyard_scoring_in_flight", "Calls being answered.")
        flight.add_metric((), self.in_flight)
        yield flight
        for name, (help_, read, label) in self._gauges.items():
            family = GaugeMetricFamily(name, help_, labels=(label,))
            for value, level in read().items():
                family.add_metric((value,), level)
            yield family

    def text(self) -> bytes:
        """The exposition format, the process's own metrics included."""
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        registry.register(self)
        return generate_latest(registry)
