"""What capture costs a call, and how fast ingest takes records in.

    python tests/benchmarks/bench_capture.py
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from modelyard.scoring.capture import CaptureLog, Finished
from modelyard.telemetry.model import Segment
from tests.unit.telemetry.bench import NOON, Life, bench

ABOUT = {"workspace": "default", "deployment": "iris", "image": "iris-scorer:7", "models": ["iris:4"]}
KIND = "application/grpc+proto"


def append(size: int, calls: int) -> str:
    """The time of one ``append`` of one call with ``size`` bytes each way."""
    with tempfile.TemporaryDirectory() as folder:
        log = CaptureLog.open(Path(folder), "0-1a2b3c4d", ABOUT, {"enabled": True})
        body, spent = b"x" * size, []
        for n in range(calls):
            call = Finished(f"{n:032x}", f"{n:032x}", "iris:4", "grpc", "ModelInfer", "OK", time.time_ns(), 10**6,
                            10**4, body, KIND, body, KIND, "")
            began = time.perf_counter_ns()
            log.append((call,))
            spent.append(time.perf_counter_ns() - began)
        log.close()
    spent.sort()
    p50, p99 = spent[calls // 2] / 1000, spent[calls * 99 // 100] / 1000
    return f"append 2 x {size} B: p50 {p50:.1f} us, p99 {p99:.1f} us, mean {sum(spent) / calls / 1000:.1f} us"


async def ingest(size: int, records: int) -> str:
    """One segment with that many records, from its raw bytes to Parquet, manifest and process."""
    with tempfile.TemporaryDirectory() as folder:
        async with bench(Path(folder)) as here:
            await here.deployed()
            await here.ship(Life("1-00000000").record(NOON))
            await here.step()
            life = Life()
            for _ in range(records):
                life.record(NOON, request=b"x" * size, response=b"y" * size)
            await here.ship(life)
            began = time.perf_counter()
            await here.step()
            took = time.perf_counter() - began
            assert [s.rows for s in await here.ctx.store.find(Segment, {"replica": life.replica})] == [records]
    return f"ingest of {records} records of 2 x {size} B: {records / took:,.0f} rows/s ({took * 1000:.0f} ms)"


if __name__ == "__main__":
    for line in (append(83, 50_000), append(2048, 20_000), append(65_536, 1000)):
        print(line)
    for size, records in ((83, 40_000), (2048, 4000)):
        print(asyncio.run(ingest(size, records)))
