"""Long work by other programs, in a folder of its own beside what it makes. However it ends, nothing of it stays: a
signal undoes it like any error, and what a run left that was killed outright goes with the next."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GRACE_S = 30.0
"""So long a program may take to end, once asked: it may have to unmount."""
MADE = r"-[a-z0-9_]{8}"
"""What ``tempfile`` puts behind a prefix."""
MOUNTS = ("proc", "sys", "dev", "dev/pts", "run")
Told = Callable[[str], None]
"""Hears how far it is."""


@contextmanager
def workplace(to: Path, own: Collection[str], told: Told) -> Iterator[Path]:
    """A folder beside ``to`` for what will be ``to``; ``own`` are the names that are made in it."""
    with ending():
        for left in _left(to, own):
            told(f"taking away '{left}', which an earlier run left")
        place, lock = _made(to)
        try:
            yield place
        finally:
            _removed(place)
            os.close(lock)


@contextmanager
def ending() -> Iterator[None]:
    """SIGTERM and SIGHUP are an exception, with the exit code that shells give them. The first is all that is heard, so
    that undoing is not cut short."""
    heard: dict[int, Any] = {}

    def end(number: int, frame: Any) -> None:
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    ours = threading.current_thread() is threading.main_thread()
    for name in (signal.SIGTERM, signal.SIGHUP) if ours else ():
        if signal.getsignal(name) is signal.SIG_DFL:  # under nohup it stays ignored
            heard[name] = signal.signal(name, end)
    try:
        yield
    finally:
        for number, before in heard.items():
            signal.signal(number, before)


def _made(to: Path) -> tuple[Path, int]:
    """A new folder and its lock, which tells other runs that it is in use; the process's end opens it."""
    while True:
        place = Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}-"))
        with contextlib.suppress(FileNotFoundError):  # another run took it for one that was left
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks: there, nothing is taken away either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if place.exists():
                return place, lock
            os.close(lock)


def _left(to: Path, own: Collection[str]) -> Iterator[Path]:
    """Takes away work of runs that are no more, and tells of each; never what is in use, or not known as ours."""
    name = re.compile(rf"\.{re.escape(to.name)}{MADE}\Z")
    for place in sorted(path for path in to.parent.iterdir() if name.match(path.name)):
        try:
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if set(os.listdir(lock)) <= set(own) and _removed(place):
                yield place
        except OSError:
            continue
        finally:
            os.close(lock)


def _removed(place: Path) -> bool:
    """Whether all of it is gone. Nothing is deleted through a mount, which would be this machine's own."""
    if any(os.path.ismount(place / "root" / name) for name in MOUNTS):
        return False
    shutil.rmtree(place, ignore_errors=True)
    return not place.exists()


def ran(argv: Sequence[str], env: Mapping[str, str], told: Told, limit_s: float) -> tuple[int, list[str]]:
    """Runs a program that says ``I: …`` at each step; its exit code and last lines. An exception here, or the limit,
    ends it and all that it started."""
    said: deque[str] = deque(maxlen=20)
    with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", process_group=0) as process:
        late = threading.Timer(limit_s, _ended, (process,))
        late.daemon = True
        late.start()
        try:
            for line in process.stdout or ():
                said.append(line.rstrip())
                if line.startswith("I: "):
                    told(line[3:].strip().removesuffix("..."))
        except BaseException:
            _ended(process)
            raise
        finally:
            late.cancel()
    return process.returncode, list(said)


def _ended(process: subprocess.Popen[str]) -> None:
    """Asks it and its own to end, and kills what does not."""
    gone = contextlib.suppress(ProcessLookupError, PermissionError)
    with gone:
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with gone:
        os.killpg(process.pid, signal.SIGKILL)
