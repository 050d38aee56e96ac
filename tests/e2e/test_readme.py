"""The README, as a new user would follow it: every command in it is run, in order, and its Python as well."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.yard import free_port, running_under, until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)( [a-z]+)?\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


class Shell:
    """One user: a home of their own, a yard on a free port, the README's commands word for word."""

    def __init__(self, home: Path) -> None:
        port = str(free_port())
        self.home, self.started = home, list[subprocess.Popen[bytes]]()
        self.env = {**os.environ, "HOME": str(home), "MODELYARD_PORT": port, "MODELYARD_URL": f"http://127.0.0.1:{port}",
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "UV_CACHE_DIR": uv_cache()}

    def run(self, line: str, ok: bool = True) -> str:
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=240)
        assert (done.returncode == 0) == ok, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def background(self, line: str, url: str) -> None:
        log = (self.home / "serve.log").open("ab")
        self.started.append(subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=ROOT, env=self.env, stdout=log,
                                             stderr=log, stdin=subprocess.DEVNULL))

        def ready() -> bool:
            with suppress(OSError):
                return bool(urllib.request.urlopen(url + "/readyz", timeout=5).status == 200)
            return False

        until(ready, 30, why=line)

    def stop(self) -> None:
        for process in self.started:
            process.send_signal(signal.SIGTERM)
        for process in self.started:
            process.wait(40)


def uv_cache() -> str:
    """The machine's own cache: a test need not download what is there."""
    return os.environ.get("UV_CACHE_DIR") or str(Path.home() / ".cache" / "uv")


def commands(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    try:
        yield shell
    finally:
        shell.stop()
    assert running_under(tmp_path) == []


def test_tour(shell: Shell) -> None:
    for language, mark, block in BLOCKS:
        if mark == " apart":
            continue
        if language == "python":
            shell.run(f"python - <<'END'\n{block}\nEND")
        for line in commands(block) if language == "sh" else ():
            if line.startswith("export PATH"):
                continue
            if mark == " background":
                shell.background(line, shell.env["MODELYARD_URL"])
            else:
                shell.run(line, ok=mark != " fails")


def test_services_apart(shell: Shell) -> None:
    (block,) = [block for _, mark, block in BLOCKS if mark == " apart"]
    ports = {"registry": 8701, "image-builder": 8702, "deployer": 8703, "telemetry": 8705}
    del shell.env["MODELYARD_PORT"]
    for line in commands(block):
        shell.background(line, f"http://127.0.0.1:{ports[line.split()[-1]]}")
    for port in ports.values():
        shell.env["MODELYARD_URL"] = f"http://127.0.0.1:{port}"
        shell.run("modelyard deployments list && modelyard models list && modelyard images list")
