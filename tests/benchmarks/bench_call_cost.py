"""What a gRPC call costs in Python: our HTTP/2 application with a stand-in for h2corn around it, so no network.

CPU (user and system, of all threads) in microseconds a call. ``echo`` is the floor: it parses a request and gives its
tensors back. Read the differences; a stand-in's own ``receive`` and ``send`` are in all of them.

    python bench_call_cost.py [--profile CASE] [--rounds N]
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import uvloop

from modelyard.core.inference import Inference, write_request
from modelyard.core.tensors import Tensor
from modelyard.image_builder import onnx_hook
from modelyard.scoring.__main__ import _keep_memory
from modelyard.scoring.capture import CaptureLog
from modelyard.scoring.dataplane import DataPlane
from modelyard.scoring.h2_app import H2App
from modelyard.scoring.image import Image
from modelyard.scoring.settings import Limits
from tests.benchmarks.peers import echo, models
from tests.unit.scoring.roots import make_root

PATH = "/inference.GRPCInferenceService/ModelInfer"
HEADERS = [(b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"user-agent", b"grpc-python/1.62.0"),
           (b"grpc-accept-encoding", b"identity, deflate, gzip"), (b"x-request-id", b"5f0c1d3c9a7b4f6c8e21")]
ROUNDS, BUNCHES = 9, 40


class Ready:
    """What h2corn's ``receive`` and ``send`` give back: awaitable, and done."""

    __slots__ = ("_value",)

    def __init__(self, value: Any = None) -> None:
        self._value = value

    def send(self, value: Any) -> Any:
        raise StopIteration(self._value)

    def __await__(self) -> Iterator[Any]:
        return self

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise StopIteration(self._value)


NONE = Ready()


class Driver:
    """Starts calls as h2corn does: each a task of the loop's, started from one callback, so many at once."""

    def __init__(self, app: Callable[..., Any], body: bytes, at_once: int) -> None:
        self._app, self._body, self._at_once = app, body, at_once
        self._loop = asyncio.get_running_loop()
        self._left = 0
        self._sent = b""

    async def bunches(self, number: int) -> float:
        """CPU microseconds a call."""
        began = time.process_time_ns()
        for _ in range(number):
            self._left = self._at_once
            self._over = self._loop.create_future()
            self._loop.call_soon(self._pump)
            await self._over
        assert self._sent == b"0", self._sent
        return (time.process_time_ns() - began) / 1000 / number / self._at_once

    def _pump(self) -> None:
        for _ in range(self._at_once):
            scope = {"type": "http", "method": "POST", "path": PATH, "headers": HEADERS.copy(),
                     "extensions": {"http.response.trailers": {}}}
            task = self._loop.create_task(self._app(scope, self._receive(), self._send), name="h2corn.request")
            if task.done():
                self._done(task)
            else:
                task.add_done_callback(self._done)

    def _receive(self) -> Callable[[], Ready]:
        """The body, and then that it was all."""
        events = iter(({"type": "http.request", "body": self._body, "more_body": True}, {"type": "http.request"}))
        return lambda: Ready(next(events))

    def _send(self, message: dict[str, Any]) -> Ready:
        if message["type"] == "http.response.trailers":
            self._sent = message["headers"][0][1]
        return NONE

    def _done(self, task: Any) -> None:
        task.result()
        self._left -= 1
        if not self._left:
            self._over.set_result(None)


def as_onnx(model: models.Model, folder: Path) -> dict[str, Any]:
    """The model as an image holds it that was asked for with ``--onnx``."""
    graph, told = onnx_hook.converted(onnx_hook.load(model.file, trusted=True), {"data": model.rows.tolist()})
    (folder / f"{model.name}-made.onnx").write_bytes(graph)
    return {"file": folder / f"{model.name}-made.onnx", "framework": "onnx", "answers": told}


async def measure(folder: Path, asked: argparse.Namespace) -> None:
    found = models.make(folder)
    cases = [("lr, 83 B", found["lr"]), ("mlp, 3 KB", found["mlp"]),
             *((f"same, {size}", models.of_size(found["same"], size)) for size in models.SIZES)]
    for n, (name, model) in enumerate(cases):
        request = write_request(Inference(model.name, tensors=[Tensor("x", model.rows)]))
        body = b"\0" + len(request).to_bytes(4, "big") + request
        planes = []
        drivers = {"echo": echo.app}
        plain = {"file": model.file, "trusted": True, "framework": model.framework}
        variants = [("", None, plain), (", captured", folder / f"spool-{n}", plain)]
        if model.framework == "scikit-learn":
            variants.append((", as ONNX", None, await asyncio.to_thread(as_onnx, model, folder)))
        for tag, spool, fields in variants:
            root = make_root(folder / f"{n}{tag}", None, [{"name": model.name, "version": 1, **fields}])
            policy = {"enabled": True, "spool_bytes": 16 << 30}
            log = CaptureLog.open(spool, "0", {"deployment": "flower"}, policy) if spool else None
            plane = DataPlane("flower", Limits(), log)
            await plane.load(await asyncio.to_thread(Image.read, root), "7")
            planes.append((plane, log, spool))
            drivers[f"ours{tag}"] = H2App(plane)
        if not asked.profile or asked.profile == name:
            await _case(name, drivers, body, asked)
        for plane, log, spool in planes:
            plane.close()
            if log is not None:
                log.close()
                for path in spool.iterdir():
                    path.unlink()


async def _case(name: str, apps: dict[str, Any], body: bytes, asked: argparse.Namespace) -> None:
    for at_once in asked.at_once:
        drivers = {label: Driver(app, body, at_once) for label, app in apps.items()}
        seen: dict[str, list[float]] = {label: [] for label in drivers}
        bunches = max(BUNCHES * 64 // at_once // (8 if len(body) > 60_000 else 1), 4)
        for n in range(-1, asked.rounds):
            for label, driver in drivers.items():
                figure = await driver.bunches(bunches)
                if n >= 0:
                    seen[label].append(figure)
        print(f"{name:14} {at_once:3} at once: " + "; ".join(f"{label} {statistics.median(v):6.1f} (least {min(v):.1f})"
                                                         for label, v in seen.items()), flush=True)
    if asked.profile:
        profile = cProfile.Profile()
        driver = Driver(apps[asked.which], body, 64)
        profile.enable()
        await driver.bunches(200)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--profile", default="", help="a case: where its time goes")
    parser.add_argument("--which", default="ours")
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    _keep_memory()
    with tempfile.TemporaryDirectory(prefix="bench-call-") as folder, \
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(Path(folder), asked))


if __name__ == "__main__":
    main()
