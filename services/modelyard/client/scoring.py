"""Calls to a deployment: REST ``/score`` with JSON, or gRPC (Open Inference Protocol v2) with raw tensors."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import Invalid, ModelyardError, Unavailable
from .http import BACKOFF_S, Http, path

if TYPE_CHECKING:
    from .oip import Channel

Data = Any
"""Rows (nested lists), a dict, a numpy array, a pandas frame, or text/bytes sent as they are."""
Answer = Any
"""REST: the JSON of the answer. gRPC: ``{output name: numpy array}``, or the JSON that a JSON output held."""


def json_body(data: Data) -> Any:
    """What ``/score`` takes: a dict as it is, a frame as its columns, rows and arrays as ``{"data": rows}``."""
    if isinstance(data, Mapping):
        return {str(k): _plain(v) for k, v in data.items()}
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        return {str(c): _plain(data[c]) for c in data.columns}
    return {"data": _plain(data)}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def loopback(host: str | None) -> bool:
    """Whether a host name or address means this machine only."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class AsyncScorer:
    """Scores on one deployment; keeps its connections. Safe for many calls at once."""

    def __init__(self, name: str, endpoints: Mapping[str, str], yard: Http) -> None:
        self._name = name
        self._yard = yard
        self._grpc_address = endpoints.get("grpc", "")
        rest = endpoints.get("rest", "")
        self._rest = Http(
            rest, None, 60.0, hint=f"see: modelyard deployments show {name}") if rest else None
        self._channel: Channel | None = None

    async def score(self, data: Data, *, protocol: str = "rest", timeout_s: float = 60.0) -> Answer:
        """One call. Raises Invalid (bad input), NotFound, TooLarge, Unavailable (queue full, not ready, past the
        deadline with ``code="deadline-exceeded"``), ModelyardError ``code="scoring-failed"`` with the scoring
        code's own message."""
        if protocol == "rest":
            return await self._over_rest(data, timeout_s)
        if protocol == "grpc":
            return await (await self.channel()).score(self._name, data, timeout_s)
        raise Invalid(f"'{protocol}' is not a protocol; write rest or grpc", field="protocol")

    async def channel(self) -> Channel:
        """The gRPC channel, opened at the first use."""
        if self._channel is None:
            if not self._grpc_address:
                raise Unavailable(f"deployment '{self._name}' has no address yet; wait until it is healthy")
            from .oip import Channel

            self._channel = Channel(self._grpc_address)
        return self._channel

    async def _over_rest(self, data: Data, timeout_s: float) -> Answer:
        far = self._rest is not None and loopback(self._rest.base.host) and not loopback(self._yard.base.host)
        http, where = (self._rest, "/score") if self._rest and not far else (
            self._yard, path("deployments", self._name, "score"))
        head = {"Content-Type": "application/json"}
        body: dict[str, Any] = {"raw": data.encode() if isinstance(data, str) else data} if isinstance(
            data, (str, bytes)) else {"json": json_body(data)}
        for wait in (*BACKOFF_S, None):
            try:
                async with asyncio.timeout(timeout_s):
                    return await http.json("POST", where, headers=head, repeat=False, **body)
            except TimeoutError as exc:
                raise Unavailable(
                    f"deployment '{self._name}' did not answer within {timeout_s:g} s", code="deadline-exceeded",
                ) from exc
            except Unavailable as exc:
                if wait is None or not exc.detail.get("unanswered"):
                    raise
                await asyncio.sleep(wait)
        raise ModelyardError("the last attempt returns or raises")

    async def close(self) -> None:
        """Closes the connections."""
        if self._rest is not None:
            await self._rest.close()
        if self._channel is not None:
            await self._channel.close()
