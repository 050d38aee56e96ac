"""How many cores this process was given. Standard library only."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """``MODELYARD_THREADS``, else ``OMP_NUM_THREADS`` (the local target sets it to the deployment's ``cpu``), else the
    cores that this process may use, and no more than its control group's share of time, rounded up."""
    for name in ("MODELYARD_THREADS", "OMP_NUM_THREADS"):
        given = os.environ.get(name, "")
        if given.isascii() and given.isdigit() and int(given) > 0:
            return int(given)
    return max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(share(CGROUP), 1024))))


def share(folder: Path) -> float:
    """The control group's limit in cores (version 2's file, or version 1's two); infinity: none."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return math.inf
    try:
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except ValueError:  # "max"
        return math.inf
