"""A whole Modelyard for a test: the real programs, all-in-one or one process a service, on free ports.

``Yard.start("all-in-one")``, ``"apart"`` and ``"distributed"`` (apart, on Kafka, MongoDB, Azure blobs and a container
registry) give the same thing to a test: URLs, an SDK client and a data folder. ``stop`` ends what was started, by pid,
and says what was left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelyard.adapters import urls
from tests.backends import MATRIX, url_of

SERVICES = ("registry", "image-builder", "deployer", "telemetry")
PROFILES = ("all-in-one", "apart", "distributed")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def distributed(folder: Path) -> dict[str, str]:
    """Settings of a yard's own corner of the real servers. Skips the test when one is not here, or fails it."""
    ports = {"STORE": "store", "BUS": "bus", "BLOBS": "blobs", "IMAGES": "images"}
    return {f"MODELYARD_{name}": url_of(MATRIX[port][1], folder) for name, port in ports.items()}


def until(what: Callable[[], Any], seconds: float = 30.0, every: float = 0.05, why: str = "") -> Any:
    """Asks until the answer is true, and gives it; fails with the last answer when the time is over."""
    end = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < end, f"not within {seconds} s: {why or what}; last answer {answer!r}"
        time.sleep(every)
    return answer


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Yard:
    data: Path
    profile: str
    ports: dict[str, int]
    env: dict[str, str]
    program: tuple[str, ...] = ("-m", "modelyard")
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @classmethod
    def start(cls, profile: str, data: Path, services: tuple[str, ...] = SERVICES, *,
              program: tuple[str, ...] = ("-m", "modelyard"), **env: str) -> Yard:
        names = ("all",) if profile == "all-in-one" else services
        ports = {name: free_port() for name in names}
        settings = dict(os.environ, MODELYARD_DATA=str(data), ORT_DISABLE_TELEMETRY="1")
        if profile == "distributed":
            settings |= distributed(data)
        settings |= env
        if profile != "all-in-one":
            urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
            settings["MODELYARD_SERVICES"] = json.dumps(urls)
        yard = cls(data, profile, ports, settings, program)
        try:
            for name in names:
                yard.launch(name)
            for name in names:
                yard.wait_ready(name, 120.0)  # a broker makes dozens of topics first; one that ends is seen at once
        except BaseException:
            yard.stop()  # nobody else knows of them
            raise
        return yard

    def launch(self, name: str) -> None:
        services = [] if name == "all" else [name]
        self.data.mkdir(parents=True, exist_ok=True)
        log = (self.data.parent / f"{self.data.name}-{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [sys.executable, *self.program, "serve", *services, "--port", str(self.ports[name])],
            env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()

    def wait_ready(self, name: str, seconds: float = 30.0) -> None:
        def ready() -> bool:
            assert self.processes[name].poll() is None, f"{name} ended: {self.log(name)[-2000:]}"
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.call("GET", "/readyz", service=name).status == 200
            return False

        until(ready, seconds, why=f"{name} ready")

    def log(self, name: str) -> str:
        return (self.data.parent / f"{self.data.name}-{name}.log").read_text(errors="replace")

    def url(self, service: str | None = None) -> str:
        return f"http://127.0.0.1:{self.ports.get(service or '', next(iter(self.ports.values())))}"

    def call(self, method: str, path: str, body: Any = None, *, service: str | None = None,
             headers: dict[str, str] | None = None, timeout: float = 60.0) -> Answer:
        """One HTTP call. ``body``: bytes go as octet-stream, anything else as JSON. Any status is an answer."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        request = urllib.request.Request(self.url(service) + path, raw, method=method,
                                         headers={"content-type": kind, **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def cli(self, *args: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """The command line, as a user would run it against this yard."""
        done = subprocess.run([sys.executable, "-m", "modelyard", *args], capture_output=True, text=True, timeout=180,
                              env={**self.env, "MODELYARD_URL": self.url()}, stdin=subprocess.DEVNULL, cwd=cwd)
        assert not check or done.returncode == 0, f"modelyard {' '.join(args)}: {done.stdout}{done.stderr}"
        return done

    def kill(self, name: str) -> None:
        process = self.processes[name]
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    def restart(self, name: str) -> None:
        self.launch(name)
        self.wait_ready(name)

    def replicas(self) -> list[int]:
        """Pids of everything that runs out of this data folder beside the services themselves."""
        return [pid for pid in running_under(self.data) if pid not in {p.pid for p in self.processes.values()}]

    def blob_sizes(self) -> list[int]:
        """Of everything in this yard's blob store; in a folder, of what is being written as well."""
        folder = self.data / "blobs"
        if "MODELYARD_BLOBS" not in self.env:
            return [p.stat().st_size for p in folder.rglob("*") if p.is_file()]

        async def look() -> list[int]:
            blobs = await urls.open_blobs(self.env["MODELYARD_BLOBS"])
            try:
                return [blob.size async for blob in blobs.list()]
            finally:
                await blobs.close()

        return asyncio.run(look())

    def stop(self, seconds: float = 40.0) -> list[int]:
        """SIGTERM to all; what still runs out of the data folder afterwards is given back, and then ended."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        left = self.replicas()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while self.replicas() and time.monotonic() < end:
            time.sleep(0.1)
        for pid in self.replicas():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left


def running_under(folder: Path) -> list[int]:
    """Pids of the processes whose command line or working directory names ``folder``."""
    found, mark = [], str(folder).encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            inside = mark in (entry / "cmdline").read_bytes() or os.readlink(entry / "cwd").encode().startswith(mark)
            if state != "Z" and inside:
                found.append(int(entry.name))
    return found
