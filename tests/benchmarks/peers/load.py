"""Load by h2load: gRPC is an HTTP/2 POST of a length-prefixed message, REST is HTTP/1.1 with kept connections.

h2load does not read ``grpc-status``; a refused gRPC call has no body, so the bytes that came are held against those
that a right answer has, call by call on average.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tests.benchmarks.peers import processes
from tests.benchmarks.peers.wires import Wire, Wrong

BROKEN, SLACK = 0.01, 0.03
"""Of the calls may fail, and by so much of the bytes may answers differ from a right one, beside what was under way
when the time was up."""


@dataclass(frozen=True)
class Shape:
    """Connections, and calls under way on each."""

    connections: int
    streams: int = 1


ONE, EIGHT, MANY, CHANNEL = Shape(1), Shape(8), Shape(8, 8), Shape(1, 64)


@dataclass(frozen=True)
class Figures:
    """``cpu_us``: of the server's processes, a call. ``others``: cores that neither the server nor h2load used."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    others: float

    @classmethod
    def median(cls, runs: Sequence[Figures]) -> Figures:
        return cls(*(statistics.median(getattr(run, f.name) for run in runs) for f in fields(cls)))


def run(wires: Sequence[Wire], shape: Shape, seconds: float, pids: Sequence[int], folder: Path, reply: int,
        cores: str = processes.CLIENT) -> Figures:
    """Calls for so long, the connections shared out over the addresses. ``reply`` is a right answer's length. Raises
    Wrong when not all were answered so."""
    body, logs = folder / "request", [folder / f"calls.{n}" for n in range(len(wires))]
    body.write_bytes(wires[0].body)
    for log in logs:
        log.unlink(missing_ok=True)
    share = Shape(max(1, shape.connections // len(wires)), shape.streams)
    before, machine, own = processes.cpu_s(pids), processes.machine_s(), _children_s()
    clients = [subprocess.Popen(["taskset", "-c", cores, *_command(wire, share, seconds, body, log)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for wire, log in zip(wires, logs, strict=True)]
    said = [client.communicate(timeout=seconds + 30) for client in clients]
    used = processes.cpu_s(pids) - before
    others = processes.machine_s() - machine - used - (_children_s() - own)
    calls, rate = 0, 0.0
    for client, (out, err) in zip(clients, said, strict=True):
        if client.returncode or "finished in" not in out:
            raise Wrong(f"h2load: {(err or out).strip()[-160:]}")
        done, each = _read(out, reply, share)
        calls, rate = calls + done, rate + each
    took = sorted(int(line.rsplit("\t", 1)[1]) for log in logs for line in log.read_text().splitlines())
    return Figures(rate, took[len(took) // 2] / 1e3, took[len(took) * 99 // 100] / 1e3, used / calls * 1e6,
                   max(0.0, others) / seconds)


def _command(wire: Wire, shape: Shape, seconds: float, body: Path, log: Path) -> list[str]:
    if wire.kind == "rest":  # HTTP/1.1 has no streams
        shape = Shape(shape.connections * shape.streams)
    headers = [part for key, value in wire.headers.items() for part in ("-H", f"{key}: {value}")]
    return ["h2load", f"-c{shape.connections}", f"-m{shape.streams}", f"-D{seconds * 1000:.0f}ms", "-d", str(body),
            f"--log-file={log}", *headers, *(["--h1"] if wire.kind == "rest" else []),
            f"http://{wire.address}{wire.path}"]


def _read(said: str, reply: int, shape: Shape) -> tuple[int, float]:
    """(calls, calls a second) of a run. Raises Wrong."""
    rate = float(_one(r"finished in [^,]*, ([\d.]+) req/s", said))
    done, failed = int(_one(r"(\d+) done", said)), int(_one(r"(\d+) failed", said))
    good, data = int(_one(r"(\d+) 2xx", said)), int(_one(r"\((\d+)\) data", said))
    if not good:
        raise Wrong("no call was answered")
    under_way = shape.connections * shape.streams
    if failed > done * BROKEN + under_way or abs(data - good * reply) > reply * (good * SLACK + under_way):
        raise Wrong(f"{failed} of {done} calls failed; {data / good:.0f} bytes an answer, right is {reply}")
    return good, rate


def _one(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if not found:
        raise Wrong(f"h2load does not say {pattern}")
    return found[1]


def _children_s() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
