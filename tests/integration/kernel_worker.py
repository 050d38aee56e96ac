"""Two real services for the crash test and the benchmark, each in a process of its own.

    kernel_worker.py produce URL COUNT SUBJECTS RATE     commits COUNT events over SUBJECTS documents, then idles
    kernel_worker.py consume URL                         counts them in documents of its own

URL is the store's, and the bus's too unless MODELYARD_BUS names another.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

from modelyard.adapters import urls
from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.images_layout import LayoutImages
from modelyard.core.documents import Document
from modelyard.core.errors import AlreadyApplied, Conflict
from modelyard.core.events import Envelope, Fact
from modelyard.kernel.forward import Peers
from modelyard.kernel.run import Wakes, run_service
from modelyard.kernel.service import Context, Service

TOPICS = ("model.registered", "model.updated", "model.aliased")


class Plant(Document):
    """What the producer changes: ``number`` rises with each event."""

    kind: ClassVar[str] = "plant"
    number: int = 0
    at: float = 0.0


class Tally(Document):
    """What the consumer keeps of a subject, or of a bed of several: what it handled, in the order it did."""

    kind: ClassVar[str] = "tally"
    seen: dict[str, list[int]] = {}


def bed(subject: str) -> str:
    """The document that a subject shares with others: lanes that run side by side meet here."""
    return f"bed-{int(subject[1:]) // 5}"


async def count(ctx: Context, envelope: Envelope) -> None:
    """The effect that must happen once: two documents, two commits, the same cause."""
    await note(ctx, envelope, envelope.subject, envelope.topic)
    await note(ctx, envelope, bed(envelope.subject), envelope.subject)


async def note(ctx: Context, envelope: Envelope, id: str, lane: str) -> None:
    while True:
        doc = await ctx.store.get(Tally, id) or Tally(id=id)
        if int(envelope.sequence) in doc.seen.get(lane, ()):
            return  # handled before; a document that outlives its causes keeps its effects by key
        seen = {**doc.seen, lane: [*doc.seen.get(lane, ()), int(envelope.sequence)]}
        try:
            await ctx.commit(doc.evolve(seen=seen), cause=envelope.id)
        except AlreadyApplied:
            raise AssertionError(f"{id} forgot {envelope.id}") from None
        except Conflict:
            continue
        return


PRODUCER = Service("registry", (Plant,), (), lambda ctx: ())
CONSUMER = Service("telemetry", (Tally,), (), lambda ctx: (), dict.fromkeys(TOPICS, count))


async def serve(url: str, service: Service, work: object = None) -> None:
    wakes = Wakes()
    store, bus = await urls.open_store(url, service.name), await urls.open_bus(os.environ.get("MODELYARD_BUS") or url)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ctx = Context(service=service.name, store=store, blobs=DirBlobs(root), images=LayoutImages(root),
                      grants=DirGrants(root), targets={}, peers=Peers({}, "token"), data=root, wake=wakes.wake)
        async with asyncio.TaskGroup() as group:
            group.create_task(run_service(ctx, service, bus, wakes))
            print("ready", flush=True)
            if callable(work):
                await work(ctx)


async def produce(ctx: Context, total: int, subjects: int, rate: float) -> None:
    """Goes on where the last process was killed: a document's number says how far it is."""

    async def grow(name: str, upto: int) -> None:
        doc = await ctx.store.get(Plant, name) or Plant(id=name)
        while doc.number < upto:
            topic = TOPICS[0] if doc.number == 0 else TOPICS[1 + doc.number % 2]
            doc = await ctx.commit(doc.evolve(number=doc.number + 1, at=time.time()), Fact(topic))
            await asyncio.sleep(subjects / rate)

    await asyncio.gather(*(grow(f"p{n}", total // subjects) for n in range(subjects)))


if __name__ == "__main__":
    what, url, *rest = sys.argv[1:]
    if what == "produce":
        amounts = int(rest[0]), int(rest[1]), float(rest[2])
        asyncio.run(serve(url, PRODUCER, lambda ctx: produce(ctx, *amounts)))
    else:
        asyncio.run(serve(url, CONSUMER))
