"""Scoring server: its gRPC transports side by side, cold start to the first answer, capture off and on.

One server on one core, the client on another where there are two; what is compared takes turns, and the medians are
printed. ``h2load`` (Debian: nghttp2-client) drives unary calls where it is installed, else a Python client, which costs
about as much as the server does. Read rates as ratios; CPU per call is the steadiest figure. ``echo`` is the transport
alone: a data plane that gives every message back.

    python bench_scoring.py [transports] [capture]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import grpc
import skops.io
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from modelyard.core.inference import Inference, write_request
from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Answer
from modelyard.scoring.dataplane import DataPlane
from modelyard.scoring.serve import _loop_factory
from modelyard.scoring.settings import Limits
from tests.raw_h2 import RawClient, framed
from tests.unit.scoring.roots import Replica, launch, make_root

SERVICE = "/inference.GRPCInferenceService"
METHOD, STREAM = f"{SERVICE}/ModelInfer", f"{SERVICE}/ModelStreamInfer"
TRANSPORTS = ("grpc", "h2")
BUNCH = 64
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


class Echo(DataPlane):
    """Gives every message back."""

    def submit(self, call: Any, done: Any) -> None:
        self.last_call = time.monotonic()
        done(self._answer(call))

    async def handle(self, calls: Any) -> list[Answer]:
        return [self._answer(call) for call in calls]

    def _answer(self, call: Any) -> Any:
        return SimpleNamespace(body=call.body, body_type=call.body_type, status="OK", request_id="1", prediction_id="1",
                               model="echo:1", error=None)


async def serve_echo(transport: str) -> None:
    """Prints its address and serves until it is killed."""
    from modelyard.scoring.transport_grpc import GrpcTransport
    from modelyard.scoring.transport_h2 import H2Transport

    server = {"grpc": GrpcTransport, "h2": H2Transport}[transport]("127.0.0.1:0", Echo("echo", Limits()))
    print(await server.start(), flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def echo(transport: str) -> Iterator[tuple[int, str]]:
    """(pid, address) of an echo server."""
    program = [sys.executable, __file__, "--echo", transport]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, process.stdout.readline().strip()
        finally:
            process.kill()


def unary(address: str, in_flight: int, body: Path) -> float:
    """Calls per second."""
    if shutil.which("h2load") is None:
        return asyncio.run(load(address, in_flight))[0]
    connections = min(CHANNELS, in_flight)
    told = subprocess.run(
        ["h2load", "-t1", "-c", str(connections), "-m", str(in_flight // connections), "-D", str(int(SECONDS)),
         "--warm-up-time", "1", "-d", body, "-H", "content-type: application/grpc", "-H", "te: trailers",
         f"http://{address}{METHOD}"], capture_output=True, text=True, check=True).stdout
    done = re.search(r"(\d+) succeeded, (\d+) failed", told)
    assert done is not None and int(done[2]) == 0, told
    return int(done[1]) / int(SECONDS)


def stream(address: str, asked: bytes = BODY, seconds: float = SECONDS, check: Any = lambda message: None) -> float:
    """Messages per second on one stream, a bunch of them in flight. ``check`` gets the last answer of each bunch."""
    bunch = framed(asked) * BUNCH
    with RawClient(address) as client:
        number = client.call(STREAM)
        heard, made = client.heard[number], 0
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            assert client.send(number, bunch) == len(bunch)
            answered, at = 0, 0
            while answered < BUNCH:
                client.read(5)
                assert not heard.ended and not client.closed, heard
                while len(heard.body) >= at + 5 and \
                        len(heard.body) >= (next_ := at + 5 + int.from_bytes(heard.body[at + 1:at + 5], "big")):
                    last, at, answered = at, next_, answered + 1
            assert at == len(heard.body), "more answers than questions"
            check(bytes(heard.body[last + 5:]))
            heard.body.clear()
            made += BUNCH
    return made / took


def compare(name: str, servers: dict[str, tuple[int, str]], body: Path) -> None:
    """The transports in turn; the medians, and each as a multiple of the first."""
    for pid, _ in servers.values():
        pin(pid, 0)
    for how in ("8 in flight", "64 in flight", "stream, 64"):
        seen: dict[str, list[tuple[float, float]]] = {transport: [] for transport in servers}
        for _ in range(ROUNDS):
            for transport, (pid, address) in servers.items():
                before = cpu_s(pid)
                rate = stream(address) if how.startswith("stream") else unary(address, int(how.split()[0]), body)
                warm = 0 if how.startswith("stream") or shutil.which("h2load") is None else 1
                seen[transport].append((rate, (cpu_s(pid) - before) / rate / (SECONDS + warm) * 1e6))
        first = None
        for transport, figures in seen.items():
            rate, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
            first = first or (rate, cpu)
            print(f"{name:10} {how:12} {transport:5}: {rate:8,.0f}/s, {cpu:4.0f} us of CPU each; "
                  f"{rate / first[0]:5.2f} x the rate, {first[1] / cpu:5.2f} x less CPU", flush=True)


def transports(folder: Path, iris: list[dict[str, Any]]) -> None:
    body = folder / "body"
    body.write_bytes(framed(BODY))
    with contextlib.ExitStack() as stack:
        compare("echo", {t: stack.enter_context(echo(t)) for t in TRANSPORTS}, body)
    root = make_root(folder / "transports", None, iris)
    with contextlib.ExitStack() as stack:
        there = {t: stack.enter_context(launch(root, env={"MODELYARD_TRANSPORT": t})) for t in TRANSPORTS}
        compare("sklearn LR", {t: (replica.process.pid, replica.grpc) for t, replica in there.items()}, body)


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
    asked = sys.argv[1:] or ["transports", "capture"]
    if "transports" in asked:
        transports(folder, iris)
    if "capture" in asked:
        captures(folder, iris)


def captures(folder: Path, iris: list[dict[str, Any]]) -> None:
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
    if sys.argv[1:2] == ["--echo"]:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve_echo(sys.argv[2]))
    pin(os.getpid(), -1)
    main()
