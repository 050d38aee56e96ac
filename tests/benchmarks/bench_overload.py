"""What good callers notice of bad ones, and what overload leaves of a server: tables, no judgement.

    python tests/benchmarks/bench_overload.py [h2] [grpc] [rest]
    SECONDS=60 ROUNDS=8 TIMES=3

Bad clients: one caller, one call at a time, for a second without them and a second beside them, in turns; the p99 of
all seconds with them over that of all without. What the clients' own doings cost the machine is part of it.
Overload: a model of 10 ms a call, ``TIMES`` as many calls as it can answer, each with a deadline, begun at their time
whatever became of those before (open loop); goodput is held against the best that callers who wait get of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import grpc
import numpy as np

from tests import bad_clients, open_loop
from tests.contract.transports import INFER, SCORE, Served, ask, serving

ROUNDS, SECONDS = int(os.environ.get("ROUNDS", "8")), float(os.environ.get("SECONDS", "60"))
TIMES = float(os.environ.get("TIMES", "3"))
DEADLINE_S, CALLERS = 1.0, 8
LARGE = np.zeros(8_192)
SLOW = "import time\ndef run(data):\n    time.sleep(0.01)\n    return data\n"
PATH = "/v2/models/flower/infer"
Call = Callable[[], None]


def rest(x: np.ndarray) -> bytes:
    tensor = {"name": "x", "datatype": "FP64", "shape": list(x.shape), "data": x.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


@contextlib.contextmanager
def caller(kind: str, served: Served) -> Iterator[Call]:
    if kind == "rest":
        connection = http.client.HTTPConnection(served.replica.http, timeout=30)

        def post() -> None:
            connection.request("POST", PATH, rest(np.zeros(1)))
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read()

        yield post
        connection.close()
        return
    with grpc.insecure_channel(served.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        infer, message = channel.unary_unary(INFER), ask()
        yield lambda: infer(message, timeout=30)


def bad(kind: str, served: Served) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    if kind == "rest":
        door, large = served.replica.http, rest(LARGE)
        return {"30 slow readers, 64 KiB": lambda: bad_clients.slow_readers_rest(door, PATH, large, 30, 20),
                "2,000 idle": lambda: bad_clients.idlers(door, 2_000, False),
                "100 a second begin and leave": lambda: bad_clients.leavers(
                    door, bad_clients.post(PATH, large, 1 << 20))}
    door, begun = served.address, bad_clients.half_streams(ask())
    return {"30 slow readers, 64 KiB": lambda: bad_clients.slow_readers(door, ask(LARGE), 30, 20),
            "2,000 idle": lambda: bad_clients.idlers(door, 2_000, True),
            "100 a second begin and leave": lambda: bad_clients.leavers(door, begun)}


def second(call: Call) -> list[float]:
    took, end = [], time.perf_counter() + 1
    while (began := time.perf_counter()) < end:
        call()
        took.append(time.perf_counter() - began)
    return took


def p99_ms(took: list[float]) -> float:
    return sorted(took)[len(took) * 99 // 100] * 1e3


def beside_bad_clients(kinds: list[str]) -> None:
    print("| server | beside | p99 alone, ms | p99 beside, ms | ratio | MiB before | with | after |\n"
          + "|---" * 8 + "|")
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder), transport(kind), score=SCORE) as served, \
                caller(kind, served) as call:
            second(call)
            for name, make in bad(kind, served).items():
                alone, beside, memory, worst = [], [], served.resident_mib(), 0.0
                for _ in range(ROUNDS):
                    alone += second(call)
                    with make():
                        beside += second(call)
                        worst = max(worst, served.resident_mib())
                print(f"| {kind} | {name} | {p99_ms(alone):.2f} | {p99_ms(beside):.2f} | "
                      f"{p99_ms(beside) / p99_ms(alone):.2f} | {memory:.0f} | {worst:.0f} | "
                      f"{served.resident_mib():.0f} |", flush=True)


async def overloaded(kind: str, served: Served) -> None:
    body = json.dumps({"data": [[0.0]]}).encode()
    load = open_loop.by_rest(f"http://{served.replica.http}/score", body, {"Content-Type": "application/json"}) \
        if kind == "rest" else open_loop.by_grpc(served.address, ask(np.zeros((1, 1))), DEADLINE_S)
    async with load as call:
        peak = (await open_loop.closed(call, CALLERS, 5)).rate
        memory = served.resident_mib()
        seen = await open_loop.offer(call, TIMES * peak, SECONDS)
        grown = served.resident_mib() - memory
    others = ", ".join(f"{n:,} {name}" for name, n in seen.outcomes.most_common() if name != "OK")
    print(f"| {kind} | {peak:.0f} | {sum(seen.outcomes.values()) / SECONDS:.0f} | {seen.rate:.0f} | "
          f"{seen.rate / peak:.2f} | {seen.quantile_s(0.99):.2f} | {others} | {grown:+.0f} |", flush=True)


def transport(kind: str) -> str:
    return "grpc" if kind == "grpc" else "h2"


def main() -> None:
    kinds = sys.argv[1:] or ["h2", "grpc", "rest"]
    beside_bad_clients(kinds)
    print(f"\nDeadlines of {DEADLINE_S:g} s, {SECONDS:g} s\n\n| server | peak/s | offered/s | answered/s | ÷ peak | "
          "p99 of those, s | others | MiB more |\n" + "|---" * 8 + "|")
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder, serving(
                Path(folder), transport(kind), score=SLOW, limits={"timeout_ms": int(DEADLINE_S * 1000)}) as served:
            asyncio.run(overloaded(kind, served))


if __name__ == "__main__":
    main()
