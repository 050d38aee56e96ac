"""A subscriber for the crash test: a service on the kernel's own consumer that writes down what it is handed.

    python recorder.py NOTES      # on the environment's settings; a line a delivery: [topic, subject, sequence, id]
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from modelyard.adapters import urls
from modelyard.core.events import Envelope
from modelyard.kernel.forward import Peers
from modelyard.kernel.run import Wakes, run_service
from modelyard.kernel.service import Context, Service
from modelyard.settings import load

TOPICS = ("model.registered", "model.updated", "image.requested", "image.built", "image.failed", "image.deleted")


async def main(notes: Path) -> None:
    out = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    async def note(ctx: Context, event: Envelope) -> None:
        line = json.dumps([event.topic, event.subject, int(event.sequence), event.id])
        os.write(out, line.encode() + b"\n")  # one write: a killed recorder leaves no half line

    service = Service("recorder", (), (), lambda ctx: (), handlers=dict.fromkeys(TOPICS, note))
    settings = load()
    bus = await urls.open_bus(settings.bus)
    store = await urls.open_store(settings.store, service.name)
    blobs = await urls.open_blobs(settings.blobs)
    grants = await urls.open_grants(settings.blobs)
    images = await urls.open_images(settings.images)
    wakes = Wakes()
    ctx = Context(service.name, store, blobs, images, grants, {}, Peers({}, ""), settings.data, wakes.wake)
    await run_service(ctx, service, bus, wakes)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
