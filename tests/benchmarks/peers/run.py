"""Our scoring server against its peers: prints a table of ratios for each row, and the goals at the end.

    python -m tests.benchmarks.peers.run
    make bench-peers PEERS=kserve,mlserver ROWS=lr,rf SECONDS=1 ROUNDS=1 TRANSPORTS=h2
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from tests.benchmarks.peers import install, processes
from tests.benchmarks.peers.bench import TRANSPORTS, Bench, verdict
from tests.benchmarks.peers.install import NotHere
from tests.benchmarks.peers.rows import ROWS


def main() -> int:
    asked = _arguments()
    try:
        install.h2load()
        install.scoring()
    except NotHere as exc:
        print(exc)
        return 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        bench = Bench(Path(folder), asked.peers, asked.transports, asked.seconds, asked.rounds)
        _install(bench)
        if asked.install:
            return 0
        print(f"\n{platform.machine()}, {len(processes.CORES)} cores, Python {platform.python_version()}; "
              f"{asked.rounds} rounds of {asked.seconds:g} s a server, medians.", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what runs is ended then, too
        os.sched_setaffinity(0, {processes.CORES[-1]})
        try:
            for name in asked.rows:
                ROWS[name](bench)
                bench.row_done()
        finally:
            bench.close()
        _summary(bench)
    print(f"\n{time.monotonic() - began:.0f} s in all.")
    return 0


def _install(bench: Bench) -> None:
    """One after the other, so that a slow index or a small machine is not asked for everything at once."""
    for name in bench.peers:
        peer = install.find(name)
        try:
            install.install(peer)
            print(f"{peer.label}: {peer.how}", flush=True)
        except NotHere as exc:
            bench.leave_out(name, str(exc))


def _summary(bench: Bench) -> None:
    print("\n### Goals\n\n| what | goal | " + " | ".join(bench.transports) + " | |")
    print("|---|---|" + "---:|" * len(bench.transports) + "---|")
    for what, aim, values in bench.goals:
        cells = [*values, *[""] * (len(bench.transports) - len(values))]
        said = "; ".join(f"{t}: {verdict(aim, value)}" for t, value in zip(bench.transports, values, strict=False)
                         if value != "–")
        print(f"| {what} | {aim} | {' | '.join(cells)} | {said or 'not measured'} |")
    for name, why in bench.left_out.items():
        print(f"\n{name} was left out: {why}")


def _arguments() -> argparse.Namespace:
    def some(of: tuple[str, ...]) -> object:
        def read(text: str) -> list[str]:
            names = [name for name in text.replace(",", " ").split() if name]
            if unknown := [name for name in names if name not in of]:
                raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there is: {', '.join(of)}")
            return [name for name in of if name in names] if names else list(of)
        return read

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, of, means in (("peers", install.NAMES, "with whom to compare"), ("rows", tuple(ROWS), "what"),
                            ("transports", TRANSPORTS, "which of ours")):
        parser.add_argument(f"--{name}", type=some(of), default=list(of), metavar="A,B",  # type: ignore[arg-type]
                            help=f"{means}: {', '.join(of)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured in each run")
    parser.add_argument("--rounds", type=int, default=3, help="in which all take turns")
    parser.add_argument("--install", action="store_true", help="only make the peers' environments")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
