"""Running a service: everything that works in the background between two requests.

    wakes = Wakes(); ctx = Context(…, wake=wakes.wake)
    async with asyncio.TaskGroup() as group:
        group.create_task(run_service(ctx, SERVICE, bus, wakes))      # until cancelled
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from ..core.documents import Document
from ..ports.bus import EventBus
from .consume import consume, count_parked, parked_loop
from .dead import DeadLetter, ParkedKey, Seen
from .loop import run_loop
from .relay import relay
from .service import Context, Service
from .wakes import Wakes

__all__ = ["KERNEL_DOCUMENTS", "Wakes", "consume", "loops", "relay", "run_service"]

log = logging.getLogger(__name__)
KERNEL_DOCUMENTS: tuple[type[Document], ...] = (ParkedKey, DeadLetter, Seen)
"""Kinds that these coroutines keep in every service's store."""


async def run_service(ctx: Context, service: Service, bus: EventBus, wakes: Wakes) -> None:
    """Relay, consumer and loops of one service, until cancelled; then nothing of them is left."""
    async with asyncio.TaskGroup() as group:
        group.create_task(_lasting("relay", partial(relay, ctx, bus)))
        if service.handlers:
            group.create_task(_lasting("consumer", partial(consume, ctx, service, bus)))
        group.create_task(loops(ctx, service, wakes))


async def loops(ctx: Context, service: Service, wakes: Wakes) -> None:
    """The service's loops, and the one that tries parked keys again, until cancelled."""
    async with asyncio.TaskGroup() as group:
        for loop in service.loops:
            group.create_task(_lasting(f"loop {loop.name}", partial(run_loop, ctx, loop, wakes)))
        if service.handlers:
            group.create_task(_lasting("loop parked", partial(run_loop, ctx, parked_loop(service), wakes)))
            group.create_task(_lasting("parked gauge", partial(count_parked, ctx)))


async def _lasting(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """A fault in one of them is logged whole and ends neither it nor its neighbours."""
    wait = 0.5
    while True:
        try:
            return await run()
        except Exception:
            log.exception("%s failed and starts again in %.1f s", name, wait)
        await asyncio.sleep(wait)
        wait = min(wait * 2, 30.0)
