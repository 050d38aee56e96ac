"""What gRPC promises, on both transports, with gRPC's own clients: methods, metadata, statuses, deadlines, sizes."""

from __future__ import annotations

import gzip
import time
import uuid
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.contract.transports import INFER, SERVICE, Served, ask, failed, outcome, serving, wait_for

MIB = 1 << 20


def test_every_method_answers(channel: grpc.Channel) -> None:
    stub = GRPCInferenceServiceStub(channel)
    assert stub.ServerLive(pb.ServerLiveRequest()).live and stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="flower")).ready
    server = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (server.name, list(server.extensions)) == ("modelyard", ["model_stream_infer"])
    assert stub.ModelMetadata(pb.ModelMetadataRequest(name="flower")).name == "flower"
    assert stub.ModelInfer(pb.ModelInferRequest.FromString(ask(id="7"))).id == "7"
    answers = list(stub.ModelStreamInfer(iter([pb.ModelInferRequest.FromString(ask(id=str(n))) for n in range(3)])))
    assert [a.infer_response.id for a in answers] == ["0", "1", "2"]
    for method, message in ((stub.ModelReady, pb.ModelReadyRequest(name="no")),
                            (stub.ModelMetadata, pb.ModelMetadataRequest(name="no"))):
        assert failed(lambda m=method, r=message: m(r)).code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata", "ModelInfer", "ServerReady"])
def test_a_body_that_is_no_message_is_an_invalid_argument(channel: grpc.Channel, method: str) -> None:
    error = failed(lambda: channel.unary_unary(f"/{SERVICE}/{method}")(b"\x0a\xffnot a message"))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "is not a " in error.details()


def test_metadata_goes_both_ways(channel: grpc.Channel, served: Served) -> None:
    mine = uuid.uuid4().hex
    _, call = channel.unary_unary(INFER).with_call(ask(), metadata=(
        ("x-request-id", mine), ("traceparent", f"00-{mine}-00f067aa0ba902b7-01"), ("other", "a, b"),
        ("other-bin", bytes(range(256)))))
    metadata = dict(call.trailing_metadata())
    assert metadata["x-request-id"] == mine and metadata["x-modelyard-deployment"] == "flower"
    assert len(metadata["x-modelyard-prediction-id"]) == 32 and metadata["x-modelyard-model"]
    [record] = wait_for(lambda: served.captured(mine))
    assert record["trace_id"] == mine and record["status"] == "OK" and record["request"] == ask()
    assert record["prediction_id"] == metadata["x-modelyard-prediction-id"]


def test_a_binary_trace_context_is_read(channel: grpc.Channel, served: Served) -> None:
    mine, trace = uuid.uuid4().hex, uuid.uuid4()
    channel.unary_unary(INFER)(ask(), metadata=(
        ("x-request-id", mine), ("grpc-trace-bin", b"\0\0" + trace.bytes + b"\1" + b"12345678" + b"\2\1")))
    [record] = wait_for(lambda: served.captured(mine))
    assert record["trace_id"] == (trace.hex if served.transport == "h2" else ""), "grpcio keeps it to itself"


def test_statuses_carry_message_and_details(channel: grpc.Channel) -> None:
    infer = channel.unary_unary(INFER)
    cases = [(ask(model="größe 100%\n"), "NOT_FOUND", b"not-found", "größe 100%\n"),
             (b"\xff", "INVALID_ARGUMENT", b"invalid", "ModelInferRequest"),
             (ask(fail=True), "INTERNAL", b"scoring-failed", "100% größer\nals erlaubt")]
    for body, code, reason, text in cases:
        error = failed(lambda b=body: infer(b, metadata=(("x-request-id", "mine"),)))
        assert error.code().name == code and text in error.details()
        metadata = dict(error.trailing_metadata())
        assert metadata["x-request-id"] == "mine"
        assert reason in metadata["grpc-status-details-bin"] and b"google.rpc.ErrorInfo" in \
            metadata["grpc-status-details-bin"]


def test_a_long_message_of_an_error_fits_into_headers(channel: grpc.Channel) -> None:
    error = failed(lambda: channel.unary_unary(INFER)(ask(model="ß" * 20_000)))
    assert error.code() == grpc.StatusCode.NOT_FOUND and "ß" * 100 in error.details()


@pytest.mark.parametrize("path", [f"/{SERVICE}/No", "/no.Service/Method", "/", f"/{SERVICE}/ModelInfer/"])
def test_unknown_methods_are_unimplemented(channel: grpc.Channel, path: str) -> None:
    assert failed(lambda: channel.unary_unary(path)(b"")).code() == grpc.StatusCode.UNIMPLEMENTED
    assert failed(lambda: list(channel.stream_stream(path)(iter([b"x"])))).code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_deadline_ends_the_call_and_what_has_expired_never_runs(channel: grpc.Channel, served: Served) -> None:
    infer, mark = channel.unary_unary(INFER), uuid.uuid4().hex
    ahead = infer.future(ask(mark=mark + "-ahead", sleep=1.0))
    wait_for(lambda: mark + "-ahead" in served.ran())
    began = time.monotonic()
    error = failed(lambda: infer(ask(mark=mark + "-late"), timeout=0.3, metadata=(("x-request-id", mark),)))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED and time.monotonic() - began < 0.9
    assert not ahead.done()
    ahead.result(10)
    infer(ask(mark=mark + "-after"))
    assert [m for m in served.ran() if m.startswith(mark)] == [mark + "-ahead", mark + "-after"]
    [record] = wait_for(lambda: served.captured(mark))
    assert record["status"] in ("DEADLINE_EXCEEDED", "CANCELLED")


@pytest.mark.slow
def test_calls_that_expire_do_not_end_their_connection(channel: grpc.Channel, served: Served) -> None:
    """By the hundred: what else is under way on it is answered. Who is too late to be answered resets its stream, which
    in such numbers looks like an attack."""
    infer = channel.unary_unary(INFER)
    long = infer.future(ask(mark="long-one", sleep=3), timeout=30)
    wait_for(lambda: "long-one" in served.ran())
    for _ in range(3):
        ended = [infer.future(ask(mark="expired"), timeout=0.4) for _ in range(100)]
        assert {call.code() for call in ended} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert outcome(long.result()).tolist() == [0]
    assert "expired" not in served.ran()


def test_a_cancelled_call_never_runs(channel: grpc.Channel, served: Served) -> None:
    infer, mark = channel.unary_unary(INFER), uuid.uuid4().hex
    ahead = infer.future(ask(mark=mark + "-ahead", sleep=0.6))
    wait_for(lambda: mark + "-ahead" in served.ran())
    queued = infer.future(ask(mark=mark + "-cancelled"), metadata=(("x-request-id", mark),))
    wait_for(lambda: served.in_flight() >= 2)
    assert queued.cancel() and queued.code() == grpc.StatusCode.CANCELLED
    [record] = wait_for(lambda: served.captured(mark))
    assert record["status"] == "CANCELLED" and not ahead.done()
    ahead.result(10)
    infer(ask(mark=mark + "-after"))
    assert [m for m in served.ran() if m.startswith(mark)] == [mark + "-ahead", mark + "-after"]


@pytest.mark.slow
def test_a_message_of_nearly_64_mib(channel: grpc.Channel) -> None:
    big = np.arange(63 * MIB // 8, dtype="f8")
    assert np.array_equal(outcome(channel.unary_unary(INFER)(ask(big), timeout=60)), big)


@pytest.mark.slow
def test_a_message_over_the_limit_is_refused(channel: grpc.Channel) -> None:
    error = failed(lambda: channel.unary_unary(INFER)(bytes(64 * MIB + 1), timeout=60))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and str(64 * MIB) in error.details()


@pytest.mark.parametrize("kind", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests_are_understood(channel: grpc.Channel, kind: Any) -> None:
    for size in (10, 100_000):
        x = np.zeros(size)
        assert np.array_equal(outcome(channel.unary_unary(INFER)(ask(x), compression=kind)), x)
    stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
    answers = list(stream(iter([ask(np.zeros(1000), id=str(n)) for n in range(3)]), compression=kind))
    assert [pb.ModelStreamInferResponse.FromString(a).infer_response.id for a in answers] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_small_message_that_inflates_over_the_limit_is_refused(tmp_path: Path, served: Served) -> None:
    with serving(tmp_path, served.transport, limits={"max_message_bytes": MIB}) as it, \
            grpc.insecure_channel(it.address) as channel:
        body = ask(np.zeros(MIB // 4))
        assert len(gzip.compress(body)) < MIB / 100
        error = failed(lambda: channel.unary_unary(INFER)(body, compression=grpc.Compression.Gzip))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert outcome(channel.unary_unary(INFER)(ask(), compression=grpc.Compression.Gzip)).tolist() == [0]


def test_health_check_and_watch(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    known, unknown = health_pb2.HealthCheckRequest(service=SERVICE), health_pb2.HealthCheckRequest(service="no")
    serving_, states = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse
    assert stub.Check(health_pb2.HealthCheckRequest()).status == stub.Check(known).status == serving_
    assert failed(lambda: stub.Check(unknown)).code() == grpc.StatusCode.NOT_FOUND
    for message, expected in ((known, serving_), (unknown, states.SERVICE_UNKNOWN)):
        watch = stub.Watch(message)
        assert next(watch).status == expected
        watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection(channel: grpc.Channel, version: str) -> None:
    info = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString, reflection_pb2.ServerReflectionResponse.FromString)
    asked = [reflection_pb2.ServerReflectionRequest(list_services=""),
             reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
             reflection_pb2.ServerReflectionRequest(file_by_filename="no.proto")]
    services, symbol, missing = info(iter(asked), timeout=10)
    names = {service.name for service in services.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", f"grpc.reflection.{version}.ServerReflection"} <= names
    assert symbol.file_descriptor_response.file_descriptor_proto
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_reflection_with_grpcs_own_client(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert SERVICE in database.get_services()
    assert database.FindFileContainingSymbol(SERVICE).package == "inference"
