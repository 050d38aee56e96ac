"""grpc.health.v1 on bytes: Check and Watch. What is served is told apart from what is unknown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from ..core.errors import Invalid, NotFound

SERVICE = "grpc.health.v1.Health"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """One status for all services that are named here; another name is unknown."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = services
        self._status = NOT_SERVING
        self._closing = False
        self._changed = asyncio.Event()

    def say(self, serving: bool, closing: bool = False) -> None:
        """From now on; whoever watches is told. ``closing``: those who watch now are told and let go."""
        self._status = SERVING if serving else NOT_SERVING
        self._closing = closing
        self._changed.set()
        self._changed = asyncio.Event()

    def check(self, body: bytes) -> bytes:
        """Raises Invalid, NotFound."""
        service = _service(body)
        if service not in self._services:
            raise NotFound(f"there is no service '{service}'")
        return _answer(self._status)

    async def watch(self, body: bytes) -> AsyncIterator[bytes]:
        """The status now, and again whenever it is another one. Ends when it is let go. Raises Invalid."""
        late = self._closing
        known = _service(body) in self._services
        told = None
        while True:
            changed, status = self._changed, self._status if known else SERVICE_UNKNOWN
            if status != told:
                told = status
                yield _answer(status)
            if self._closing and not late:
                return
            await changed.wait()


def _service(body: bytes) -> str:
    try:
        return str(health_pb2.HealthCheckRequest.FromString(body).service)
    except DecodeError as exc:
        raise Invalid("the body is not a HealthCheckRequest") from exc


def _answer(status: int) -> bytes:
    return bytes(health_pb2.HealthCheckResponse(status=status).SerializeToString())
