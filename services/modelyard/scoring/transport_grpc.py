"""Open Inference Protocol v2 over grpc.aio: bytes in, bytes out; health v1 with Watch; reflection.

Connections have a maximum age. A client is told to open another one in good time and loses no call by it, so that
a draining replica is left by its clients within seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health_aio

from ..core.errors import ModelyardError
from ..core.inference import PROTO
from ..core.version import __version__
from ..wire import inference_pb2 as pb
from .calls import Answer, Call, statuses
from .codecs import GrpcCodec, StreamCodec
from .dataplane import DataPlane
from .transport import Transport, clear_socket, parse_address, request_id, trace_id

SERVICE = "inference.GRPCInferenceService"
EXTENSIONS = ("model_stream_infer",)
CONNECTION_AGE_MS = 5_000
MESSAGE_LENGTH = 2_000
"""Status messages travel in headers, which clients cap at 8 KiB."""
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


class GrpcTransport(Transport, grpc.GenericRpcHandler):  # type: ignore[misc]
    """One grpc.aio server. Messages over the limit are refused by the library before they are read whole."""

    name = "grpc"

    def __init__(self, address: str, plane: DataPlane) -> None:
        self._address = address
        self._plane = plane
        self._codec, self._stream_codec = GrpcCodec(), StreamCodec()
        self._methods = {f"/{SERVICE}/{name}": handler for name, handler in self._handlers().items()}
        self._health = health_aio.HealthServicer()
        self._server = grpc.aio.server(options=[
            ("grpc.max_receive_message_length", plane.limits.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ])

    def _handlers(self) -> dict[str, Any]:
        return {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
            "ServerLive": _unary(self._server_live, pb.ServerLiveRequest),
            "ServerReady": _unary(self._server_ready, pb.ServerReadyRequest),
            "ModelReady": _unary(self._model_ready, pb.ModelReadyRequest),
            "ServerMetadata": _unary(self._server_metadata, pb.ServerMetadataRequest),
            "ModelMetadata": _unary(self._model_metadata, pb.ModelMetadataRequest),
        }

    def service(self, handler_call_details: Any) -> Any:
        """Part of grpc's interface: the handler of a method's path, or None."""
        return self._methods.get(handler_call_details.method)

    async def start(self) -> str:
        target = parse_address(self._address)
        if isinstance(target, str):
            clear_socket(target)
        self._server.add_generic_rpc_handlers((self,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        _add_reflection(self._server)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as exc:
            raise OSError(f"cannot listen on {self._address}: {exc}") from exc
        await self._server.start()
        return self._address if isinstance(target, str) else f"{target[0]}:{port}"

    async def loaded(self) -> None:
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    async def _say(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def _infer(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        answer = await self._ask("grpc", "ModelInfer", self._codec, request, context)
        metadata = _metadata(answer, self._plane.deployment)
        if answer.error is not None:
            await _abort(context, answer.error, metadata)
        context.set_trailing_metadata(metadata)
        return answer.body

    async def _stream(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """One answer for each message, in order; a message that fails is answered with ``error_message``."""
        answer = None
        async for request in requests:
            answer = await self._ask("stream", "ModelStreamInfer", self._stream_codec, request, context)
            yield answer.body
        if answer is not None:
            context.set_trailing_metadata(_metadata(answer, self._plane.deployment))

    async def _ask(self, protocol: str, method: str, codec: GrpcCodec, request: bytes,
                   context: grpc.aio.ServicerContext) -> Answer:
        given = {k: v for k, v in context.invocation_metadata() or () if k in ("x-request-id", "traceparent")}
        left = context.time_remaining()
        deadline = math.inf if left is None else time.monotonic() + left
        call = Call(protocol, method, request, PROTO, codec, deadline=deadline,
                    request_id=request_id(given.get("x-request-id")), trace_id=trace_id(given.get("traceparent")))
        return (await self._plane.handle((call,)))[0]

    async def _server_live(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=self._plane.ready)

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(name="modelyard", version=__version__, extensions=EXTENSIONS)

    async def _model_ready(self, request: Any, context: Any) -> Any:
        self._plane.about(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._plane.ready)

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        _, runner = self._plane.about(request.name, request.version)
        answer = pb.ModelMetadataResponse(name=request.name, versions=self._plane.table.versions(request.name),
                                          platform=runner.platform)
        for slots, into in ((runner.inputs, answer.inputs), (runner.outputs, answer.outputs)):
            for slot in slots:
                into.add(name=slot.name, datatype=slot.datatype, shape=slot.shape)
        return answer


def _unary(fn: Callable[[Any, Any], Any], request_type: Any) -> Any:
    """A handler of messages; our errors become statuses."""
    async def handle(request: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            answer = await fn(request_type.FromString(request), context)
        except ModelyardError as exc:
            return await _abort(context, exc, ())
        except ValueError:
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the body is not a {request_type.__name__}")
        return answer.SerializeToString()

    return grpc.unary_unary_rpc_method_handler(handle)


async def _abort(context: grpc.aio.ServicerContext, error: ModelyardError, metadata: Any) -> Any:
    code = grpc.StatusCode[statuses(error)[0]]
    await context.abort(code, error.message[:MESSAGE_LENGTH], metadata)


def _metadata(answer: Answer, deployment: str) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", answer.request_id), ("x-modelyard-prediction-id", answer.prediction_id),
            ("x-modelyard-model", answer.model), ("x-modelyard-deployment", deployment))


def _add_reflection(server: Any) -> None:
    """Both names of the reflection service: old clients ask v1alpha, new ones v1; the messages are the same."""
    from grpc_reflection.v1alpha import reflection_pb2
    from grpc_reflection.v1alpha._async import ReflectionServicer

    servicer = ReflectionServicer((SERVICE, HEALTH, *REFLECTION[1:]))
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo, reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString)
    server.add_generic_rpc_handlers(tuple(
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in REFLECTION))
