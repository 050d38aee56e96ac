"""The scoring client against a plain loop over a generated stub: items per second, one row of iris each.

One replica of each transport on one core, the client on another where there are two. The ways take turns, in
``ROUNDS`` rounds of one run, and what is printed is the median of each way's rate divided by the plain loop's in the
same round: other work on the machine slows both. CPU is the client's, for one item.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import grpc
import numpy as np
import skops.io
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from modelyard import AsyncScoringClient, ScoringClient
from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.benchmarks.bench_scoring import pin
from tests.unit.scoring.roots import launch, make_root

ROUNDS, SECONDS = int(os.environ.get("ROUNDS", "7")), float(os.environ.get("SECONDS", "1"))
DATA, LABELS = load_iris(return_X_y=True)
ROWS = [np.ascontiguousarray(DATA[n:n + 1], np.float32) for n in range(len(DATA))]
PLAIN = "stub loop"
Way = Callable[[], int]
"""Scores for ``SECONDS`` and says how many items."""


def items() -> Iterator[dict[str, Any]]:
    end, n = time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end:
        yield {"x": ROWS[n % len(ROWS)]}
        n += 1


def plain(address: str) -> int:
    """What everybody writes first."""
    count = 0
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        for item in items():
            request = pb.ModelInferRequest(model_name="iris")
            request.inputs.add(name="x", datatype="FP32", shape=item["x"].shape)
            request.raw_input_contents.append(item["x"].tobytes())
            answer = stub.ModelInfer(request)
            _ = np.frombuffer(answer.raw_output_contents[0], np.int64).reshape(tuple(answer.outputs[0].shape))
            count += 1
    return count


def one_by_one(address: str) -> int:
    with ScoringClient(address, model="iris") as client:
        return sum(1 for item in items() if client.infer(item))


def many(address: str, **terms: Any) -> int:
    with ScoringClient(address, model="iris") as client:
        return sum(1 for _ in client.infer_many(items(), **terms))


def async_one_by_one(address: str) -> int:
    async def run() -> int:
        async with AsyncScoringClient(address, model="iris") as client:
            return sum([1 for item in items() if await client.infer(item)])

    return asyncio.run(run())


def async_many(address: str, **terms: Any) -> int:
    async def run() -> int:
        async with AsyncScoringClient(address, model="iris") as client:
            return sum([1 async for _ in client.infer_many(items(), **terms)])

    return asyncio.run(run())


WAYS: dict[str, Callable[[str], int]] = {
    PLAIN: plain, "infer": one_by_one, "infer, async": async_one_by_one, "infer_many": many,
    "infer_many, async": async_many, "infer_many, join_rows=32": lambda a: many(a, join_rows=32),
    "infer_many, async, join_rows=32": lambda a: async_many(a, join_rows=32),
}


def verify(address: str) -> None:
    """Every row of iris, in each way of ``infer_many``: the answers are the model's own, and in order."""
    right = LogisticRegression(max_iter=200).fit(DATA, LABELS).predict(np.vstack(ROWS)).tolist()
    rows = [{"x": row} for row in ROWS]

    async def behind(**terms: Any) -> list[Any]:
        async with AsyncScoringClient(address, model="iris") as client:
            return [result async for result in client.infer_many(rows, **terms)]

    for terms in ({}, {"join_rows": 32}):
        with ScoringClient(address, model="iris") as client:
            found = list(client.infer_many(rows, **terms))
        for results in (found, asyncio.run(behind(**terms))):
            got = [np.ravel(next(iter(result.values()))).item() for result in results]
            assert got == right, f"infer_many({terms}) gives {got[:5]} …, right is {right[:5]} …"


def measure(address: str, rounds: int = ROUNDS) -> dict[str, list[tuple[float, float]]]:
    """Way → (items per second, CPU seconds per item) of each round; the first round warms up."""
    verify(address)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            cpu, began = time.process_time(), time.perf_counter()
            count = way(address)
            took = time.perf_counter() - began
            if number:
                seen[name].append((count / took, (time.process_time() - cpu) / count))
    return seen


def against_plain(seen: dict[str, list[tuple[float, float]]], name: str) -> list[float]:
    """A way's rate over the plain loop's of the same round, sorted."""
    return sorted(mine[0] / base[0] for mine, base in zip(seen[name], seen[PLAIN], strict=True))


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench-client-"))
    skops.io.dump(LogisticRegression(max_iter=200).fit(DATA, LABELS), folder / "model.skops")
    root = make_root(folder, None, [
        {"name": "iris", "version": 1, "file": folder / "model.skops", "framework": "scikit-learn"}])
    pin(os.getpid(), -1)
    for transport in sys.argv[1:] or ("h2", "grpc"):
        with launch(root, arguments=["--transport", transport]) as replica:
            pin(replica.process.pid, 0)
            seen = measure(replica.grpc)
        for name, rounds in seen.items():
            ratios = against_plain(seen, name)
            rate, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"{transport:5} {name:32} {rate:8,.0f} items/s {cpu * 1e6:5.0f} us CPU  "
                  f"{statistics.median(ratios):5.1f} x the {PLAIN} ({ratios[0]:.1f} to {ratios[-1]:.1f})", flush=True)


if __name__ == "__main__":
    main()
