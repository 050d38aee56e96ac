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
from . import grpc_wire as wire
from . import oip
from .calls import Answer, Call, statuses
from .codecs import GrpcCodec, StreamCodec
from .dataplane import DataPlane
from .oip import SERVICE
from .streams import Stream
from .transport import CONNECTION_AGE_S, Tls, Transport, clear_socket, parse_address, request_id, trace

REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


class GrpcTransport(Transport, grpc.GenericRpcHandler):  # type: ignore[misc]
    """One grpc.aio server. Messages over the limit are refused by the library before they are read whole."""

    name = "grpc"
    library = "grpcio"

    def __init__(self, address: str, plane: DataPlane, tls: Tls | None = None) -> None:
        self._address, self._tls = address, tls
        self._plane = plane
        plane.calls_trickle()
        self._codec, self._stream_codec = GrpcCodec(), StreamCodec()
        self._methods = {f"/{SERVICE}/{name}": handler for name, handler in self._handlers().items()}
        self._health = health_aio.HealthServicer()
        self._server = grpc.aio.server(options=[
            ("grpc.max_receive_message_length", plane.limits.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_connection_age_ms", int(CONNECTION_AGE_S * 1000)),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ])

    def _handlers(self) -> dict[str, Any]:
        return {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
            **{name: _unary(method) for name, method in oip.methods(self._plane).items()},
        }

    def service(self, handler_call_details: Any) -> Any:
        """Part of grpc's interface: the handler of a method's path, or None."""
        return self._methods.get(handler_call_details.method)

    async def start(self) -> str:
        target = parse_address(self._address)
        if isinstance(target, int):
            raise OSError(f"cannot listen on {self._address}: grpcio takes no inherited socket; use --transport h2")
        if isinstance(target, str):
            clear_socket(target)
        self._server.add_generic_rpc_handlers((self,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        _add_reflection(self._server)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            port = self._bind()
        except RuntimeError as exc:
            raise OSError(f"cannot listen on {self._address}: {exc}") from exc
        await self._server.start()
        return self._address if isinstance(target, str) else f"{target[0]}:{port}"

    def _bind(self) -> int:
        if self._tls is None:
            return int(self._server.add_insecure_port(self._address))
        cert, key, client_ca = self._tls.read()
        credentials = grpc.ssl_server_credentials([(key, cert)], client_ca, client_ca is not None)
        return int(self._server.add_secure_port(self._address, credentials))

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
        call = self._caller("grpc", "ModelInfer", self._codec, context)(request)
        answer = (await self._plane.handle((call,)))[0]
        metadata = _metadata(answer, self._plane.deployment)
        if answer.error is not None:
            await _abort(context, answer.error, metadata)
        context.set_trailing_metadata(metadata)
        return answer.body

    async def _stream(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """One answer for each message, in order; a message that fails is answered with ``error_message``."""
        begin = self._caller("stream", "ModelStreamInfer", self._stream_codec, context)

        async def bunches() -> AsyncIterator[list[Call]]:
            async for request in requests:
                yield [begin(request)]

        async def send(bodies: list[bytes]) -> None:
            for body in bodies:
                await context.write(body)

        answer = await Stream(self._plane, send).run(bunches())
        if answer is not None:
            context.set_trailing_metadata(_metadata(answer, self._plane.deployment))

    def _caller(self, protocol: str, method: str, codec: GrpcCodec,
                context: grpc.aio.ServicerContext) -> Callable[[bytes], Call]:
        """What makes calls of the messages of one stream or request."""
        key = self._plane.sampling_header
        given = {k: v for k, v in context.invocation_metadata() or () if k in ("x-request-id", "traceparent", key)}
        left = context.time_remaining()
        deadline = math.inf if left is None else time.monotonic() + left
        traced, parent = trace(given.get("traceparent"))
        return lambda request: Call(
            protocol, method, request, PROTO, codec, deadline=deadline,
            request_id=request_id(given.get("x-request-id")), trace_id=traced, parent=parent,
            key=str(given.get(key, "")))


def _unary(method: oip.Method) -> Any:
    """A handler of grpc's; our errors become statuses."""
    async def handle(request: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            return method(request)
        except ModelyardError as exc:
            return await _abort(context, exc, ())

    return grpc.unary_unary_rpc_method_handler(handle)


async def _abort(context: grpc.aio.ServicerContext, error: ModelyardError, metadata: Any) -> Any:
    code = grpc.StatusCode[statuses(error)[0]]
    await context.abort(code, wire.short(error.message), (*metadata, (wire.DETAILS, wire.details(error))))


def _metadata(answer: Answer, deployment: str) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", answer.request_id), ("x-modelyard-prediction-id", answer.prediction_id),
            ("x-modelyard-model", answer.model), ("x-modelyard-deployment", deployment))


def _add_reflection(server: Any) -> None:
    """Both names of the reflection service: old clients ask v1alpha, new ones v1; the messages are the same."""
    from grpc_reflection.v1alpha import reflection_pb2
    from grpc_reflection.v1alpha._async import ReflectionServicer

    servicer = ReflectionServicer((SERVICE, HEALTH, *REFLECTION))
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo, reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString)
    server.add_generic_rpc_handlers(tuple(
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in REFLECTION))
