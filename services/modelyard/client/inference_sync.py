"""ScoringClient: the blocking side of AsyncScoringClient."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from .channels import Tls
from .faces import Face, Portal, blocks, told_as
from .inference import CONNECTIONS, IN_FLIGHT, AsyncScoringClient
from .inputs import Inputs, Outputs, read_unary
from .many import Declared, OnError, Result, seconds
from .oip import SERVICE, asks, error_of


class ScoringClient(Face[AsyncScoringClient]):
    """Scores with ``model`` at ``address``, for code that waits; the arguments are those of ``AsyncScoringClient``.

    Safe to share between threads. Not safe to carry over a fork: make a new one there.

        with ScoringClient("127.0.0.1:8081", model="iris") as scorer:
            outputs = scorer.infer({"X": rows})
            for outputs in scorer.infer_many(batches):
                ...
    """

    def __init__(
        self, address: str | Sequence[str], *, model: str, version: str = "", timeout_s: float = 60.0,
        connections: int = CONNECTIONS, tls: Tls | bool | None = None, metadata: Mapping[str, str] | None = None,
    ) -> None:
        inner = AsyncScoringClient(address, model=model, version=version, timeout_s=timeout_s, connections=connections,
                                   tls=tls, metadata=metadata)
        super().__init__(inner, Portal())
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._channels: list[grpc.Channel] = []
        self._methods: list[Any] = []
        self._turn = itertools.count()

    @told_as(AsyncScoringClient.infer)
    def infer(
        self, inputs: Inputs, *, outputs: Sequence[str] = (), request_id: str = "",
        metadata: Mapping[str, str] | None = None, timeout_s: float | None = None,
    ) -> Outputs:
        inner = self._inner
        encoder = inner.encoder(outputs)
        body = encoder.encode(encoder.tensors(inputs, self._declared(inputs)), request_id)
        number = next(self._turn) % inner.connections
        patience = self._timeout_s if timeout_s is None else seconds("timeout_s", timeout_s)
        call = self._method(number)
        try:
            answer: bytes = call(body, timeout=patience, metadata=inner.headers(metadata, request_id))
        except grpc.RpcError as exc:
            raise error_of(exc, inner.route.address(number)) from exc
        return read_unary(answer)

    @told_as(AsyncScoringClient.infer_many)
    def infer_many(
        self, items: Iterable[Inputs], *, outputs: Sequence[str] = (), in_flight: int = IN_FLIGHT,
        on_error: OnError = "raise", repeat: bool = False, request_id: str = "",
        metadata: Mapping[str, str] | None = None, timeout_s: float | None = None, outage_s: float = 10.0,
        join_rows: int = 1,
    ) -> Iterator[Result]:
        many = self._inner.many(outputs, in_flight, on_error, repeat, request_id, metadata, timeout_s, outage_s,
                                join_rows)
        return many.waited(items, self._portal, self._inner.open, self._declared)

    model_ready = blocks(AsyncScoringClient.model_ready)
    model_metadata = blocks(AsyncScoringClient.model_metadata)

    def _declared(self, inputs: Inputs) -> Declared:
        return self._portal.run(self._inner.declared(inputs)) if asks(inputs) else {}

    def _method(self, number: int) -> Any:
        """Its own channels: a call by way of the event loop's thread would cost as much again."""
        if number >= len(self._methods):
            with self._lock:
                if not self._portal.open:
                    raise RuntimeError("this client was closed")
                while len(self._methods) <= number:
                    channel = self._inner.route.open_blocking(len(self._channels))
                    self._channels.append(channel)
                    self._methods.append(channel.unary_unary(SERVICE + "ModelInfer"))
        return self._methods[number]

    def close(self) -> None:
        """Ends what is under way with Unavailable, closes the connections and ends the thread. Closing twice is
        fine."""
        if self._portal.open:
            self._portal.run(self._inner.close())
            self._portal.close()
        with self._lock:
            self._methods.clear()
            while self._channels:
                self._channels.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None,
    ) -> None:
        self.close()
