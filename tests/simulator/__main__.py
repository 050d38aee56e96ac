"""``python -m tests.simulator FIRST [END]``: plays seeds, tells of each that went wrong, ends with 1 if one did."""

from __future__ import annotations

import argparse
import os
import sys
import time

from .run import simulate


def main(first: int, end: int) -> int:
    began, bad, steps, events = time.process_time(), 0, 0, 0
    for seed in range(first, end):
        outcome = simulate(seed)
        steps, events = steps + outcome.steps, events + outcome.events
        if outcome.problems:
            bad += 1
            print(outcome.told(), flush=True)
        elif end - first == 1:
            print(f"trace {outcome.trace}", flush=True)
    print(f"seeds {first} to {end - 1}: {bad} wrong, {events} events, {steps} steps, "
          f"{time.process_time() - began:.1f} s of CPU", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of text are walked alike in every run
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulator", *sys.argv[1:]],
                  {**os.environ, "PYTHONHASHSEED": "0"})
    told = argparse.ArgumentParser("python -m tests.simulator", description="Plays seeds; 1 if one went wrong.")
    told.add_argument("first", type=int, help="the first seed; alone, its trace is shown")
    told.add_argument("end", type=int, nargs="?", help="the seed behind the last")
    asked = told.parse_args()
    sys.exit(main(asked.first, asked.first + 1 if asked.end is None else asked.end))
