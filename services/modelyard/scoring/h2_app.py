"""gRPC's methods on HTTP/2 streams: the application that h2corn calls, once for each stream.

A call is one coroutine, which h2corn starts as a task and cancels when the caller goes away; calls that arrive
together are started together and so meet in the queue of their model.
"""

from __future__ import annotations

import asyncio
import math
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from google.protobuf.message import DecodeError

from ..core.errors import ModelyardError
from ..core.inference import PROTO
from . import grpc_wire as wire
from . import health, oip
from .calls import Answer, Call
from .codecs import GrpcCodec, StreamCodec
from .dataplane import DataPlane
from .grpc_wire import Refused
from .h2_call import Gone, H2Call, Receive, Send, alone
from .h2_stream import Stream
from .transport import binary_trace, request_id, trace

REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
AWAY = "this replica goes away; call again"
Handler = Callable[[H2Call], Awaitable[None]]


class H2App:
    """``app(scope, receive, send)``. Never raises but when it is cancelled."""

    def __init__(self, plane: DataPlane) -> None:
        self.health = health.Health(("", oip.SERVICE))
        self.seen = 0
        """Calls so far."""
        self._plane = plane
        self._limit = plane.limits.max_message_bytes
        self._key = plane.sampling_header.encode()
        self._codec, self._stream_codec = GrpcCodec(), StreamCodec()
        self._leaving = False
        self._idle: set[asyncio.Task[Any]] = set()
        self._methods: dict[str, Handler] = {
            f"/{oip.SERVICE}/ModelInfer": self._infer, f"/{oip.SERVICE}/ModelStreamInfer": self._stream,
            **{f"/{oip.SERVICE}/{name}": partial(_unary, method) for name, method in oip.methods(plane).items()},
            f"/{health.SERVICE}/Check": partial(_unary, self.health.check), f"/{health.SERVICE}/Watch": self._watch,
            **{f"/{name}/ServerReflectionInfo": _reflect for name in REFLECTION}}

    def leave(self) -> None:
        """Calls that wait for nothing but their caller end now."""
        self._leaving = True
        for task in self._idle:
            task.cancel()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self.seen += 1
        call: H2Call | None = None
        try:
            handler = self._methods.get(scope["path"])
            if (refusal := _not_grpc(scope)) is not None:
                await alone(send, *refusal)
                return
            call = H2Call(scope, receive, send, self._limit)
            if handler is None:
                raise Refused(wire.UNIMPLEMENTED, f"there is no method {scope['path']}")
            await handler(call)
        except Refused as exc:
            await self._end(call, send, exc.status, exc.message)
        except ModelyardError as exc:
            await self._end(call, send, *wire.failure(exc), exc)
        except TimeoutError:
            await self._end(call, send, wire.DEADLINE_EXCEEDED, "Deadline Exceeded")
        except (Gone, OSError):
            return  # the caller went away; so did whoever would read an answer
        except Exception:  # noqa: BLE001 - whatever it is, the caller is told and the server goes on
            traceback.print_exc()
            await self._end(call, send, wire.INTERNAL, "the server failed")

    async def _end(self, call: H2Call | None, send: Send, status: bytes, message: str,
                   error: ModelyardError | None = None) -> None:
        try:
            if call is None:
                await alone(send, [(b"grpc-status", status), (b"grpc-message", wire.percent(message))])
            elif error is not None:
                self._plane.metrics.refused("grpc", next(n for n, code in wire.CODES.items() if code == status))
                await call.fail(error)
            else:
                await call.finish(status, message)
        except OSError:
            return

    async def _infer(self, call: H2Call) -> None:
        asked = self._ask("grpc", "ModelInfer", self._codec, await call.message(), call)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        submitted = self._plane.submit(asked, partial(_settle, future))
        try:
            answer = await future
        except asyncio.CancelledError:
            self._plane.cancel(submitted)
            raise
        if answer.error is None:
            await call.answer(answer.body, self._metadata(answer))
        else:
            await call.fail(answer.error, self._metadata(answer))

    def _ask(self, protocol: str, method: str, codec: GrpcCodec, body: bytes, call: H2Call) -> Call:
        traced, parent = trace(call.text(b"traceparent"))
        if not traced and (packed := call.headers.get(b"grpc-trace-bin")):
            traced, parent = binary_trace(wire.binary(packed))
        return Call(protocol, method, body, PROTO, codec, deadline=call.deadline,
                    request_id=request_id(call.text(b"x-request-id")), trace_id=traced, parent=parent,
                    key=call.text(self._key) or "" if self._key else "")

    def _metadata(self, answer: Answer) -> list[tuple[str, str | bytes]]:
        return [("x-request-id", answer.request_id), ("x-modelyard-prediction-id", answer.prediction_id),
                ("x-modelyard-model", answer.model), ("x-modelyard-deployment", self._plane.deployment)]

    async def _stream(self, call: H2Call) -> None:
        """One answer for each message, in order; a message that fails is answered with ``error_message``."""
        async def asked() -> AsyncIterator[list[Call]]:
            async for bunch in self._patiently(call.bunches()):
                yield [self._ask("stream", "ModelStreamInfer", self._stream_codec, body, call) for body in bunch]

        async with _until(call.deadline):
            last = await Stream(self._plane, call).run(asked())
            await call.finish(pairs=() if last is None else self._metadata(last))

    async def _watch(self, call: H2Call) -> None:
        async for answer in self._patiently(self.health.watch(await call.message())):
            await call.send((answer,))
        raise Refused(wire.UNAVAILABLE, AWAY)

    async def _patiently(self, source: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The source's items; when the server goes away while the next one is waited for, Refused."""
        task = asyncio.current_task()
        assert task is not None
        while not self._leaving:
            self._idle.add(task)
            try:
                item = await anext(source)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                if self._leaving:
                    break
                raise
            finally:
                self._idle.discard(task)
            yield item
        raise Refused(wire.UNAVAILABLE, AWAY)


def _settle(future: asyncio.Future[Answer], answer: Answer) -> None:
    if not future.done():
        future.set_result(answer)


def _not_grpc(scope: dict[str, Any]) -> tuple[list[tuple[bytes, bytes]], int] | None:
    """(headers, HTTP status) of the answer to a request that is no gRPC call."""
    if scope["method"] != "POST":
        return [(b"allow", b"POST")], 405
    kind = next((value for key, value in scope["headers"] if key == b"content-type"), b"").lower()
    if not kind.startswith(b"application/grpc") or kind[16:17] not in (b"", b"+", b";"):
        return [(b"accept-post", b"application/grpc")], 415
    if "http.response.trailers" not in scope["extensions"]:
        return [(b"grpc-status", wire.INTERNAL), (b"grpc-message", b"the header 'te: trailers' is missing")], 200
    return None


async def _unary(method: oip.Method, call: H2Call) -> None:
    await call.answer(method(await call.message()))


async def _reflect(call: H2Call) -> None:
    """Both names of the service: old clients ask v1alpha, new ones v1; the messages are the same."""
    from grpc_reflection.v1alpha import reflection_pb2 as pb
    from grpc_reflection.v1alpha._async import ReflectionServicer

    async def requests() -> AsyncIterator[Any]:
        async for bunch in call.bunches():
            for body in bunch:
                try:
                    yield pb.ServerReflectionRequest.FromString(body)
                except DecodeError as exc:
                    raise Refused(wire.INTERNAL, "the body is not a ServerReflectionRequest") from exc

    servicer = ReflectionServicer((oip.SERVICE, health.SERVICE, *REFLECTION))
    async for answer in servicer.ServerReflectionInfo(requests(), None):
        await call.send((answer.SerializeToString(),))
    await call.finish()


def _until(deadline: float) -> Any:
    """Ends what takes longer with TimeoutError."""
    left = None if math.isinf(deadline) else asyncio.get_running_loop().time() + deadline - time.monotonic()
    return asyncio.timeout_at(left)
