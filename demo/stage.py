"""What the audience sees: headings, tables, promises; and the yard that it all happens in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modelyard.cli.show import table

COLOUR = sys.stdout.isatty()
READY_S, STOP_S = 60, 45


class Broken(Exception):
    """The demo cannot go on; the message says why."""


class Story:
    """Tells the story and counts promises that were not kept."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.broken: list[str] = []

    def chapter(self, number: int, title: str) -> None:
        """A heading, with the seconds so far."""
        line = f"── {number}. {title} "
        print(f"\n{_bold(line + '─' * max(3, 92 - len(line)))} {time.monotonic() - self.began:5.1f} s", flush=True)

    def say(self, text: str) -> None:
        """A line."""
        print(text, flush=True)

    def show(self, rows: Sequence[Sequence[Any]], head: Sequence[str]) -> None:
        """A table."""
        print("\n".join("  " + line for line in table(rows, head).splitlines()), flush=True)

    def promise(self, text: str, kept: bool) -> None:
        """A promise and whether it was kept; a broken one makes the demo fail at its end."""
        mark = "✓" if kept else "✗"
        print(f"{_paint(mark, 32 if kept else 31)} {text}", flush=True)
        if not kept:
            self.broken.append(text)


def _paint(text: str, colour: int) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if COLOUR else text


def _bold(text: str) -> str:
    return _paint(text, 1)


def until(what: Callable[[], Any], seconds: float, why: str) -> Any:
    """Asks until the answer is true, and gives it back. Raises Broken when the time is over."""
    end = time.monotonic() + seconds
    while not (answer := what()):
        if time.monotonic() > end:
            raise Broken(f"not within {seconds:g} s: {why}")
        time.sleep(0.1)
    return answer


class Server:
    """``modelyard serve`` on a data folder of its own and a port that the system chose; leaving stops it all."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self._log = folder / "serve.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Server:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "modelyard", "serve", "--port", "0", "--data", str(self.data)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(), start_new_session=True)
        try:
            self.url = until(self._address, READY_S, "modelyard serve says where it answers")
            until(self._ready, READY_S, f"{self.url} is ready")
        except BaseException:
            self.stop()
            raise
        return self

    def _address(self) -> str:
        assert self._process is not None
        text = self._log.read_text(errors="replace")
        if self._process.poll() is not None:
            raise Broken(f"modelyard serve ended:\n{text[-2000:]}")
        _, found, rest = text.partition("Modelyard answers at ")
        return rest.split()[0] if found and " " in rest else ""

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.URLError:
            return False

    def cli(self, *words: str) -> str:
        """A command as a user would type it: shown, run, its stdout given back. Raises Broken when it fails."""
        print(f"$ modelyard {' '.join(words)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "modelyard", *words], stdout=subprocess.PIPE, text=True,
            env=environment(MODELYARD_URL=self.url))
        if done.returncode != 0:
            raise Broken(f"modelyard {words[0]} ended with {done.returncode}")
        return done.stdout

    def running(self) -> dict[int, str]:
        """Processes that run out of the data folder, the server itself aside: pid to command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) not in (os.getpid(), self._process and self._process.pid):
                words = _words(entry)
                if str(self.data) in words:
                    found[int(entry.name)] = words
        return found

    def replicas(self, deployment: str) -> list[int]:
        """Pids of a deployment's scoring servers."""
        run = f"/{deployment}/"
        return [pid for pid, words in self.running().items() if "launch.py serve" in words and run in words]

    def stop(self) -> dict[int, str]:
        """Ctrl-C; gives back what still runs afterwards (nothing, if all is well), after ending it too."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        left = self.running()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return left

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """The end of what the server wrote."""
        return self._log.read_text(errors="replace")[-3000:]


def _words(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def environment(**more: str) -> dict[str, str]:
    """This process's environment without settings of another yard."""
    return {k: v for k, v in os.environ.items() if not k.startswith("MODELYARD_")} | more
