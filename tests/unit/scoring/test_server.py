"""A real replica process, over its sockets: every method of the protocol on both transports."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.unit.scoring.roots import Replica

FLOWER = np.array([[5.1, 3.5, 1.4, 0.2]])


@pytest.fixture(scope="module")
def channel(replica: Replica) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(replica.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(channel)


def request(model: str = "iris", rows: np.ndarray = FLOWER, typed: bool = False, **fields: Any) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP64", shape=rows.shape)
    if typed:
        tensor.contents.fp64_contents.extend(rows.ravel().tolist())
    return pb.ModelInferRequest(
        model_name=model, inputs=[tensor], raw_input_contents=[] if typed else [rows.tobytes()], **fields
    )


def http(
    replica: Replica, path: str, body: Any = None, headers: Any = None, method: str | None = None
) -> tuple[int, Any, bytes]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(f"http://{replica.http}{path}", data=data, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.headers, exc.read()


def refused(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value


def test_liveness_readiness_metadata(stub: GRPCInferenceServiceStub, replica: Replica) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest()).live and stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="iris", version="4")).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "modelyard"
    onnx = stub.ModelMetadata(pb.ModelMetadataRequest(name="iris-onnx"))
    assert (onnx.name, list(onnx.versions), onnx.platform) == ("iris-onnx", ["2"], "onnx_onnxv1")
    assert [(t.name, t.datatype, list(t.shape)) for t in onnx.inputs] == [("X", "FP32", [-1, 4])]
    for method, message in (
        (stub.ModelReady, pb.ModelReadyRequest(name="no")),
        (stub.ModelMetadata, pb.ModelMetadataRequest(name="iris", version="9")),
    ):
        assert refused(lambda m=method, r=message: m(r)).code() == grpc.StatusCode.NOT_FOUND
    for path, expected in (
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/iris/ready", {"name": "iris", "ready": True}),
        ("/v2/models/iris/versions/4/ready", {"name": "iris", "ready": True}),
    ):
        status, _, body = http(replica, path)
        assert (status, json.loads(body)) == (200, expected)
    rest = json.loads(http(replica, "/v2/models/iris-onnx/versions/2")[2])
    assert rest["inputs"] == [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}] and rest["versions"] == ["2"]
    assert json.loads(http(replica, "/v2")[2])["extensions"] == ["binary_tensor_data"]
    assert http(replica, "/v2/models/no")[0] == 404 and replica.get("/livez")[0] == 200


def test_infer_raw_and_typed_with_ids(stub: GRPCInferenceServiceStub) -> None:
    answer, call = stub.ModelInfer.with_call(request(id="7"), metadata=(("x-request-id", "mine"),))
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "iris", "4")
    assert np.frombuffer(answer.raw_output_contents[0], "<i8").tolist() == [0]
    metadata = dict(call.trailing_metadata())
    assert metadata["x-request-id"] == "mine" and metadata["x-modelyard-model"] == "iris:4"
    assert metadata["x-modelyard-deployment"] == "flower" and len(metadata["x-modelyard-prediction-id"]) == 32
    typed = stub.ModelInfer(request(typed=True, rows=np.repeat(FLOWER, 3, 0)))
    assert list(typed.outputs[0].contents.int64_contents) == [0, 0, 0] and not typed.raw_output_contents


def test_stream_answers_in_order_and_survives_bad_messages(stub: GRPCInferenceServiceStub) -> None:
    messages = [request(id=str(n), model="no" if n == 2 else "iris") for n in range(5)]
    answers = list(stub.ModelStreamInfer(iter(messages), timeout=10))
    assert [a.infer_response.id for a in answers] == ["0", "1", "2", "3", "4"]
    assert [bool(a.error_message) for a in answers] == [False, False, True, False, False]
    assert answers[2].error_message.startswith("NOT_FOUND: no model 'no'")


def test_refusals_over_grpc(stub: GRPCInferenceServiceStub, channel: grpc.Channel) -> None:
    cases = [
        (request("nobody"), "NOT_FOUND"),
        (request(model_version="5"), "NOT_FOUND"),
        (request(rows=FLOWER[:, :2]), "INVALID_ARGUMENT"),
        (pb.ModelInferRequest(model_name="iris"), "INVALID_ARGUMENT"),
        (request(rows=np.zeros((4000, 4))), "RESOURCE_EXHAUSTED"),
    ]
    for message, status in cases:
        error = refused(lambda m=message: stub.ModelInfer(m))
        assert error.code().name == status, error
    assert "65536" in error.details(), "the limit is stated"
    raw = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    assert refused(lambda: raw(b"\xff\xff\xff")).code().name == "INVALID_ARGUMENT"
    assert (
        dict(refused(lambda: raw(b"\xff", metadata=(("x-request-id", "bad"),))).trailing_metadata())["x-request-id"]
        == "bad"
    )
    assert (
        refused(lambda: channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"")).code().name
        == "UNIMPLEMENTED"
    )


def test_health_and_watch(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "inference.GRPCInferenceService"):
        assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == 1
        watch = health.Watch(health_pb2.HealthCheckRequest(service=service))
        assert next(watch).status == 1
        watch.cancel()
    assert refused(lambda: health.Check(health_pb2.HealthCheckRequest(service="no"))).code().name == "NOT_FOUND"


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection(channel: grpc.Channel, version: str) -> None:
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
    ]
    listed, file = call(iter(asked), timeout=5)
    names = {s.name for s in listed.list_services_response.service}
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
    assert b"ModelStreamInfer" in file.file_descriptor_response.file_descriptor_proto[0]
    assert reflection_pb2_grpc.ServerReflectionStub(channel) is not None


def test_rest_infer(replica: Replica) -> None:
    tensor = {"name": "x", "datatype": "FP64", "shape": [1, 4], "data": FLOWER.ravel().tolist()}
    status, headers, body = http(
        replica,
        "/v2/models/iris/infer",
        {"id": "7", "inputs": [tensor], "outputs": [{"name": "predict"}, {"name": "predict_proba"}]},
        {"x-request-id": "mine"},
    )
    answer = json.loads(body)
    assert (
        status == 200 and answer["id"] == "7" and [o["name"] for o in answer["outputs"]] == ["predict", "predict_proba"]
    )
    assert headers["x-request-id"] == "mine" and headers["x-modelyard-model"] == "iris:4"
    assert headers["x-modelyard-deployment"] == "flower" and headers["x-modelyard-prediction-id"]
    assert http(replica, "/v2/models/iris/versions/4/infer", {"inputs": [tensor]})[0] == 200
    assert http(replica, "/v2/models/iris/versions/5/infer", {"inputs": [tensor]})[0] == 404


def test_rest_binary_extension(replica: Replica) -> None:
    head = json.dumps(
        {
            "inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 4], "parameters": {"binary_data_size": 32}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    status, headers, body = http(
        replica,
        "/v2/models/iris/infer",
        head + FLOWER.tobytes(),
        {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"},
    )
    length = int(headers["Inference-Header-Content-Length"])
    assert status == 200 and json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert np.frombuffer(body[length:], "<i8").tolist() == [0]
    for given in ("x", "99999"):
        assert http(replica, "/v2/models/iris/infer", head, {"Inference-Header-Content-Length": given})[0] == 400


def test_rest_refusals_are_problems(replica: Replica) -> None:
    cases = [
        ("/v2/models/iris/infer", b"{", 400, "invalid"),
        ("/v2/models/no/infer", {"inputs": []}, 404, "not-found"),
        ("/score", {"data": [[1, 2, 3, 4]]}, 404, "not-found"),
        ("/nowhere", None, 404, "not-found"),
        ("/v2/models/iris/infer", None, 405, "method-not-allowed"),
        ("/v2/models/iris/infer", b"x" * 70_000, 413, "too-large"),
        ("/swagger.json?version=4", None, 404, "not-found"),
    ]
    for path, body, status, code in cases:
        got, headers, raw = http(replica, path, body)
        problem = json.loads(raw)
        assert (got, problem["code"], problem["status"]) == (status, code, status), raw
        assert headers["Content-Type"].startswith("application/problem+json") and b"Traceback" not in raw


def test_chunked_body_over_the_limit(replica: Replica) -> None:
    host, port = replica.http.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as s:
        s.sendall(b"POST /v2/models/iris/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        s.sendall(b"11170\r\n" + b"x" * 70_000 + b"\r\n0\r\n\r\n")
        answer = s.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413") and b"65536" in answer


def test_companions(replica: Replica, stub: GRPCInferenceServiceStub) -> None:
    assert stub.ModelInfer(request()).model_version == "4"
    assert http(replica, "/")[2] == b"Healthy"
    for version, key in (("", "swagger"), ("?version=2", "swagger"), ("?version=3", "openapi")):
        document = json.loads(http(replica, f"/swagger.json{version}")[2])
        assert key in document and "/score" in document["paths"]
    for text in (http(replica, "/metrics")[2].decode(), replica.get("/metrics")[1].decode()):
        assert 'modelyard_scoring_calls_total{model="iris:4",protocol="grpc",status="OK"}' in text
        assert 'modelyard_scoring_latency_seconds_bucket{le="0.01",model="iris:4"}' in text
        assert "modelyard_scoring_in_flight" in text and "process_resident_memory_bytes" in text


def test_deadline_travels(stub: GRPCInferenceServiceStub) -> None:
    assert stub.ModelInfer(request(), timeout=5).model_version == "4"
    large = request(rows=np.zeros((400_000, 4), np.float32))  # 6 MB: on its way for longer than a tick of gRPC's clock
    assert refused(lambda: stub.ModelInfer(large, timeout=1e-6)).code().name == "DEADLINE_EXCEEDED"
