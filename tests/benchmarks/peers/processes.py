"""Server processes: started on given cores, looked at as a tree, ended by their ids."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
CORES = sorted(os.sched_getaffinity(0))
SERVER, CLIENT, ALL = str(CORES[0]), str(CORES[-1]), ",".join(map(str, CORES))
BUSY = (0, 1, 2)
"""user, nice and system of /proc/stat; interrupts are nobody's."""


def start(command: Sequence[str], env: Mapping[str, str], log: Path, cores: str = SERVER) -> subprocess.Popen[bytes]:
    """A process on these cores, which writes to ``log``."""
    with log.open("ab") as out:
        return subprocess.Popen(["taskset", "-c", cores, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                cwd=log.parent, env=dict(env))


def tree(root: int) -> list[int]:
    """The process and all that came of it."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parents.setdefault(int(_stat(int(entry))[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


def cpu_s(pids: Sequence[int]) -> float:
    """Processor seconds that they used so far."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += sum(map(int, _stat(pid)[11:13]))
    return total / TICK


def memory_mib(pids: Sequence[int]) -> tuple[float, float]:
    """(PSS, RSS): what several processes share divided among them, or counted for each."""
    pss = rss = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            said = Path(f"/proc/{pid}/smaps_rollup").read_text()
            pss, rss = (n + int(said.split(name)[1].split()[0]) for n, name in ((pss, "Pss:"), (rss, "Rss:")))
    return pss / 1024, rss / 1024


def machine_s() -> float:
    """Processor seconds that anybody used so far."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(fields[n]) for n in BUSY) / TICK


def end(process: subprocess.Popen[bytes], seconds: float = 5.0) -> None:
    """SIGTERM, and SIGKILL for what is left of its tree."""
    started = {pid: _began(pid) for pid in tree(process.pid)[1:]}
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    deadline = time.monotonic() + 1.0
    while (left := [p for p, began in started.items() if began and _began(p) == began]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _began(pid: int) -> str:
    """When the process began, which with its id says which one it is; "": it has ended."""
    with contextlib.suppress(OSError):
        fields = _stat(pid)
        return "" if fields[0] == "Z" else fields[19]
    return ""


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
