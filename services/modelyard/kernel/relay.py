"""Relay: what was committed reaches the bus.

Events leave a document's outbox in the order of its commits, and are taken out only when the bus has them.
A crash between the two publishes them again with equal ids; so do two relays at once. Consumers drop repeats.
"""

from __future__ import annotations

import asyncio
import logging

from ..core.errors import ModelyardError, Unavailable
from ..ports.bus import EventBus
from ..ports.store import Pending
from .observe import OUTBOX_UNSENT, PUBLISHED, Once, fields, in_service
from .service import Context

log = logging.getLogger(__name__)
WAIT_S = 5.0
BATCH = 200
GATHER_S = 0.004
"""Between two rounds of a busy relay: what is committed meanwhile goes in one round."""
BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


async def relay(ctx: Context, bus: EventBus) -> None:
    """Runs until cancelled. The store wakes it (``pending`` waits for the first event). Outages are waited out."""
    in_service(ctx.service)
    said, failures = Once(), 0
    while True:
        try:
            busy, refused = await _round(ctx, bus, said)
        except Unavailable as exc:
            if said.new("outage", exc):
                log.warning("events wait in the outbox until this is over: %s", exc)
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
            failures += 1
            continue
        failures = 0
        if said.clear("outage"):
            log.info("publishing events again")
        if refused:
            await asyncio.sleep(1.0)
        elif busy:
            await asyncio.sleep(GATHER_S)


async def _round(ctx: Context, bus: EventBus, said: Once) -> tuple[bool, bool]:
    """One look at the outboxes → (there may be more, some events were refused)."""
    batch = await ctx.store.pending(BATCH, wait=WAIT_S)
    OUTBOX_UNSENT.labels(ctx.service).set(sum(len(p.events) for p in batch))
    results = await asyncio.gather(*(_drain(ctx, bus, p) for p in batch), return_exceptions=True)
    refused = False
    for pending, result in zip(batch, results, strict=True):
        if isinstance(result, ModelyardError) and not isinstance(result, Unavailable):
            refused = True
            if said.new((pending.kind, pending.workspace, pending.id), result):
                log.error("the bus refuses an event: %s", result, extra=fields(kind=pending.kind, id=pending.id))
    for result in results:
        if isinstance(result, Unavailable) or (result is not None and not isinstance(result, ModelyardError)):
            raise result
    if not refused:
        OUTBOX_UNSENT.labels(ctx.service).set(0)  # what came meanwhile is counted in the next round, which is now
    return bool(batch), refused


async def _drain(ctx: Context, bus: EventBus, pending: Pending) -> None:
    """Publishes in order; what the bus has is taken out even when a later event fails."""
    done = 0
    try:
        for event in pending.events:
            await bus.publish(event)
            done += 1
    finally:
        if done:
            PUBLISHED.labels(ctx.service).inc(done)
            await ctx.store.sent(Pending(pending.workspace, pending.kind, pending.id, pending.events[:done]))
