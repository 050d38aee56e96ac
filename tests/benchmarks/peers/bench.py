"""Servers that run, rounds that take turns, and the tables that come of them."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.peers import install, load, models, processes, servers
from tests.benchmarks.peers.install import NotHere, one_line
from tests.benchmarks.peers.load import Figures, Shape
from tests.benchmarks.peers.models import Model
from tests.benchmarks.peers.servers import Server
from tests.benchmarks.peers.wires import Wrong

TRANSPORTS = ("h2", "grpc")
WARM_S = 0.3


@dataclass(frozen=True)
class Run:
    """One line of a table: a server, asked in one way. ``name`` stands in the table, "": the server's own."""

    server: Server
    wire: str
    shape: Shape
    name: str = ""
    cores: str = processes.CLIENT

    @property
    def label(self) -> str:
        return self.name or self.server.label


@dataclass
class Bench:
    """``peers``, ``transports``: what is compared. ``left_out``: why somebody is not. ``goals``: the last table."""

    folder: Path
    peers: Sequence[str]
    transports: Sequence[str]
    seconds: float
    rounds: int
    left_out: dict[str, str] = field(default_factory=dict)
    goals: list[tuple[str, str, list[str]]] = field(default_factory=list)
    _running: dict[str, Server] = field(default_factory=dict)
    _wanted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.models = models.make(servers.fresh(self.folder / "models"))

    def ours(self, model: Model, tag: str = "", only: Iterable[str] = TRANSPORTS, **how: Any) -> list[Server]:
        """Our server on each transport. ``tag`` tells those apart that differ in ``how``."""
        return self._present(self._server(
            f"modelyard {t} {model.name}{tag}", lambda place, t=t: servers.ours(model, place, t, **how))
            for t in self.transports if t in only)

    def echoes(self, model: Model) -> list[Server]:
        """The floor of each transport, given that model's request."""
        back = replace(model, answer=model.rows)
        return self._present(self._server(
            f"echo {t} {model.name}", lambda place, t=t: servers.echo(back, place, t))
            for t in self.transports)

    def others(self, model: Model, only: Iterable[str] = install.NAMES) -> list[Server]:
        """The peers of these names that can serve the model."""
        found = [install.find(name) for name in only if name in self.peers and name not in self.left_out]
        return self._present(self._server(
            f"{peer.name} {model.name}", lambda place, peer=peer: servers.other(peer, model, place), peer.name)
            for peer in found if model.name in peer.models)

    def _present(self, found: Iterable[Server | None]) -> list[Server]:
        return [server for server in found if server is not None]

    def _server(self, key: str, make: Callable[[Path], Server], name: str = "") -> Server | None:
        self._wanted.add(key)
        if key in self._running:
            return self._running[key]
        server = None
        try:
            server = self._running[key] = make(servers.fresh(self.folder / key.replace(" ", "-")))
            server.wait()
            return server
        except NotHere as exc:
            self.leave_out(name or key, str(exc))
            if server is not None:
                self._running.pop(key).stop()
            return None

    def leave_out(self, name: str, why: str) -> None:
        """Says it once, and goes on without."""
        if name not in self.left_out:
            self.left_out[name] = why
            print(f"{name} is left out: {why}", flush=True)

    def measure(self, runs: Sequence[Run], each: Callable[[Run], None] = lambda run: None) -> dict[str, Figures]:
        """Medians of rounds in which all take turns; who does not answer rightly is left out of it. ``each``: before
        every run."""
        seen: dict[str, list[Figures]] = {run.label: [] for run in runs}
        for n in range(-1, self.rounds):  # the first is to get warm
            for run in [r for r in runs if r.label in seen]:
                try:
                    each(run)
                    figures = self._once(run, self.seconds if n >= 0 else WARM_S)
                    if n >= 0:
                        seen[run.label].append(figures)
                except (Wrong, OSError) as exc:
                    del seen[run.label]
                    print(f"{run.label} is left out of this row: {one_line(str(exc))}", flush=True)
        return {label: Figures.median(figures) for label, figures in seen.items()}

    def _once(self, run: Run, seconds: float) -> Figures:
        """One run between two answers that a real client looks at. Raises Wrong, OSError."""
        wire = run.server.wires[run.wire]
        reply = wire.check()
        wires = run.server.replicas or [wire]
        figures = load.run(wires, run.shape, seconds, run.server.pids, self.folder, reply, run.cores)
        wire.check()
        return figures

    def goal(self, what: str, aim: str, values: Sequence[float | None]) -> None:
        """A line of the last table; a value for each transport, None where it could not be had."""
        self.goals.append((what, aim, ["–" if value is None else f"{value:.2f}" for value in values]))

    def row_done(self) -> None:
        """Ends what the row that began last did not ask for, so that it does not disturb the next."""
        for key in [k for k in self._running if k not in self._wanted]:
            self._running.pop(key).stop()
        self._wanted.clear()

    def stop(self, server: Server) -> None:
        """Ends one now."""
        for key in [k for k, running in self._running.items() if running is server]:
            del self._running[key]
        server.stop()

    def close(self) -> None:
        for server in self._running.values():
            with contextlib.suppress(OSError):
                server.stop()
        self._running.clear()


def ratio(a: Figures | None, b: Figures | None, of: str = "rate") -> float | None:
    """The first's figure over the second's."""
    if a is None or b is None or not getattr(b, of):
        return None
    return float(getattr(a, of) / getattr(b, of))


def verdict(aim: str, value: str) -> str:
    """Whether a value as the table shows it meets the aim (``≥ 3``, ``≤ 0.7``), or by how much not."""
    sign, _, bound = aim.partition(" ")
    short = float(bound) - float(value) if sign == "≥" else float(value) - float(bound)
    return "goal met" if short <= 0 else f"missed by {short:.2f}"


RATIOS = {"rate": "calls/s", "p50_ms": "p50", "p99_ms": "p99", "cpu_us": "CPU"}


def show(title: str, lines: dict[str, Figures], own: Sequence[str] = (),
         of: Sequence[str] = ("rate", "p99_ms", "cpu_us")) -> None:
    """A row's table: figures, and beside each server what part or multiple of it each of ours is."""
    if not lines:
        return
    others = statistics.mean(figures.others for figures in lines.values())
    print(f"\n### {title}\nOthers used {others:.2f} cores meanwhile.\n")
    pairs = [(name, part) for name in own if name in lines for part in of]
    heads = [f"{name.split()[-1]}: {RATIOS[part]} ÷" for name, part in pairs]
    print("| server | calls/s | p50 ms | p99 ms | CPU us a call |" + "".join(f" {head} |" for head in heads))
    print("|---|" + "---:|" * (4 + len(heads)))
    for label, f in lines.items():
        cells = "".join(f" {ratio(lines[name], f, part) or 0:.2f} |" for name, part in pairs)
        print(f"| {label} | {f.rate:,.0f} | {f.p50_ms:.2f} | {f.p99_ms:.2f} | {f.cpu_us:.0f} |{cells}", flush=True)
