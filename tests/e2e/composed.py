"""A user's checkout for the compose test: its .env, the engine that it is started on, and somebody who calls."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker

from infra.stack import compose
from infra.stack.docker import Docker
from infra.stack.server import ROOT
from modelyard import Client
from tests.e2e.yard import until


@dataclass
class Stack:
    """A user's checkout with its .env, and the engine that it is started on."""

    checkout: Path
    server: Docker
    ports: dict[str, int]
    token: str = ""

    def compose(self, *args: str, check: bool = True, env: bool = True) -> subprocess.CompletedProcess[str]:
        own = {"PATH": os.environ["PATH"], "HOME": str(self.checkout.parent), "DOCKER_HOST": self.server.docker_host}
        given = () if env else ("--env-file", "/dev/null")
        done = subprocess.run([str(compose.program()), "--progress", "quiet", *given, *args], cwd=self.checkout,
                              env=own, capture_output=True, text=True, timeout=420, stdin=subprocess.DEVNULL)
        assert not check or done.returncode == 0, f"docker compose {' '.join(args)}:\n{done.stdout}{done.stderr}"
        return done

    def user(self, line: str) -> str:
        """A line of the README, by somebody who has the token."""
        env = {**os.environ, "MODELYARD_URL": self.url, "MODELYARD_TOKEN": self.token, "HOME": str(self.checkout),
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", line], cwd=self.checkout, env=env, capture_output=True, text=True,
                              timeout=300, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout + done.stderr

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "40", check=False).stdout[-12000:]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['REGISTRY']}"

    def client(self) -> Client:
        return Client(self.url, token=self.token)

    def running(self) -> dict[str, Any]:
        """Service → container, of those that run; whatever no service has is under its own name."""
        client = docker.DockerClient(self.server.docker_host)
        try:
            found = client.containers.list()
            return {one.labels.get("com.docker.compose.service", one.name): one.attrs for one in found}
        finally:
            client.close()


def checkout(folder: Path) -> Path:
    """What a user has cloned: of this tree what the images are built from and compose reads."""
    for name in ("docker-compose.yml", ".dockerignore", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("services", "infra/docker", "infra/compose", "demo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.whl"))
    return folder


def settle(stack: Stack, folder: Path, script: str) -> None:
    """Writes .env by ``script``, as the README says, and what is other for a test: ports, and a folder of its own."""
    env = {**os.environ, "YARD_DOCKER_SOCKET": str(stack.server.socket)}
    subprocess.run(["bash", "-c", script], cwd=stack.checkout, env=env, check=True, timeout=60)
    file = stack.checkout / ".env"
    assert file.stat().st_mode & 0o077 == 0
    stack.token = dict(line.split("=", 1) for line in file.read_text().split())["MODELYARD_TOKEN"]
    with file.open("a") as out:
        out.write(f"YARD_FOLDER={folder}\nYARD_KAFKA_HEAP=-Xmx512m -Xms128m\n")
        out.writelines(f"YARD_{name}_PORT={port}\n" for name, port in stack.ports.items())
    image_builder = ""
    if authorities := os.environ.get("SSL_CERT_FILE"):  # whom this machine trusts: as a company's own index needs it
        image_builder = (f'  image-builder: {{environment: {{SSL_CERT_FILE: /authorities.crt}}, '
                         f'volumes: ["{authorities}:/authorities.crt:ro"]}}\n')
    (stack.checkout / "docker-compose.override.yml").write_text(
        f"services:\n  azurite: {{build: !reset null}}  # a stand-in is there\n{image_builder}")


def ask(url: str, body: Any = None, token: str = "") -> tuple[int, bytes]:
    raw = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, raw, headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def call(rest: str) -> str:
    """What comes of one call of a deployment: its status, ``refused``, or ``cut``: it was let in and not answered."""
    try:
        return str(ask(f"{rest}/score", {"data": [[1, 2, 3]]})[0])
    except urllib.error.URLError as error:
        return "refused" if isinstance(error.reason, ConnectionRefusedError) else "cut"
    except (OSError, http.client.HTTPException):
        return "cut"


class Caller:
    """Calls a deployment again and again, and counts what came of it; ``away``: for how long it did not answer."""

    def __init__(self, rest: str) -> None:
        self.rest, self.told, self.away = rest, Counter[str](), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        gone = 0.0
        while not self._stop.wait(0.02):
            told = call(self.rest)
            self.told[told] += 1
            if told != "200":
                gone = gone or time.monotonic()
            elif gone and not self.away:
                self.away = time.monotonic() - gone

    def __enter__(self) -> Caller:
        self._thread.start()
        until(lambda: self.told["200"] > 3, 20)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
