"""Batching: calls per second through the data plane, without a transport, with calls joined and each by itself.

One process, 64 callers, each of which calls again as soon as it is answered. Both ways take turns within one run and
the medians are compared: read the ratios. ``python bench_batching.py [--capture] [--profile MODEL]``.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import itertools

import joblib
import numpy as np
import uvloop
from onnx import TensorProto, helper, numpy_helper, save_model
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Answer, Call
from modelyard.scoring.capture import CaptureLog
from modelyard.scoring.dataplane import DataPlane
from modelyard.scoring.image import Image
from modelyard.scoring.settings import Limits
from tests.unit.scoring.planes import grpc_call
from tests.unit.scoring.roots import make_root

CALLERS, ROUNDS, SECONDS = 64, 3, 2.0
LAYERS = (784, 1024, 256, 10)
SCORE = "import numpy as np\ndef {name}(data: np.ndarray):\n    return data.sum(axis=1)\n"


def mlp(path: Path) -> None:
    """A perceptron of 1.07 million parameters."""
    dice, nodes, weights, last = np.random.default_rng(1), [], [], "x"
    for n, (wide, out) in enumerate(itertools.pairwise(LAYERS)):
        for name, values in ((f"w{n}", dice.normal(0, 0.05, (wide, out))), (f"b{n}", dice.normal(0, 0.05, out))):
            weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        nodes.append(helper.make_node("Gemm", [last, f"w{n}", f"b{n}"], [f"g{n}"]))
        last = f"g{n}"
        if n < len(LAYERS) - 2:
            nodes.append(helper.make_node("Relu", [last], [f"r{n}"]))
            last = f"r{n}"
    graph = helper.make_graph(
        nodes, "mlp", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", LAYERS[0]])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", LAYERS[-1]])], weights)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def cases(folder: Path) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Name → (what the image holds, a call's array)."""
    x, y = load_iris(return_X_y=True)
    found: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
    estimators = {"lr": LogisticRegression(max_iter=200), "rf-100": RandomForestClassifier(100, n_jobs=1)}
    for name, estimator in estimators.items():
        joblib.dump(estimator.fit(x, y), folder / f"{name}.joblib")
        model = {"name": "m", "version": 1, "file": folder / f"{name}.joblib", "trusted": True}
        found[name] = {"models": [model]}, x[:1]
    mlp(folder / "mlp.onnx")
    found["onnx-mlp"] = ({"models": [{"name": "m", "version": 1, "file": folder / "mlp.onnx"}]},
                         np.zeros((1, LAYERS[0]), np.float32))
    found["run_batch"] = {"score": SCORE.format(name="run_batch")}, x[:1]
    return found


async def drive(plane: DataPlane, call: Call, seconds: float, callers: int = CALLERS) -> tuple[float, float, float]:
    """(calls per second, p99 milliseconds, processor microseconds per call: the steadiest on a busy machine)."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    times: list[float] = []
    left = callers
    end = time.perf_counter() + seconds

    def again() -> None:
        began = time.perf_counter()
        plane.submit(Call(call.protocol, call.method, call.body, call.body_type, call.codec), lambda a: one(a, began))

    def one(answer: Answer, began: float) -> None:
        nonlocal left
        assert answer.status == "OK", answer.error
        now = time.perf_counter()
        times.append(now - began)
        if now < end:
            loop.call_soon(again)
        elif (left := left - 1) == 0:
            over.set_result(None)

    used = time.process_time()
    for _ in range(callers):
        again()
    await over
    used = time.process_time() - used
    return len(times) / seconds, statistics.quantiles(times, n=100)[98] * 1e3, used / len(times) * 1e6


async def compare(name: str, folder: Path, held: dict[str, Any], array: np.ndarray, capture: bool) -> None:
    planes: dict[str, DataPlane] = {}
    logs = []
    root = make_root(folder / name, **held)
    for how, rows in (("joined", 64), ("alone", 1)):
        log = None
        if capture:
            log = CaptureLog.open(folder / name / how, "0-00000000", {}, {"enabled": True})
            logs.append(log)
        planes[how] = DataPlane("m", Limits(max_batch_rows=rows), log)
        await planes[how].load(Image.read(root), "1")
        await drive(planes[how], grpc_call("m", Tensor("x", array)), 0.5)
    call = grpc_call("m", Tensor("x", array))
    seen: dict[str, list[tuple[float, float, float]]] = {how: [] for how in planes}
    for _ in range(ROUNDS):
        for how, plane in planes.items():
            seen[how].append(await drive(plane, call, SECONDS))
    counts = next(iter(planes["joined"].metrics._sizes._models.values()))
    size = counts[-1] / sum(counts[:-1])
    single = [(await drive(plane, call, 0.5, 1))[1] for plane in planes.values()]
    joined, alone = ([statistics.median(column) for column in zip(*seen[how], strict=True)] for how in planes)
    print(f"{name:10} joined {_said(joined)} | alone {_said(alone)} | {joined[0] / alone[0]:4.1f} x calls/s, "
          f"{alone[2] / joined[2]:4.1f} x CPU | {size:.0f} calls a batch | one caller p99 {single[0]:.2f} ms",
          flush=True)
    for plane in planes.values():
        plane.close()
    for log in logs:
        log.close()


def _said(figures: list[float]) -> str:
    return f"{figures[0]:7,.0f}/s p99 {figures[1]:6.2f} ms {figures[2]:6.1f} us CPU"


async def profile(folder: Path, held: dict[str, Any], array: np.ndarray) -> None:
    plane = DataPlane("m", Limits())
    await plane.load(Image.read(make_root(folder / "profile", **held)), "1")
    call = grpc_call("m", Tensor("x", array))
    await drive(plane, call, 0.5)
    profiler = cProfile.Profile()
    profiler.enable()
    rate, *_ = await drive(plane, call, 3.0)
    profiler.disable()
    print(f"{rate:,.0f} calls/s under the profiler")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
    plane.close()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capture", action="store_true")
    parser.add_argument("--profile", default="")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        found = cases(folder)
        if args.profile:
            await profile(folder, *found[args.profile])
            return
        capture = "on" if args.capture else "off"
        print(f"{CALLERS} callers; median of {ROUNDS} rounds of {SECONDS:g} s; capture {capture}")
        for name, (held, array) in found.items():
            if not args.only or name == args.only:
                await compare(name, folder, held, array, args.capture)


if __name__ == "__main__":
    sys.setswitchinterval(0.001)  # as the server does
    uvloop.run(main())
