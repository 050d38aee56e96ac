"""From event to effect at 20 a second: a commit in one process, its event's effect committed by another.

    python tests/benchmarks/event_to_effect.py [--rate 20] [--seconds 15]

Goal on two cores: p50 <= 50 ms, p99 <= 250 ms. Then the throughput of the whole way: commits with an event each,
relayed, consumed and their effects committed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from modelyard.adapters.urls import open_store
from modelyard.core.documents import Document
from modelyard.core.errors import AlreadyApplied
from modelyard.core.events import Envelope
from modelyard.kernel.service import Context, Service
from modelyard.ports.store import DocumentStore
from tests.integration.kernel_worker import TOPICS, serve

WORKER = Path(__file__).parents[1] / "integration" / "kernel_worker.py"


class Effect(Document):
    """One for each event: when its handler committed, and how long after the producer began to commit."""

    kind = "effect"
    seconds: float
    at: float


async def effect(ctx: Context, envelope: Envelope) -> None:
    try:
        now = time.time()
        await ctx.commit(Effect(id=envelope.id, seconds=now - envelope.data["at"], at=now), cause=envelope.id)
    except AlreadyApplied:
        return


CONSUMER = Service("telemetry", (Effect,), (), lambda ctx: (), dict.fromkeys(TOPICS, effect))


async def count(store: DocumentStore) -> list[Effect]:
    return await store.find(Effect, limit=1_000_000)


async def start(*args: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(sys.executable, *args, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    return process


async def run(total: int, subjects: int, rate: float) -> tuple[list[float], float]:
    """(seconds from commit to effect of each event, seconds from the first effect to the last)."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite://{folder}/yard.db"
        store = await open_store(url, CONSUMER.name)
        crew = [await start(__file__, "--consume", url)]
        crew.append(await start(str(WORKER), "produce", url, str(total), str(subjects), str(rate)))
        try:
            while len(effects := await count(store)) < total:
                await asyncio.sleep(1.0)
        finally:
            for process in crew:
                process.kill()
                await process.wait()
            await store.close()
    times = [e.at for e in effects]
    return sorted(e.seconds for e in effects), max(times) - min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="From event to effect on the embedded adapters.")
    parser.add_argument("--rate", type=float, default=20.0, help="events a second")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--consume", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.consume:
        asyncio.run(serve(args.consume, CONSUMER))
        return
    total = int(args.rate * args.seconds) // 10 * 10
    waits, _ = asyncio.run(run(total, 10, args.rate))
    p50, p99 = (1000 * waits[int(len(waits) * q)] for q in (0.50, 0.99))
    print(f"event to effect at {args.rate:g}/s, {total} events: p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
          f"max {1000 * waits[-1]:.1f} ms (goal: p50 <= 50, p99 <= 250)")
    waits, took = asyncio.run(run(4000, 40, 1e6))
    print(f"throughput commit to effect, two processes: {4000 / took:.0f} events/s")


if __name__ == "__main__":
    main()
