"""What capture costs a call, and how fast ingest takes records in.

    python tests/benchmarks/bench_capture.py [ratio] [append] [ingest]

``ratio``: two servers of the same model with gRPC over HTTP/2, one that captures (with its shipper) and one that does
not, on one core, called in turn by ``h2load`` (Debian: nghttp2-client) on the other. Each round gives one ratio; the
medians are printed. Read the ratios, and the CPU of a call, which is the steadiest figure on a machine with other work.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import skops.io
from sklearn.linear_model import LogisticRegression

from modelyard.adapters.blobs_dir import DirGrants
from modelyard.core.inference import Inference, write_request
from modelyard.core.tensors import Tensor
from modelyard.scoring.capture import CaptureLog, Finished
from modelyard.telemetry.model import Segment
from tests.raw_h2 import framed
from tests.unit.scoring.roots import Replica, launch, make_root
from tests.unit.telemetry.bench import NOON, Life, bench

ABOUT = {"workspace": "default", "deployment": "iris", "image": "iris-scorer:7", "models": ["iris:4"]}
KIND = "application/grpc+proto"
METHOD = "/inference.GRPCInferenceService/ModelInfer"
ROUNDS, SECONDS, CONNECTIONS = 21, 1, 8
SIZES = {"83 B": 4, "3 KB": 380}
"""Features of a row (FP64) that make a message of about this size."""


class Figures(NamedTuple):
    """Of one round: calls a second, milliseconds, microseconds of the server's CPU for a call."""

    rate: float
    p50: float
    p99: float
    cpu: float


def pin(pid: int, core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(task), {cores[core]})


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def called(replica: Replica, body: Path, in_flight: int) -> Figures:
    """One round against one server."""
    log = body.with_suffix(".log")
    log.unlink(missing_ok=True)
    before = cpu_s(replica.process.pid)
    told = subprocess.run(
        ["h2load", "-t1", "-c", str(CONNECTIONS), "-m", str(in_flight // CONNECTIONS), "-D", str(SECONDS), "-d", body,
         f"--log-file={log}", "-H", "content-type: application/grpc", "-H", "te: trailers",
         f"http://{replica.grpc}{METHOD}"], capture_output=True, text=True, check=True).stdout
    cpu = cpu_s(replica.process.pid) - before
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    assert lines and all(status == "200" for _, status, _ in lines), told
    times = sorted(int(taken) for _, _, taken in lines)
    return Figures(len(times) / SECONDS, times[len(times) // 2] / 1000, times[len(times) * 99 // 100] / 1000,
                   cpu / len(times) * 1e6)


@contextlib.contextmanager
def shipping(root: Path, spool: Path, blobs: Path) -> Iterator[None]:
    """The shipper of a spool, as it runs beside a replica."""
    url = asyncio.run(DirGrants(blobs).lend("default", "iris", 3600))
    base = getattr(sys, "_base_executable", sys.executable)
    with subprocess.Popen([base, "-I", "-S", str(root / "launch.py"), "ship", "--spool", str(spool), "--grant", url],
                          env={"PATH": os.environ["PATH"]}) as process:
        try:
            yield
        finally:
            process.kill()


def ratio(size: str, folder: Path, in_flight: int = 64) -> str:
    """Capture on against off, in turn."""
    dice = np.random.default_rng(1)
    x = dice.normal(size=(200, SIZES[size]))
    skops.io.dump(LogisticRegression(max_iter=50).fit(x, x[:, 0] > 0), folder / "model.skops")
    root = make_root(folder / "root", None, [
        {"name": "iris", "version": 1, "file": folder / "model.skops", "framework": "scikit-learn"}])
    wire = write_request(Inference("iris", tensors=[Tensor("x", x[:1])]))
    body, spool = folder / "body", folder / "spool"
    body.write_bytes(framed(wire))
    spool.mkdir()
    env = {"MODELYARD_TRANSPORT": "h2"}
    with launch(root, env=env) as off, launch(root, env=env, spool=spool, capture={"enabled": True}) as on, \
            shipping(root, spool, folder / "blobs"):
        for replica in (off, on):
            pin(replica.process.pid, 0)
            called(replica, body, in_flight)
        seen = []
        for number in range(ROUNDS):  # who goes first changes too
            pair = [(name, called(replica, body, in_flight))
                    for name, replica in (("off", off), ("on", on))[::1 if number % 2 else -1]]
            seen.append(dict(pair))
    offs, ons = ([one[name] for one in seen] for name in ("off", "on"))
    before, after = (Figures(*map(statistics.median, zip(*figures, strict=True)))
                                    for figures in (offs, ons))
    times = Figures(*(statistics.median(b[n] / a[n] for a, b in zip(offs, ons, strict=True)) for n in range(4)))
    return (f"capture on/off, {len(wire)} B, {in_flight} in flight: {times.rate:.3f} x the rate "
            f"({before.rate:,.0f} -> {after.rate:,.0f}/s), {times.p99:.2f} x the p99 "
            f"({before.p99:.2f} -> {after.p99:.2f} ms), "
            f"{times.p50:.2f} x the p50, CPU of a call {before.cpu:.1f} -> {after.cpu:.1f} us ({1 / times.cpu:.3f})")


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


def main(asked: list[str]) -> None:
    if not asked or "ratio" in asked:
        pin(os.getpid(), -1)
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                print(ratio(size, Path(folder)), flush=True)
    if not asked or "append" in asked:
        for length, calls in ((83, 50_000), (2048, 20_000), (65_536, 1000)):
            print(append(length, calls), flush=True)
    if not asked or "ingest" in asked:
        for length, records in ((83, 40_000), (2048, 4000)):
            print(asyncio.run(ingest(length, records)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
