"""Scoring server: cold start to the first answer, calls per second at 1 and 64 in flight, capture off and on.

One replica on one core, a Python client on another where there are two; rounds with capture off and on take turns,
and the medians are printed. The client costs about as much as the server: read rates as ratios; CPU per call
is the steadiest figure.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import grpc
import skops.io
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from modelyard.core.inference import Inference, write_request
from modelyard.core.tensors import Tensor
from tests.unit.scoring.roots import Replica, launch, make_root

METHOD = "/inference.GRPCInferenceService/ModelInfer"
ROUNDS, SECONDS, CHANNELS = 3, 3.0, 8
X, Y = load_iris(return_X_y=True)
BODY = write_request(Inference("iris", tensors=[Tensor("x", X[:1])]))
FREE = "def run(raw_data):\n    return 1\n"


async def load(target: str, in_flight: int) -> tuple[float, float, float]:
    """(calls per second, p50 ms, p99 ms)."""
    channels = [grpc.aio.insecure_channel(target, [("n", i)]) for i in range(min(CHANNELS, in_flight))]
    times: list[float] = []
    end = time.perf_counter() + SECONDS

    async def caller(n: int) -> None:
        call = channels[n % len(channels)].unary_unary(METHOD)
        while (began := time.perf_counter()) < end:
            await call(BODY)
            times.append(time.perf_counter() - began)

    await asyncio.gather(*(caller(n) for n in range(in_flight)))
    for channel in channels:
        await channel.close()
    cuts = statistics.quantiles(times, n=100)
    return len(times) / SECONDS, cuts[49] * 1e3, cuts[98] * 1e3


def pin(pid: int, core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(task), {cores[core]})


def cpu_s(pid: int) -> float:
    """Processor seconds that a process used so far: steadier than the clock on a machine with other work."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rounds(name: str, off: Replica, on: Replica) -> None:
    for replica in (off, on):
        pin(replica.process.pid, 0)
        asyncio.run(load(replica.grpc, 8))
    for in_flight in (1, 64):
        seen: dict[str, list[tuple[float, ...]]] = {"off": [], "on": []}
        for _ in range(ROUNDS):
            for capture, replica in (("off", off), ("on", on)):
                before = cpu_s(replica.process.pid)
                rate, *times = asyncio.run(load(replica.grpc, in_flight))
                seen[capture].append((rate, *times, (cpu_s(replica.process.pid) - before) / rate / SECONDS * 1e6))
        for capture, figures in seen.items():
            rate, p50, p99, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
            print(f"{name:12} {in_flight:3} in flight, capture {capture:3}: {rate:7,.0f} calls/s, "
                  f"p50 {p50:6.2f} ms, p99 {p99:6.2f} ms, server {cpu:4.0f} us of CPU a call")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench-scoring-"))
    skops.io.dump(LogisticRegression(max_iter=200).fit(X, Y), folder / "model.skops")
    iris = [{"name": "iris", "version": 1, "file": folder / "model.skops", "framework": "scikit-learn"}]
    for name, score, models in (("sklearn LR", None, iris), ("score.py", FREE, iris)):
        starts = []
        for n in range(ROUNDS):
            root = make_root(folder / f"{name}{n}", score, models)
            began = time.perf_counter()
            with launch(root) as replica, grpc.insecure_channel(replica.grpc) as channel:
                channel.unary_unary(METHOD)(BODY)
                starts.append(time.perf_counter() - began)
                memory = Path(f"/proc/{replica.process.pid}/status").read_text().split("VmRSS:")[1].split()[0]
        print(f"{name:12} cold start to first answer: {statistics.median(starts):.2f} s, {int(memory) // 1024} MiB")
        root = make_root(folder / f"{name}-load", score, models)
        with launch(root) as off, launch(root, spool=folder / f"spool-{name}", capture={"enabled": True}) as on:
            rounds(name, off, on)


if __name__ == "__main__":
    pin(os.getpid(), -1)
    main()
