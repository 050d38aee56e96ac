"""Metrics: plain counters on the path of a call, turned into Prometheus families when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from operator import attrgetter
from typing import Any

from .tally import Finished

EDGES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SHORT_S = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, *EDGES_S)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
OUTCOME = attrgetter("model", "protocol", "status")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts per bucket and a sum, by model. ``scale``: what one unit that is exposed is in units that are counted."""

    def __init__(self, name: str, help_: str, edges: tuple[float, ...], scale: int = 1) -> None:
        self._name, self._help, self._scale = name, help_, scale
        self._labels = (*map(str, edges), "+Inf")
        self._edges = tuple(round(edge * scale) for edge in edges)
        self._models: dict[str, list[int]] = {}

    def observe(self, model: str, value: int) -> None:
        counts = self._models.get(model)
        if counts is None:
            counts = self._models[model] = [0] * (len(self._labels) + 1)
        counts[bisect_left(self._edges, value)] += 1
        counts[-1] += value

    def observe_all(self, model: str, values: Sequence[int]) -> None:
        """At least one."""
        self.observe(model, values[0])
        counts, edges = self._models[model], self._edges
        for value in values[1:]:
            counts[bisect_left(edges, value)] += 1
        counts[-1] += sum(values) - values[0]

    def family(self) -> Any:
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(self._name, self._help, labels=("model",))
        for model, (*counts, total) in self._models.items():
            steps = zip(self._labels, map(float, accumulate(counts)), strict=True)
            family.add_metric((model,), list(steps), total / self._scale)
        return family


class Metrics:
    """Counts calls. Written by the event loop only."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._calls: Counter[tuple[str, str, str]] = Counter()
        self._latency = Histogram("modelyard_scoring_latency_seconds", "From arrival to answer, admitted calls.",
                                  EDGES_S, 10**9)
        self._queue = Histogram("modelyard_scoring_queue_seconds", "From arrival to being begun, admitted calls.",
                                SHORT_S, 10**9)
        self._model = Histogram("modelyard_scoring_model_seconds", "What the model took for a batch.", SHORT_S, 10**9)
        self._sizes = Histogram("modelyard_scoring_batch_calls", "Calls that one prediction answered.", SIZES)
        self._gauges: dict[str, tuple[str, Callable[[], Mapping[str, float]], str]] = {}

    def finished(self, calls: Sequence[Finished]) -> None:
        """These admitted calls ended together."""
        for outcome, same in groupby(calls, OUTCOME):
            group = list(same)
            self._calls[outcome] += len(group)
            self._latency.observe_all(outcome[0], [call.latency_ns for call in group])
            self._queue.observe_all(outcome[0], [call.queue_ns for call in group])

    def batch(self, model: str, calls: int, model_ns: int) -> None:
        """One batch ended, of this many calls."""
        self._sizes.observe(model, calls)
        self._model.observe(model, model_ns)

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
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        calls = CounterMetricFamily("modelyard_scoring_calls", "Calls by outcome; model is empty for refused ones.",
                                    labels=("model", "protocol", "status"))
        for labels, n in self._calls.items():
            calls.add_metric(labels, n)
        yield calls
        for histogram in (self._latency, self._queue, self._model, self._sizes):
            yield histogram.family()
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
