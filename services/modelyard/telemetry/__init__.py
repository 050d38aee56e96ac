"""Telemetry: takes what scoring servers captured to Parquet, proves that it is whole, and counts it in windows.

The only writer of captured data in the blob store; scoring servers and shippers know nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..kernel.service import Context, Loop, Service
from .handlers import on_deployment
from .ingest import INGEST
from .model import CaptureStream, Process, Segment, Window

if TYPE_CHECKING:
    from ..kernel.web import Route

TOPICS = ("deployment.requested", "deployment.ready", "deployment.updated", "deployment.deleted")
LOOPS: tuple[Loop, ...] = (INGEST,)


def _routes(ctx: Context) -> Sequence[Route]:
    from .api import routes

    return routes(ctx)


SERVICE = Service(
    name="telemetry",
    documents=(CaptureStream, Segment, Process, Window),
    owns=("/v1/capture", "/v1/telemetry"),
    routes=_routes,
    handlers=dict.fromkeys(TOPICS, on_deployment),
    loops=LOOPS,
)
