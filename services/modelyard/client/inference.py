"""AsyncScoringClient: one model of one deployment over the Open Inference Protocol v2, by its gRPC address."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from ..core.errors import Invalid, Unavailable
from ..wire import inference_pb2 as pb
from .channels import Metadata, Tls, metadata, route
from .inputs import Encoder, Inputs, Outputs, read_unary
from .many import Declared, Many, OnError, Result, seconds
from .oip import SERVICE, asks, error_of
from .pipeline import CLOSED, Pipeline, Plan

IN_FLIGHT = 128
CONNECTIONS = 4
"""A connection is one replica's: a client with one connection uses one replica. More than a few cost more than they
give where there is one replica."""


class AsyncScoringClient:
    """Scores with a model at an address.

    ``address``: ``host:port`` or ``unix:PATH``, or several. ``model``: a model's or a deployment's name. ``timeout_s``
    bounds each call and each item, with all that is repeated. ``connections``: TCP connections to keep, to the
    addresses in turn; calls take turns over them. Of a deployment with several replicas at most so many are used.
    ``tls``: True, or a ``Tls`` with files. ``metadata`` goes with every call (``{"authorization": "Bearer …"}``).
    Nothing is sent before the first call. For one event loop, any number of calls at once; use it as a context manager,
    or ``close`` it. Raises Invalid for arguments that cannot be.

        async with AsyncScoringClient("127.0.0.1:8081", model="iris") as scorer:
            outputs = await scorer.infer({"X": rows})
            async for outputs in scorer.infer_many(batches):
                ...
    """

    def __init__(
        self, address: str | Sequence[str], *, model: str, version: str = "", timeout_s: float = 60.0,
        connections: int = CONNECTIONS, tls: Tls | bool | None = None, metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.route = route(address, tls)
        self._model, self._version = model, version
        self._encoder = Encoder(model, version)
        self._timeout_s = seconds("timeout_s", timeout_s)
        if connections < 1:
            raise Invalid("connections must be 1 or more", field="connections")
        self.connections = max(connections, len(self.route.addresses))
        self._metadata = dict(metadata or {})
        self._channels: list[grpc.aio.Channel] = []
        self._turn = itertools.count()
        self._runs: set[Pipeline] = set()
        self._known: Declared | None = None
        self._closed = False

    async def infer(
        self, inputs: Inputs, *, outputs: Sequence[str] = (), request_id: str = "",
        metadata: Mapping[str, str] | None = None, timeout_s: float | None = None,
    ) -> Outputs:
        """One call (ModelInfer): ``{input name: array}`` → ``{output name: array}``.

        ``inputs`` may also be one array, rows (nested lists) or a frame (a tensor for each column); an array without a
        name and lists take the name and the datatype that the model declares. ``outputs``: only these. ``request_id``:
        for the server's log and capture. Repeated with back-off while the server is unavailable.

        Raises Invalid (inputs that do not fit; TooLarge), NotFound (no such model), Denied, Unavailable (nobody
        answers, the queue is full; past ``timeout_s`` with ``code="deadline-exceeded"``), ModelyardError
        ``code="scoring-failed"`` with the scoring code's own message. ``detail["status"]`` is the gRPC status.

        >>> with service.client() as scorer:
        ...     scorer.infer([[5.1, 3.5, 1.4, 0.2]])["label"]
        array([0])
        """
        encoder = self.encoder(outputs)
        body = encoder.encode(encoder.tensors(inputs, await self.declared(inputs)), request_id)
        return read_unary(await self._unary("ModelInfer", body, timeout_s, self.headers(metadata, request_id)))

    def infer_many(
        self, items: Iterable[Inputs] | AsyncIterable[Inputs], *, outputs: Sequence[str] = (),
        in_flight: int = IN_FLIGHT, on_error: OnError = "raise", repeat: bool = False, request_id: str = "",
        metadata: Mapping[str, str] | None = None, timeout_s: float | None = None, outage_s: float = 10.0,
        join_rows: int = 1,
    ) -> AsyncIterator[Result]:
        """Many calls, over one stream on each connection (ModelStreamInfer). Each item is what ``infer`` takes; the
        results come in the order of the items, each as soon as it and all before it are there.

        ``in_flight``: so many items are taken and not given back at most, so who reads slowly is asked slowly. Keep it
        below the deployment's ``limits.max_queue``; what a full queue refuses is sent again. ``on_error``: ``raise``
        ends the run at the first item that fails (``detail["item"]`` counts from 0), ``return`` gives the error back in
        the item's place. ``repeat``: whether items that a lost connection left unanswered, and that may have been run,
        may be run again; without it they fail. What was certainly not run is sent again either way. ``request_id``:
        item n gets the id ``<request_id>/n``. ``timeout_s`` holds for each item, from when it was taken. When nobody
        can be reached for ``outage_s`` the run ends with Unavailable.

        ``join_rows``: consecutive items of equal names, types and row shapes travel as one message of up to so many
        rows, and the outputs are taken apart again: the quickest way for many small items, right only where the model's
        rows stand alone. The server then sees, limits and captures one call; ``in_flight`` counts messages. One that
        fails by what is in it is sent again item by item, so that only the bad item fails.

        The async client reads a plain iterable in the event loop; the blocking one takes items in the thread that waits
        for the results. Who leaves early closes what was given back (``contextlib.aclosing``): that cancels the rest.
        Raises Invalid for arguments that cannot be, and while iterating what ``infer`` and ``items`` raise.

        >>> with service.client() as scorer:
        ...     rows = ([[5.1, 3.5, 1.4, n / 10]] for n in range(3))
        ...     [int(outputs["label"][0]) for outputs in scorer.infer_many(rows)]
        [0, 0, 0]
        """
        many = self.many(outputs, in_flight, on_error, repeat, request_id, metadata, timeout_s, outage_s,
                         join_rows)
        return many.over(items, self.open, self.declared)

    def many(
        self, outputs: Sequence[str], in_flight: int, on_error: OnError, repeat: bool, request_id: str,
        metadata: Mapping[str, str] | None, timeout_s: float | None, outage_s: float, join_rows: int,
    ) -> Many:
        """The arguments of ``infer_many``, looked at. Raises Invalid."""
        plan = Plan(in_flight, self._patience(timeout_s), repeat, seconds("outage_s", outage_s),
                    self.headers(metadata, request_id))
        return Many(plan, self.encoder(outputs), on_error, request_id, self.route.address(0), join_rows)

    async def model_ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether the model answers calls (ModelReady). Raises as ``infer``."""
        request = pb.ModelReadyRequest(name=self._model, version=self._version)
        answer = await self._unary("ModelReady", request.SerializeToString(), timeout_s, self.headers(None, ""))
        return bool(pb.ModelReadyResponse.FromString(answer).ready)

    async def model_metadata(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """What the model declares (ModelMetadata): ``name``, ``versions``, ``platform``, and ``inputs`` and ``outputs``
        as ``[{"name", "datatype", "shape"}]``, -1 in a shape for any length. Raises as ``infer``."""
        request = pb.ModelMetadataRequest(name=self._model, version=self._version)
        answer = await self._unary("ModelMetadata", request.SerializeToString(), timeout_s, self.headers(None, ""))
        told = pb.ModelMetadataResponse.FromString(answer)
        slots = ([{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in part]
                 for part in (told.inputs, told.outputs))
        return {"name": told.name, "versions": list(told.versions), "platform": told.platform,
                **dict(zip(("inputs", "outputs"), slots, strict=True))}

    async def declared(self, inputs: Inputs) -> Declared:
        """Input name → datatype, asked once, for inputs that leave one of them to the model; else nothing."""
        if self._known is None and not asks(inputs):
            return {}
        if self._known is None:
            self._known = {i["name"]: i["datatype"] for i in (await self.model_metadata())["inputs"]}
        return self._known

    def encoder(self, outputs: Sequence[str]) -> Encoder:
        """Makes the requests that ask for these outputs."""
        return Encoder(self._model, self._version, outputs) if outputs else self._encoder

    def headers(self, given: Mapping[str, str] | None, request_id: str) -> Metadata:
        """The metadata of a call. Raises Invalid."""
        return metadata(self._metadata, given, request_id=request_id)

    def open(self, plan: Plan, told: Callable[[], None]) -> Pipeline:
        """A pipeline over all connections. Raises RuntimeError when the client is closed."""
        channels = [self._channel(number) for number in range(self.connections)]
        methods = [(channel, channel.stream_stream(SERVICE + "ModelStreamInfer"), self.route.address(number))
                   for number, channel in enumerate(channels)]
        pipeline = Pipeline(methods, plan, told)
        self._runs.add(pipeline)
        pipeline.on_close = self._runs.discard
        return pipeline

    def _channel(self, number: int) -> grpc.aio.Channel:
        if self._closed:
            raise RuntimeError(CLOSED)
        while len(self._channels) <= number:
            self._channels.append(self.route.open(len(self._channels)))
        return self._channels[number]

    def _patience(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else seconds("timeout_s", timeout_s)

    async def _unary(self, method: str, request: bytes, timeout_s: float | None, headers: Metadata) -> bytes:
        number = next(self._turn) % self.connections
        call = self._channel(number).unary_unary(SERVICE + method)
        try:
            answer: bytes = await call(request, timeout=self._patience(timeout_s), metadata=headers)
        except grpc.aio.AioRpcError as exc:
            raise error_of(exc, self.route.address(number)) from exc
        return answer

    async def close(self) -> None:
        """Ends what is under way with Unavailable and closes the connections. Closing twice is fine."""
        self._closed = True
        for run in tuple(self._runs):
            run.abandon(Unavailable(CLOSED))
            await run.close()
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None,
    ) -> None:
        await self.close()
