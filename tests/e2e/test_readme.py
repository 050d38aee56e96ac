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

from tests.backends import need
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

    def start(self, line: str) -> None:
        log = (self.home / "serve.log").open("ab")
        self.started.append(subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=ROOT, env=self.env, stdout=log,
                                             stderr=log, stdin=subprocess.DEVNULL))

    def background(self, line: str, url: str) -> None:
        self.start(line)

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
        if mark in (" apart", " stack", " distributed", " compose", " composed", " signed", " export", " own"):
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


PORTS = {"registry": 8701, "image-builder": 8702, "deployer": 8703, "telemetry": 8705}


def serve_apart(shell: Shell, block: str) -> None:
    """Each line of the block in the background, then every one of the services is asked for all of the yard."""
    del shell.env["MODELYARD_PORT"]
    for line in commands(block):
        if (name := line.split()[2]) in PORTS:
            shell.background(line, f"http://127.0.0.1:{PORTS[name]}")
        else:
            shell.start(line)
    for port in PORTS.values():
        shell.env["MODELYARD_URL"] = f"http://127.0.0.1:{port}"
        shell.run("modelyard deployments list && modelyard models list && modelyard images list")


def blocks(mark: str) -> str:
    (block,) = [block for _, found, block in BLOCKS if found == f" {mark}"]
    return block


def test_services_apart(shell: Shell) -> None:
    serve_apart(shell, blocks("apart"))


def test_distributed_natively(shell: Shell, tmp_path: Path) -> None:
    """As it is written, but on the servers that this run of the tests has: `make stack` would start others."""
    for name in ("kafka", "mongo", "azure", "registry"):
        need(name)
    make, settings, doctor = commands(blocks("stack"))
    assert make == "make stack"
    toml = str(tmp_path / "modelyard.toml")
    shell.run(settings.replace(".stack/modelyard.toml", toml))
    mended = Path(toml).read_text().replace("/modelyard\"", f"/readme-{os.getpid()}\"")
    Path(toml).write_text(mended.replace("/?replicaSet", f"/readme-{os.getpid()}?replicaSet"))
    assert all(f"{scheme}://" in mended for scheme in ("kafka", "mongodb", "azure", "oci"))
    serve_apart(shell, blocks("distributed").replace(".stack/modelyard.toml", toml))
    shell.env["MODELYARD_URL"] = "http://127.0.0.1:8701"
    shell.run("modelyard deploy demo/tour --name adder")
    assert "6" in shell.run("modelyard score adder --data '{\"data\": [[1, 2, 3]]}'")
    assert "built" in shell.run("modelyard events list --type 'image.*'")
    shell.run(doctor.replace(".stack/modelyard.toml", toml))
    shell.run("modelyard deployments delete adder --wait")
