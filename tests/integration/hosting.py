"""A service of a test's own, run by the real kernel in this event loop, over any store and any bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from modelyard.adapters import urls
from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.images_layout import LayoutImages
from modelyard.kernel.forward import Peers
from modelyard.kernel.run import Wakes, run_service
from modelyard.kernel.service import Context, Service


@asynccontextmanager
async def hosted(service: Service, folder: Path, *, bus: str, store: str | None = None) -> AsyncIterator[Context]:
    """Relay, consumer and loops run while the context is open; a fault in them fails the test."""
    folder.mkdir(parents=True, exist_ok=True)
    wakes = Wakes()
    opened = await urls.open_store(store or f"sqlite://{folder}/store.db", service.name)
    line = await urls.open_bus(bus)
    ctx = Context(service.name, opened, DirBlobs(folder), LayoutImages(folder), DirGrants(folder), {}, Peers({}, ""),
                  folder, wakes.wake)
    work = asyncio.create_task(run_service(ctx, service, line, wakes))
    try:
        yield ctx
    finally:
        broken = work.done()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await line.close()
        await opened.close()
    if broken:
        work.result()
