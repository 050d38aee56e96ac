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

from modelyard.core.documents import Document
from modelyard.core.errors import AlreadyApplied
from modelyard.core.events import Envelope
from modelyard.kernel.service import Context, Service
from tests.integration.kernel_worker import TOPICS, serve

WORKER = Path(__file__).parents[1] / "integration" / "kernel_worker.py"


class Effect(Document):
    """What a handler leaves behind: one for each event."""

    kind = "effect"


async def effect(ctx: Context, envelope: Envelope) -> None:
    """Tells, when the effect is committed, how long ago the producer began to commit, and the time now."""
    try:
        await ctx.commit(Effect(id=envelope.id), cause=envelope.id)
    except AlreadyApplied:
        return
    now = time.time()
    print(now - envelope.data["at"], now, flush=True)


CONSUMER = Service("telemetry", (Effect,), (), lambda ctx: (), dict.fromkeys(TOPICS, effect))


async def start(*args: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(sys.executable, *args, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    return process


async def run(total: int, subjects: int, rate: float) -> tuple[list[float], float]:
    """(seconds from the start of a commit to its event's committed effect, seconds from first effect to last)."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite://{folder}/yard.db"
        consumer = await start(__file__, "--consume", url)
        producer = await start(str(WORKER), "produce", url, str(total), str(subjects), str(rate))
        assert consumer.stdout is not None
        try:
            said = [(await consumer.stdout.readline()).split() for _ in range(total)]
        finally:
            for process in (consumer, producer):
                process.kill()
                await process.wait()
    times = [float(at) for _, at in said]
    return sorted(float(seconds) for seconds, _ in said), max(times) - min(times)


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
