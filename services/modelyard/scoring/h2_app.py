"""gRPC's methods on HTTP/2 streams: the application that h2corn calls, once for each stream.

A call is a task, which h2corn starts and cancels when the caller goes away: an ``Infer``, or a real one of a coroutine.
Calls that arrive together are started together and so meet in the queue of their model.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
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
from .h2_call import Gone, H2Call, Receive, Send, alone, deadline
from .h2_cork import BUNCH, Cork
from .h2_infer import Infer, adopt, again, take
from .streams import Stream
from .transport import binary_trace, request_id, trace

REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
INFER = f"/{oip.SERVICE}/ModelInfer"
STREAM = f"/{oip.SERVICE}/ModelStreamInfer"
SCORING = (INFER, STREAM)
PLAIN = (b"application/grpc", b"application/grpc+proto")
NOT_TRACED = ("", "")
AWAY = "this replica goes away; call again"
Handler = Callable[[H2Call], Awaitable[None]]


class H2App:
    """``app(scope, receive, send)``: gives back the call's task or a coroutine for one, which never raises but when it
    is cancelled."""

    def __init__(self, plane: DataPlane) -> None:
        self.health = health.Health(("", oip.SERVICE))
        self.seen = 0
        """Calls so far."""
        self.plane = plane
        self.loop = asyncio.get_running_loop()
        self.under_way: set[Infer] = set()
        self.cork = Cork()
        self._limit, self._idle_s = plane.limits.max_message_bytes, plane.limits.timeout_ms / 1000
        self._key = plane.sampling_header.encode()
        self._codec, self._stream_codec = GrpcCodec(), StreamCodec()
        self._deployment = (b"x-modelyard-deployment", plane.deployment.encode())
        self._models: dict[str, wire.Header] = {}
        self._leaving = False
        self._idle: set[asyncio.Task[Any]] = set()
        self._methods: dict[str, Handler] = {
            INFER: self._infer, STREAM: self._stream,
            **{f"/{oip.SERVICE}/{name}": partial(_unary, method) for name, method in oip.methods(plane).items()},
            f"/{health.SERVICE}/Check": partial(_unary, self.health.check), f"/{health.SERVICE}/Watch": self._watch,
            **{f"/{name}/ServerReflectionInfo": _reflect for name in REFLECTION}}
        adopt(self.loop)

    def leave(self) -> None:
        """Calls that wait for nothing but their caller end now."""
        self._leaving = True
        for task in self._idle:
            task.cancel()

    def drop(self) -> None:
        """Cancels what is still under way."""
        for task in asyncio.all_tasks():
            if task.get_name() == "h2corn.request":
                task.cancel()
        for infer in tuple(self.under_way):
            infer.cancel()

    def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> Infer | Coroutine[Any, Any, None]:
        self.seen += 1
        if scope["path"] != INFER:
            return self._serve(scope, receive, send)
        headers = dict(scope["headers"])
        due = math.inf
        if b"grpc-timeout" in headers:
            try:
                due = deadline(headers)
            except Refused:
                return self._serve(scope, receive, send)
        if headers.get(b"content-type") not in PLAIN or scope["method"] != "POST" or b"grpc-encoding" in headers \
                or "http.response.trailers" not in scope["extensions"]:
            return self._serve(scope, receive, send)
        if self.cork.idle and len(self.under_way) >= BUNCH:
            self.cork.hold()
        taken: list[Any] = []
        if (message := take(receive, self._limit, taken)) is None:
            return self._serve(scope, again(taken, receive), send)
        infer = Infer(self, send)
        self.under_way.add(infer)
        infer.submitted = self.plane.submit(self._ask("grpc", "ModelInfer", self._codec, message, headers, due),
                                            infer.answer)
        return infer

    async def _serve(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        call: H2Call | None = None
        try:
            handler = self._methods.get(scope["path"])
            if (refusal := _not_grpc(scope)) is not None:
                await alone(send, *refusal)
                return
            call = H2Call(scope, receive, send, self._limit, self._idle_s)
            if handler is None:
                raise Refused(wire.UNIMPLEMENTED, f"there is no method {scope['path']}")
            await handler(call)
        except Refused as exc:
            await self._end(call, send, wire.refusal(exc.status, exc.message))
        except ModelyardError as exc:
            self.plane.refused("grpc", exc, scoring=scope["path"] in SCORING)
            await self._end(call, send, wire.failed(exc))
        except TimeoutError:
            await self._end(call, send, wire.refusal(wire.DEADLINE_EXCEEDED, "Deadline Exceeded"))
        except (Gone, OSError):
            return  # the caller went away; so did whoever would read an answer
        except Exception:  # noqa: BLE001 - whatever it is, the caller is told and the server goes on
            traceback.print_exc()
            await self._end(call, send, wire.refusal(wire.INTERNAL, "the server failed"))

    async def _end(self, call: H2Call | None, send: Send, last: Sequence[wire.Header]) -> None:
        with contextlib.suppress(OSError):
            await (alone(send, last) if call is None else call.finish(last))

    async def _infer(self, call: H2Call) -> None:
        asked = self._ask("grpc", "ModelInfer", self._codec, await call.message(), call.headers, call.deadline)
        (answer,) = await self.plane.handle((asked,))
        if answer.error is None:
            await call.answer(answer.body, self.metadata(answer))
        else:
            await call.finish(wire.failed(answer.error, self.metadata(answer)))

    def _ask(self, protocol: str, method: str, codec: GrpcCodec, body: bytes, headers: Mapping[bytes, bytes],
             due: float) -> Call:
        known, given = headers.get(b"x-request-id"), headers.get(b"traceparent")
        traced, parent = trace(given.decode("latin-1")) if given is not None else NOT_TRACED
        if not traced and (packed := headers.get(b"grpc-trace-bin")):
            traced, parent = binary_trace(wire.binary(packed))
        return Call(protocol, method, body, PROTO, codec, "", "", due,
                    request_id(known.decode("latin-1")) if known is not None else "", traced, parent, None,
                    headers.get(self._key, b"").decode("latin-1") if self._key else "")

    def metadata(self, answer: Answer) -> list[wire.Header]:
        """What goes with every answer."""
        model = self._models.get(answer.model)
        if model is None:
            model = self._models[answer.model] = (b"x-modelyard-model", answer.model.encode())
        return [(b"x-request-id", answer.request_id.encode()),
                (b"x-modelyard-prediction-id", answer.prediction_id.encode()), model, self._deployment]

    async def _stream(self, call: H2Call) -> None:
        """One answer for each message, in order; a message that fails is answered with ``error_message``."""
        async def asked() -> AsyncIterator[list[Call]]:
            async for bunch in self._patiently(call.bunches()):
                yield [self._ask("stream", "ModelStreamInfer", self._stream_codec, body, call.headers, call.deadline)
                       for body in bunch]

        async with _until(call.deadline):
            last = await Stream(self.plane, call.send).run(asked())
            await call.finish((wire.STATUS_OK, *(() if last is None else self.metadata(last))))

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
