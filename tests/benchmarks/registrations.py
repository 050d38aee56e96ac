"""Registrations through the whole event path: HTTP, commit, relay, bus, consumer, effect; every service a process.

    python tests/benchmarks/registrations.py [--profile distributed] [--rate 150] [--seconds 30]

Goals on two cores, on Kafka and MongoDB: 150/s for 30 s without an error, all effects there within 10 s after; at 20/s
from event to effect p50 <= 50 ms, p99 <= 250 ms. The effect is a document of a subscriber of its own, committed with
the event as its cause. `--profile embedded` runs the same on SQLite, side by side in one run with `--profile both`.

A second line tells where the time goes: CPU of each process for each registration, commits that met a Conflict, and
how much of the machine all of this and everybody else took (latencies mean little on a machine that was full).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[2]))

from infra.stack.kafka import Kafka
from infra.stack.mongo import Mongo
from modelyard.adapters import urls
from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.images_layout import LayoutImages
from modelyard.core.documents import Document
from modelyard.core.errors import AlreadyApplied, Conflict
from modelyard.core.events import Envelope
from modelyard.kernel.forward import Peers
from modelyard.kernel.run import Wakes, run_service
from modelyard.kernel.service import Context, Service
from tests.e2e.yard import Yard

NAMES = 50
TICKS = os.sysconf("SC_CLK_TCK")
ARTIFACT = b"weights"


class Effect(Document):
    """What the subscriber leaves behind: one for each event."""

    kind = "effect"


async def effect(ctx: Context, event: Envelope) -> None:
    """Tells how long ago the event's commit was stamped, once its own effect is committed."""
    with contextlib.suppress(AlreadyApplied, Conflict):
        await ctx.commit(Effect(id=event.id), cause=event.id)
        print(event.id, time.time() - event.time.timestamp(), flush=True)


async def subscribe() -> None:
    """The subscriber's process."""
    service = Service("bench", (Effect,), (), lambda ctx: (), {"model.registered": effect})
    store = await urls.open_store(os.environ["MODELYARD_STORE"], service.name)
    bus = await urls.open_bus(os.environ["MODELYARD_BUS"])
    wakes = Wakes()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ctx = Context(service.name, store, DirBlobs(root), LayoutImages(root), DirGrants(root), {}, Peers({}, ""), root,
                      wakes.wake)
        await run_service(ctx, service, bus, wakes)


class Subscriber:
    """Reads what the subscriber's process tells: event id → seconds from event to effect."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process, self.waits = process, dict[str, float]()

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            event, seconds = line.split()
            self.waits[event.decode()] = float(seconds)

    async def upto(self, count: int, seconds: float) -> float:
        """Seconds until that many effects are there; infinite when they are not in time."""
        began = time.monotonic()
        while len(self.waits) < count:
            if time.monotonic() - began > seconds:
                return float("inf")
            await asyncio.sleep(0.02)
        return time.monotonic() - began


@asynccontextmanager
async def subscriber(yard: Yard) -> AsyncIterator[Subscriber]:
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, "--subscribe", env=yard.env,
                                                   stdout=asyncio.subprocess.PIPE)
    told = Subscriber(process)
    reading = asyncio.create_task(told.read())
    try:
        yield told
    finally:
        process.kill()
        await process.wait()
        await reading


async def load(yard: Yard, rate: float, seconds: float, mark: str) -> tuple[Counter[int], list[float]]:
    """An open loop: a registration is due every 1/rate seconds, whatever became of the others → statuses, latencies."""
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    digest = f"sha256:{hashlib.sha256(ARTIFACT).hexdigest()}"
    url = yard.url("registry")

    async def one(http: aiohttp.ClientSession, n: int) -> None:
        began = time.monotonic()
        body = {"name": f"{mark}{n % NAMES}", "artifact": digest, "tags": {"n": str(n)}}
        try:
            async with http.post(url + "/v1/models", json=body) as answer:
                await answer.read()
                statuses[answer.status] += 1
        except (aiohttp.ClientError, TimeoutError):
            statuses[0] += 1
        latencies.append(time.monotonic() - began)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30),
                                     connector=aiohttp.TCPConnector(limit=0)) as http, asyncio.TaskGroup() as group:
        await http.put(f"{url}/v1/artifacts/{digest}", data=ARTIFACT,
                       headers={"content-type": "application/octet-stream"})
        began = time.monotonic()
        for n in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + n / rate - time.monotonic()))
            group.create_task(one(http, n))
    return statuses, sorted(latencies)


@dataclass(frozen=True)
class Costs:
    """What was spent up to a moment: seconds of CPU of each process, and of the machine; conflicts in the registry."""

    processes: dict[str, float]
    busy: float
    conflicts: float
    moment: float

    @classmethod
    def now(cls, yard: Yard, pids: dict[str, int]) -> Costs:
        told = yard.call("GET", "/metrics", service="registry").body.decode()
        conflicts = sum(float(line.split()[-1]) for line in told.splitlines()
                        if line.startswith("modelyard_conflicts_total{"))
        user, nice, system = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4])
        return cls({name: cpu_seconds(pid) for name, pid in pids.items()}, (user + nice + system) / TICKS, conflicts,
                   time.monotonic())

    def line(self, before: Costs, count: int) -> str:
        spent = {name: seconds - before.processes[name] for name, seconds in self.processes.items()}
        each = ", ".join(f"{name} {1000 * seconds / count:.2f}"
                         for name, seconds in sorted(spent.items(), key=lambda one: -one[1]))
        took, cores = self.moment - before.moment, os.cpu_count() or 1
        return (f"  each cost {1000 * sum(spent.values()) / count:.1f} ms of CPU ({each}) and "
                f"{(self.conflicts - before.conflicts) / count:.3f} conflicts; of {cores} cores this took "
                f"{sum(spent.values()) / took:.1f}, all that runs here {(self.busy - before.busy) / took:.1f}")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def at(sorted_: list[float], q: float) -> str:
    return f"{1000 * sorted_[min(len(sorted_) - 1, int(len(sorted_) * q))]:.1f} ms" if sorted_ else "-"


async def measure(name: str, yard: Yard, servers: dict[str, int], rate: float, seconds: float) -> None:
    async with subscriber(yard) as told:
        pids = {**servers, **{service: process.pid for service, process in yard.processes.items()},
                "subscriber": told.process.pid, "client": os.getpid()}
        await load(yard, 20, 2, "warm")
        await told.upto(40, 30)
        told.waits.clear()
        for mark, per_second, lasting in (("quiet", 20.0, 10.0), ("busy", rate, seconds)):
            before = Costs.now(yard, pids)
            statuses, latencies = await load(yard, per_second, lasting, mark)
            lag = await told.upto(int(per_second * lasting), 120)
            waits = sorted(told.waits.values())
            print(f"{name} {per_second:g}/s for {lasting:g} s: statuses {dict(statuses)}, POST p50 {at(latencies, 0.5)}"
                  f" p99 {at(latencies, 0.99)}; event to effect p50 {at(waits, 0.5)} p99 {at(waits, 0.99)}; all "
                  f"effects {lag:.1f} s after the last answer\n"
                  + Costs.now(yard, pids).line(before, int(per_second * lasting)), flush=True)
            told.waits.clear()


def run(profile: str, rate: float, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        env: dict[str, str] = {}
        servers: dict[str, int] = {}
        if profile == "distributed":
            kafka = stack.enter_context(Kafka(Path(folder) / "kafka"))
            mongo = stack.enter_context(Mongo(Path(folder) / "mongo"))
            env = {"MODELYARD_BUS": f"{kafka.url}/bench", "MODELYARD_STORE": mongo.url.replace("?", "bench?", 1)}
            servers = {server.name: server.pid() or 0 for server in (kafka, mongo)}
        else:
            env = dict.fromkeys(("MODELYARD_BUS", "MODELYARD_STORE"), f"sqlite://{folder}/data/yard.db")
        yard = Yard.start("apart", Path(folder) / "data", **env)
        stack.callback(yard.stop)
        asyncio.run(measure(profile, yard, servers, rate, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description="Registrations through the whole event path.")
    parser.add_argument("--profile", choices=("distributed", "embedded", "both"), default="distributed")
    parser.add_argument("--rate", type=float, default=150.0, help="registrations a second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--subscribe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.subscribe:
        asyncio.run(subscribe())
        return
    for profile in ("embedded", "distributed") if args.profile == "both" else (args.profile,):
        run(profile, args.rate, args.seconds)


if __name__ == "__main__":
    main()
