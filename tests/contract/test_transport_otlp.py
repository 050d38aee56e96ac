"""What a collector gets: a span for each call that its caller traces, on every transport, and the metrics."""

from __future__ import annotations

import gzip
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from modelyard.core.errors import Invalid
from modelyard.scoring.otlp import Plan
from modelyard.scoring.transport import binary_trace, trace
from tests.contract.transports import INFER, ask, serving

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
QUICK = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_METRIC_EXPORT_INTERVAL": "100"}
PATHS: dict[str, Any] = {"/v1/traces": ExportTraceServiceRequest, "/v1/metrics": ExportMetricsServiceRequest}


class Collector:
    """Takes OTLP over HTTP, and keeps the messages."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if outer.status == 200:
                    outer.got.append(PATHS[self.path].FromString(body))
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def spans(self) -> list[Any]:
        return [span for one in list(self.got) if isinstance(one, ExportTraceServiceRequest)
                for r in one.resource_spans for s in r.scope_spans for span in s.spans]

    def metrics(self) -> dict[str, Any]:
        """The newest of each name."""
        return {m.name: m for one in list(self.got) if isinstance(one, ExportMetricsServiceRequest)
                for r in one.resource_metrics for s in r.scope_metrics for m in s.metrics}

    def resource(self) -> dict[str, str]:
        first = self.got[0]
        found = (first.resource_spans if isinstance(first, ExportTraceServiceRequest) else first.resource_metrics)[0]
        return {a.key: a.value.string_value for a in found.resource.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    try:
        yield made
    finally:
        made.close()


def until(true: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def call(address: str, *metadata: tuple[str, str | bytes], **asked: Any) -> None:
    with grpc.insecure_channel(address) as channel:
        channel.unary_unary(INFER)(ask(**asked), timeout=20, metadata=metadata)


@pytest.mark.parametrize("transport", ["h2", "grpc"])
@pytest.mark.slow
def test_a_traced_call_is_a_span_and_an_untraced_one_is_not(
        tmp_path: Path, transport: str, collector: Collector) -> None:
    env = QUICK | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_RESOURCE_ATTRIBUTES": "team=flora"}
    with serving(tmp_path, transport, env) as served:
        call(served.address)
        call(served.address, ("traceparent", UNSAMPLED))
        call(served.address, ("traceparent", SAMPLED), ("x-request-id", "one"))
        with pytest.raises(grpc.RpcError):
            call(served.address, ("traceparent", SAMPLED), ("x-request-id", "two"), fail=True)
        asked = urllib.request.Request(f"http://{served.replica.http}/v2/models/flower/infer", REST,
                                       {"traceparent": SAMPLED, "Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=20) as answer:
            prediction = answer.headers["x-modelyard-prediction-id"]
        until(lambda: len(collector.spans()) == 3, "three calls are traced, two are not")
        until(lambda: "modelyard_scoring_calls" in collector.metrics(), "metrics come by themselves")
        spans = {told(span)["modelyard.protocol"] + "/" + told(span)["modelyard.status"]: span
                 for span in collector.spans()}
        assert sorted(spans) == ["grpc/INTERNAL", "grpc/OK", "rest/OK"]
        for span in spans.values():
            assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
            assert span.end_time_unix_nano >= span.start_time_unix_nano > 0
            assert span.kind == span.SPAN_KIND_SERVER
        assert spans["grpc/OK"].status.code == 1
        assert spans["grpc/INTERNAL"].status.code == 2
        assert told(spans["rest/OK"])["modelyard.prediction_id"] == prediction
        assert told(spans["grpc/OK"])["modelyard.request_id"] == "one"
        about = collector.resource()
        assert about["team"] == "flora"
        assert about["service.name"] == "flower"
        assert about["service.instance.id"].startswith("0-")
        served.replica.stop()
    latency = collector.metrics()["modelyard_scoring_latency_seconds"]
    point = latency.histogram.data_points[0]
    assert sum(point.bucket_counts) == point.count == 5  # exported once more when the replica left
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    calls = collector.metrics()["modelyard_scoring_calls"].sum
    assert calls.is_monotonic
    assert sum(p.as_int for p in calls.data_points) == 5


def told(span: Any) -> dict[str, str]:
    return {a.key: a.value.string_value for a in span.attributes}


REST = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP64", "data": [1.0]}]}'


@pytest.mark.slow
def test_a_collector_that_is_away_costs_no_call_and_is_told_of_once(tmp_path: Path, collector: Collector) -> None:
    collector.status = 400  # final, where 503 would be tried again for seconds
    env = QUICK | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.address + "/v1/traces",
                   "OTEL_BSP_MAX_QUEUE_SIZE": "2", "OTEL_BSP_SCHEDULE_DELAY": "1000"}
    with serving(tmp_path, "h2", env) as served:
        until(lambda: "OTLP: spans go" in served.replica.log.read_text(), "it starts")
        for _ in range(5):
            call(served.address, ("traceparent", SAMPLED))
        until(lambda: "does not answer" in served.replica.log.read_text(), "the log tells")
        until(lambda: b'otlp{what="spans-dropped"} 5.0' in served.replica.get("/metrics")[1], "all are counted")
        collector.status = 200
        call(served.address, ("traceparent", SAMPLED))
        until(lambda: len(collector.spans()) == 1, "later ones arrive")
        until(lambda: "answers again" in served.replica.log.read_text(), "the log tells")
        assert served.replica.log.read_text().count("does not answer") == 1


@pytest.mark.parametrize(("given", "found"), [
    (SAMPLED, (TRACE, SPAN)), (UNSAMPLED, (TRACE, "")), (f"cc-{TRACE}-{SPAN}-03-more", (TRACE, SPAN)),
    (None, ("", "")), ("", ("", "")), (f"ff-{TRACE}-{SPAN}-01", ("", "")), (SAMPLED + "-more", ("", "")),
    (f"00-{'0' * 32}-{SPAN}-01", ("", "")), (f"00-{TRACE}-{'0' * 16}-01", ("", "")), (SAMPLED.upper(), ("", "")),
    (f"00-{TRACE}-{SPAN}", ("", "")), (SAMPLED + "\n", ("", ""))])
def test_a_traceparent_is_as_w3c_says(given: str | None, found: tuple[str, str]) -> None:
    assert trace(given) == found


def test_grpc_trace_bin_says_the_same() -> None:
    packed = b"\0\0" + bytes.fromhex(TRACE) + b"\1" + bytes.fromhex(SPAN) + b"\2"
    assert binary_trace(packed + b"\1") == (TRACE, SPAN)
    assert binary_trace(packed + b"\0") == binary_trace(packed[:18]) == (TRACE, "")
    assert binary_trace(packed[:17]) == binary_trace(b"\1" + packed[1:]) == ("", "")


def test_what_is_asked_for_and_what_is_wrong() -> None:
    assert Plan.read({}) is None
    assert Plan.read({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}) is None
    assert Plan.read({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_METRICS_EXPORTER": "none"}) == Plan(True, False)
    with pytest.raises(Invalid, match="http/protobuf"):
        Plan.read({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    with pytest.raises(Invalid, match="OTEL_BSP_SCHEDULE_DELAY"):
        Plan.read({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_BSP_SCHEDULE_DELAY": "soon"})
