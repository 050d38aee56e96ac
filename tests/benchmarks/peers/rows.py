"""The rows of the table: what is asked of whom, and what the figures are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from tests.benchmarks.peers import load, processes
from tests.benchmarks.peers.bench import Bench, Run, ratio, show
from tests.benchmarks.peers.clients import sdk, stream
from tests.benchmarks.peers.install import NAMES
from tests.benchmarks.peers.load import CHANNEL, EIGHT, MANY, ONE, Figures, Shape
from tests.benchmarks.peers.models import of_size
from tests.benchmarks.peers.servers import Server

Seen = dict[str, Figures]


def lr(b: Bench) -> None:
    """unary gRPC, LogisticRegression, 64 in flight, one core"""
    seen = _compare(b, lr, "lr", MANY)
    for peer, least in (("kserve", 10), ("mlserver", 10), ("mlflow", 15), ("bentoml", 20)):
        _goal(b, f"calls/s, LogisticRegression, 64 in flight ÷ {peer}", f"≥ {least}", seen, peer)
    if "grpc" in b.transports:
        theirs = next((figures for label, figures in seen.items() if label.startswith("kserve")), None)
        b.goal("calls/s of the grpcio path, LogisticRegression ÷ kserve", "≥ 1.4", [
            ratio(seen.get("modelyard grpc"), theirs) if t == "grpc" else None for t in b.transports])
    peers = [figures for label, figures in seen.items() if not label.startswith("modelyard")]
    best = min(peers, key=lambda figures: figures.p99_ms, default=None)
    b.goal("p99, LogisticRegression, 64 in flight ÷ the best peer's", "≤ 0.35",
           [ratio(seen.get(f"modelyard {t}"), best, "p99_ms") for t in b.transports])


def rf(b: Bench) -> None:
    """unary gRPC, RandomForest(100), 64 in flight, one core"""
    seen = _compare(b, rf, "rf", MANY, ("kserve", "mlserver"))
    for peer in ("kserve", "mlserver"):
        _goal(b, f"calls/s, RandomForest(100) ÷ {peer}", "≥ 20", seen, peer)


def mlp(b: Bench) -> None:
    """unary gRPC, ONNX MLP of a million parameters, 64 in flight, one core"""
    seen = _compare(b, mlp, "mlp", MANY, ("kserve", "mlserver", "pytriton"))
    _goal(b, "calls/s, ONNX MLP ÷ kserve", "≥ 6", seen, "kserve")


def one(b: Bench) -> None:
    """unary gRPC, LogisticRegression, one call at a time, one core"""
    seen = _compare(b, one, "lr", ONE, ("kserve", "mlserver", "pytriton"), ("rate", "p50_ms", "p99_ms"))
    _goal(b, "p50, one call at a time ÷ kserve", "≤ 0.7", seen, "kserve", "p50_ms")


def rest(b: Bench) -> None:
    """REST, LogisticRegression, 64 connections, one core; ours and where they have it theirs: /v2"""
    model = b.models["lr"]
    names = {"modelyard h2": "modelyard REST", "modelyard grpc": "modelyard REST, aiohttp"}
    runs = [*(Run(server, "rest", MANY, names[server.label]) for server in b.ours(model)),
            *(Run(server, "rest", MANY) for server in b.others(model))]
    seen = b.measure(runs)
    own = [label for label in seen if label.startswith("modelyard")]
    show(_title(rest), seen, own)
    best = max((f for label, f in seen.items() if label not in own), key=lambda f: f.rate, default=None)
    b.goal("calls/s, REST /v2 ÷ the best peer's REST", "≥ 4", [
        ratio(seen.get(names[f"modelyard {t}"]), best) for t in b.transports])


def echo(b: Bench) -> None:
    """unary gRPC, 64 in flight, against an echo on the same transport, given the same request"""
    both = (b.models["lr"], b.models["mlp"])
    runs = [Run(server, "grpc", MANY, f"{server.label}, {model.name}'s request" if server in floor else
                f"{server.label}, {model.name}")
            for model in both for floor in (b.echoes(model),) for server in [*b.ours(model), *floor]]
    seen = b.measure(runs)
    show(_title(echo), seen)
    for model, least in ((both[0], "≥ 0.6"), (both[1], "≥ 0.45")):
        b.goal(f"calls/s, {model.name} ÷ an echo of the same bytes", least, [
            ratio(seen.get(f"modelyard {t}, {model.name}"), seen.get(f"echo {t}, {model.name}'s request"))
            for t in b.transports])
    b.goal("calls/s, mlp ÷ an echo of lr's 83 bytes", "≥ 0.45", [
        ratio(seen.get(f"modelyard {t}, mlp"), seen.get(f"echo {t}, lr's request")) for t in b.transports])


def capture(b: Bench) -> None:
    """capture on and off, 64 in flight, one core; `same`: a graph that gives back its input, so nothing hides it"""
    cases = [("lr, 83 B", b.models["lr"]), ("same, 83 B", of_size(b.models["same"], "83 B")),
             ("same, 3 KB", of_size(b.models["same"], "3 KB"))]
    runs = [Run(server, "grpc", MANY, f"{server.label}, {name}, {state}")
            for name, model in cases for state, on in (("off", False), ("on", True))
            for server in b.ours(model, f" {name} {state}", capture=on)]
    seen = b.measure(runs, lambda run: run.server.clear_spool())
    show(_title(capture), seen)
    for name, _ in cases:
        pairs = [(seen.get(f"modelyard {t}, {name}, on"), seen.get(f"modelyard {t}, {name}, off"))
                 for t in b.transports]
        b.goal(f"calls/s with capture ÷ without, {name}", "≥ 0.95", [ratio(on, off) for on, off in pairs])
        b.goal(f"p99 with capture ÷ without, {name}", "≤ 1.2", [ratio(on, off, "p99_ms") for on, off in pairs])
    for run in runs:
        if run.server.spool is not None:
            answered, recorded = run.server.counted()
            print(f"{run.label}: {answered:,} calls answered, {recorded:,} recorded")


def cold(b: Bench) -> None:
    """cold start to the first right answer, and memory of the tree after 64 in flight, LogisticRegression"""
    model, seen = b.models["lr"], dict[str, list[tuple[float, float, float]]]()
    b.close()
    for _ in range(b.rounds):
        makers: list[Callable[[], list[Server]]] = [
            *(lambda t=t: b.ours(model, " cold", (t,)) for t in b.transports),
            *(lambda name=name: b.others(model, (name,)) for name in ("kserve", "mlserver"))]
        for server in (server for make in makers for server in make()):
            wire = server.wires["grpc"]
            load.run([wire], MANY, 1.0, server.pids, b.folder, wire.check())
            seen.setdefault(server.label, []).append((server.first_s, *processes.memory_mib(server.pids)))
            b.stop(server)
    print(f"\n### {_title(cold)}\n\n| server | s | PSS MiB | RSS MiB |\n|---|---:|---:|---:|")
    medians = {label: [statistics.median(column) for column in zip(*rows, strict=True)] for label, rows in seen.items()}
    for label, (seconds, pss, rss) in medians.items():
        print(f"| {label} | {seconds:.2f} | {pss:.0f} | {rss:.0f} |", flush=True)
    theirs = next((found for label, found in medians.items() if label.startswith("kserve")), None)
    own = [medians.get(f"modelyard {t}") for t in b.transports]
    for n, (what, aim) in enumerate((("cold start", "≤ 0.65"), ("memory (PSS)", "≤ 0.8"), ("memory (RSS)", "≤ 0.8"))):
        b.goal(f"{what} ÷ kserve", aim, [mine[n] / theirs[n] if mine and theirs else None for mine in own])


def cores(b: Bench) -> None:
    """a second core, which h2load shares: one replica, whose h2 has a thread of its own, and two; LogisticRegression"""
    if "h2" not in b.transports or len(processes.CORES) < 2:
        return b.leave_out("the second core", "it needs two cores, and a transport with a thread of its own: h2")
    model = b.models["lr"]
    ways = [("one replica on one core", b.ours(model, "", ("h2",)), processes.CLIENT),
            ("one replica on two cores", b.ours(model, " both", ("h2",), cores=processes.ALL), processes.ALL),
            ("two replicas on two cores", b.ours(model, " twice", ("h2",), replicas=2, cores=processes.ALL),
             processes.ALL)]
    runs = [Run(server, "grpc", shape, f"{way}, {name}", client)
            for name, shape in (("8 connections", MANY), ("1 connection", CHANNEL)) for way, found, client in ways
            for server in found if shape.connections > 1 or not server.replicas]
    seen = b.measure(runs)
    show(_title(cores), seen)
    for way, name, least in ((ways[2][0], "8 connections", "≥ 1.6"), (ways[1][0], "1 connection", "≥ 1.3")):
        b.goal(f"calls/s, {way} ÷ one core, {name}", least,
               [ratio(seen.get(f"{way}, {name}"), seen.get(f"{ways[0][0]}, {name}"))])


def tensors(b: Bench) -> None:
    """64 KiB in and out, 8 in flight, one core, against an echo on the same transport"""
    model = of_size(b.models["same"], "64 KiB")
    runs = [Run(server, "grpc", EIGHT) for server in [*b.ours(model, " 64"), *b.echoes(model)]]
    seen = b.measure(runs)
    show(_title(tensors), seen)
    b.goal("calls/s, 64 KiB ÷ an echo", "≥ 0.7", [ratio(seen.get(f"modelyard {t}"), seen.get(f"echo {t}"))
                                                  for t in b.transports])


def _compare(b: Bench, row: Callable[[Bench], None], name: str, shape: Shape,
             only: Sequence[str] = NAMES, of: Sequence[str] = ("rate", "p99_ms", "cpu_us")) -> Seen:
    """Ours by gRPC against the peers, by gRPC where they have it."""
    model = b.models[name]
    found = [*b.ours(model), *b.others(model, only)]
    seen = b.measure([Run(server, "grpc" if "grpc" in server.wires else "rest", shape) for server in found])
    show(_title(row), seen, [f"modelyard {t}" for t in b.transports], of)
    return seen


def _goal(b: Bench, what: str, aim: str, seen: Seen, peer: str, of: str = "rate") -> None:
    theirs = next((figures for label, figures in seen.items() if label.startswith(peer)), None)
    b.goal(what, aim, [ratio(seen.get(f"modelyard {t}"), theirs, of) for t in b.transports])


def _title(row: Callable[[Bench], None]) -> str:
    return (row.__doc__ or "").strip()


ROWS: dict[str, Callable[[Bench], None]] = {
    row.__name__: row for row in (lr, one, rest, rf, mlp, echo, capture, cold, cores, tensors, stream, sdk)}
"""In an order in which servers are used again."""
