"""Captured calls: read back as a table decoded by name, proved complete."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..core.errors import Invalid
from .fields import Reference, reference
from .http import Http, Params, path

if TYPE_CHECKING:
    import pyarrow as pa

ARROW = "application/vnd.apache.arrow.stream"
Moment = datetime | str | None
"""A moment: RFC 3339 text, or a datetime (a naive one is local time, as everywhere in Python)."""


def moment(when: Moment) -> str | None:
    """RFC 3339 in UTC. Raises Invalid for text that is no time.

    >>> moment("2026-11-23T14:00:00Z")
    '2026-11-23T14:00:00.000000Z'
    """
    if when is None:
        return None
    if isinstance(when, str):
        try:
            when = datetime.fromisoformat(when)
        except ValueError as exc:
            raise Invalid(f"'{when}' is not a time; write 2026-11-23T14:00:00Z", field="time") from exc
    return when.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class AsyncCapture:
    """What was captured of one deployment. It outlives the deployment, as long as its retention says."""

    def __init__(self, http: Http, deployment: str) -> None:
        self._http = http
        self._deployment = deployment

    async def raw(
        self, start: Moment = None, end: Moment = None, *, limit: int | None = None, collect: str | None = None,
    ) -> pa.Table:
        """One row per call with the columns of the capture files: bytes as they were on the wire. ``collect``: the
        rows of that collector instead, joined to calls by ``prediction_id``."""
        import pyarrow.ipc

        params: Params = {"start": moment(start), "end": moment(end), "limit": limit, "collect": collect}
        where = path("capture", self._deployment)
        reply = await self._http.send("GET", where, params=params, headers={"Accept": ARROW})
        return await asyncio.to_thread(lambda: pyarrow.ipc.open_stream(reply.body).read_all())

    async def read(self, start: Moment = None, end: Moment = None, *, limit: int | None = None) -> pa.Table:
        """One row per call from ``start`` (inclusive) to ``end``: who, when, how long, status, and the inputs and
        outputs decoded, a column for each name. ``limit``: the newest so many.

        >>> table = yard.capture("iris").read()
        >>> table.column("status").to_pylist()
        ['OK']
        """
        from ..core.decode import decode

        return await asyncio.to_thread(decode, await self.raw(start, end, limit=limit))

    async def verify(self, start: Moment = None, end: Moment = None) -> dict[str, Any]:
        """``complete`` (nothing is known to be missing), and for each server process whether it is complete, has gaps
        or is open-ended (it has written no end frame: it runs still, or was killed).

        >>> yard.capture("iris").verify()["complete"]
        True
        """
        params: Params = {"start": moment(start), "end": moment(end)}
        where = path("capture", self._deployment, "verify")
        answer: dict[str, Any] = await self._http.json("GET", where, params=params)
        return answer


async def telemetry(
    http: Http, deployment: Reference, window: str | None, start: Moment, end: Moment,
) -> list[dict[str, Any]]:
    """The windows of ``GET /v1/telemetry/{deployment}``."""
    params: Params = {"window": window, "start": moment(start), "end": moment(end)}
    answer = await http.json("GET", path("telemetry", reference(deployment)), params=params)
    return list(answer["windows"])
