"""The rows that h2load cannot ask: many messages on one stream, and our own client against a plain stub loop."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np

from modelyard.wire import inference_pb2 as pb
from tests.benchmarks import bench_client, bench_scoring
from tests.benchmarks.peers import processes
from tests.benchmarks.peers.bench import Bench
from tests.benchmarks.peers.models import of_size
from tests.benchmarks.peers.wires import Wrong


def stream(b: Bench) -> None:
    """one stream, 64 messages in flight, a model that gives back its input, 83 B, one core"""
    model = of_size(b.models["same"], "83 B")

    def check(message: bytes) -> None:
        told = pb.ModelStreamInferResponse.FromString(message)
        raw = told.infer_response.raw_output_contents
        if told.error_message or not raw or not np.array_equal(np.frombuffer(raw[0], np.float32), model.rows[0]):
            raise Wrong(f"a stream answers {told.error_message or raw!r}")

    servers = b.ours(model, " stream")
    rates: dict[str, list[tuple[float, float]]] = {server.label: [] for server in servers}
    for n in range(b.rounds + 1):  # the first is to get warm
        for server in servers:
            wire = server.wires["grpc"]
            used = processes.cpu_s(server.pids)
            rate = bench_scoring.stream(wire.address, wire.body[5:], b.seconds, check)
            if n:
                rates[server.label].append((rate, (processes.cpu_s(server.pids) - used) / rate / b.seconds * 1e6))
    medians = {label: [statistics.median(column) for column in zip(*seen, strict=True)]
               for label, seen in rates.items()}
    print(f"\n### {(stream.__doc__ or '').strip()}\n\n| server | messages/s | CPU us a message |\n"
          "|---|---:|---:|")
    for label, (rate, cpu) in medians.items():
        print(f"| {label} | {rate:,.0f} | {cpu:.0f} |", flush=True)
    h2, grpc = (medians.get(f"modelyard {t}", [0.0])[0] for t in ("h2", "grpc"))
    b.goal("messages/s, one stream, 64 in flight ÷ grpcio's", "≥ 5", [
        h2 / grpc if t == "h2" and h2 and grpc else None for t in b.transports])


def sdk(b: Bench) -> None:
    """our scoring client on one core against a plain stub loop, LogisticRegression, a row an item"""
    servers = b.ours(replace(b.models["lr"], name="iris"), " sdk")
    best: dict[str, dict[str, float]] = {}
    print(f"\n### {(sdk.__doc__ or '').strip()}\n\n| server, way | items/s | CPU us an item | ÷ the loop |\n"
          "|---|---:|---:|---:|")
    for server in servers:
        seen = bench_client.measure(server.wires["grpc"].address, b.rounds)
        best[server.label] = {}
        for way, rounds in seen.items():
            rate, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            times = best[server.label][way] = statistics.median(bench_client.against_plain(seen, way))
            print(f"| {server.label}, {way} | {rate:,.0f} | {cpu * 1e6:.0f} | {times:.1f} |", flush=True)
    for way in ("infer_many", "infer_many, async"):
        for terms in ("", ", join_rows=32"):
            b.goal(f"items/s, {way}{terms} ÷ a plain stub loop", "≥ 3", [
                best.get(f"modelyard {t}", {}).get(way + terms) for t in b.transports])
