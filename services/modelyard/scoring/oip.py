"""The calls of the Open Inference Protocol that ask about the server and its models, for every gRPC transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from ..core.errors import Invalid
from ..core.version import __version__
from ..wire import inference_pb2 as pb
from .dataplane import DataPlane

SERVICE = "inference.GRPCInferenceService"
EXTENSIONS = ("model_stream_infer",)
Method = Callable[[bytes], bytes]
"""A message's bytes → its answer's. Raises ModelyardError."""


def methods(plane: DataPlane) -> dict[str, Method]:
    """Name → method: all of the service but the two that infer."""
    def live(request: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    def ready(request: Any) -> Any:
        return pb.ServerReadyResponse(ready=plane.ready)

    def server(request: Any) -> Any:
        return pb.ServerMetadataResponse(name="modelyard", version=__version__, extensions=EXTENSIONS)

    def model_ready(request: Any) -> Any:
        plane.about(request.name, request.version)
        return pb.ModelReadyResponse(ready=plane.ready)

    def model(request: Any) -> Any:
        _, runner = plane.about(request.name, request.version)
        answer = pb.ModelMetadataResponse(name=request.name, versions=plane.table.versions(request.name),
                                          platform=runner.platform)
        for slots, into in ((runner.inputs, answer.inputs), (runner.outputs, answer.outputs)):
            for slot in slots:
                into.add(name=slot.name, datatype=slot.datatype, shape=slot.shape)
        return answer

    return {"ServerLive": _method(live, pb.ServerLiveRequest), "ServerReady": _method(ready, pb.ServerReadyRequest),
            "ServerMetadata": _method(server, pb.ServerMetadataRequest),
            "ModelReady": _method(model_ready, pb.ModelReadyRequest),
            "ModelMetadata": _method(model, pb.ModelMetadataRequest)}


def _method(answer: Callable[[Any], Any], request_type: Any) -> Method:
    def handle(body: bytes) -> bytes:
        try:
            request = request_type.FromString(body)
        except DecodeError as exc:
            raise Invalid(f"the body is not a {request_type.__name__}") from exc
        return bytes(answer(request).SerializeToString())

    return handle
