"""Deployments come, change and go: each has a stream to ingest from its first event on."""

from __future__ import annotations

from ..core.errors import AlreadyApplied, Conflict
from ..core.events import Envelope
from ..core.specs import Capture
from ..kernel.service import Context
from .model import CaptureStream

TRIES = 20


async def on_deployment(ctx: Context, event: Envelope) -> None:
    """Notes the deployment's retention and image, and that it is there, or gone. What it left stays until its
    retention ends, and what is still on its way is taken in."""
    for _ in range(TRIES):
        known = await ctx.store.get(CaptureStream, event.subject, workspace=event.workspace)
        stream = known or CaptureStream(id=event.subject, workspace=event.workspace, made_by=event.id)
        heeded = heed(stream, event)
        if heeded is None:
            return
        try:
            await ctx.commit(heeded.evolve(due=ctx.now()), cause=event.id)
            return ctx.wake("ingest")
        except AlreadyApplied:
            return
        except Conflict:
            continue
    raise Conflict(f"the capture stream of '{event.subject}' changes too often")


def heed(stream: CaptureStream, event: Envelope) -> CaptureStream | None:
    """The stream after this event; None when a newer one was heeded."""
    if event.sequence <= stream.heard:
        return None
    capture = event.data.get("capture")
    days = capture.get("retention_days") if isinstance(capture, dict) else None
    return stream.evolve(
        heard=event.sequence, gone=event.topic == "deployment.deleted",
        retention_days=days if isinstance(days, int) else Capture().retention_days,
        image=event.data["image"] if isinstance(event.data.get("image"), str) else stream.image)
