"""``python -m tests.simulator FIRST [END]``: plays seeds, tells of each that went wrong, ends with 1 if one did."""

from __future__ import annotations

import sys
import time

from .run import simulate


def main(first: int, end: int) -> int:
    began, bad, steps, events = time.monotonic(), 0, 0, 0
    for seed in range(first, end):
        outcome = simulate(seed)
        steps, events = steps + outcome.steps, events + outcome.events
        if outcome.problems:
            bad += 1
            print(outcome.told(), flush=True)
    print(f"seeds {first} to {end - 1}: {bad} wrong, {events} events, {steps} steps, "
          f"{time.monotonic() - began:.1f} s", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    numbers = [int(arg) for arg in sys.argv[1:]]
    sys.exit(main(numbers[0], numbers[1] if len(numbers) > 1 else numbers[0] + 1))
