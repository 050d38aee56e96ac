"""A subscriber for the crash test: a service on the kernel's own consumer that writes down what it is handed.

    python recorder.py DATA NOTES      # one JSON line a delivery: [topic, subject, sequence, event id]
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

TOPICS = ("model.registered", "model.updated", "image.requested", "image.built", "image.failed", "image.deleted")


async def main(data: Path, notes: Path) -> None:
    out = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    async def note(ctx: Context, event: Envelope) -> None:
        line = json.dumps([event.topic, event.subject, int(event.sequence), event.id])
        os.write(out, line.encode() + b"\n")  # one write: a killed recorder leaves no half line

    service = Service("recorder", (), (), lambda ctx: (), handlers=dict.fromkeys(TOPICS, note))
    bus = await urls.open_bus(f"sqlite://{data}/yard.db")
    store = await urls.open_store(f"sqlite://{data}/yard.db", service.name)
    blobs = await urls.open_blobs(f"file://{data}/blobs")
    grants = await urls.open_grants(f"file://{data}/blobs")
    images = await urls.open_images(f"oci-layout://{data}/images")
    wakes = Wakes()
    ctx = Context(service.name, store, blobs, images, grants, {}, Peers({}, ""), data, wakes.wake)
    await run_service(ctx, service, bus, wakes)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
