"""The supervisor's small parts: logs, children, real probes, restarts, what a replica is started with."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.supervisor import logfile, probe
from modelyard.supervisor.child import Child
from modelyard.supervisor.desired import Desired, in_bytes, read_json, write_json
from modelyard.supervisor.logfile import LogFile
from modelyard.supervisor.plan import CannotStart, environment, secret
from tests.unit.scoring.roots import command, make_root


def template(**changes: Any) -> dict[str, Any]:
    return {"image": "scorer:1", "root": "/r", "python": sys.executable, "image_env": {}, "capture": {}, "limits": {},
            "resources": {}, "env": {}, "secrets": {}, **changes}


# -- logs -------------------------------------------------------------------------------------------------------------


def test_lines_get_their_time_and_unfinished_ones_wait(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    log.feed(b"one\ntw")
    log.feed(b"o\nthree")
    assert [line.split(" ", 1)[1] for line in log.path.read_text().splitlines()] == ["one", "two"]
    log.close()
    assert log.path.read_text().endswith(" three\n") and log.reason() == "three"
    assert log.path.stat().st_mode & 0o077 == 0


def test_a_log_never_outgrows_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "LIMIT", 10_000)
    log = LogFile(tmp_path / "a.log")
    for n in range(2000):
        log.feed(b"line %d of many\n" % n)
    for _ in range(100):
        log.feed(b"x" * 1000)
    log.close()
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(sizes) == {"a.log", "a.log.1"} and all(size <= 10_000 + 2 * logfile.LINE for size in sizes.values())


def test_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "no such folder" / "a.log")
    log.feed(b"the reason\n")
    assert log.reason() == "the reason"


# -- children ---------------------------------------------------------------------------------------------------------


async def test_a_childs_output_and_end_are_seen(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "c.log")
    child = Child([sys.executable, "-c", "print('out', flush=True); raise SystemExit('why')"], {}, "/", log)
    assert await child.exited == 1
    assert list(log.last) == ["out", "why"] and log.reason() == "why"


async def test_a_child_that_does_not_listen_is_killed_with_all_it_started(tmp_path: Path) -> None:
    code = ("import signal, subprocess, sys, time\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
            "time.sleep(60)\n")
    log = LogFile(tmp_path / "c.log")
    child = Child([sys.executable, "-c", code], {}, "/", log)
    async with asyncio.timeout(10):
        while not log.last:
            await asyncio.sleep(0.02)
    grandchild = int(log.last[0])
    assert await child.stop(0.2) == -signal.SIGKILL
    async with asyncio.timeout(5):
        while Path(f"/proc/{grandchild}/cmdline").exists() and Path(f"/proc/{grandchild}/cmdline").read_bytes():
            await asyncio.sleep(0.02)


def test_children_die_with_their_parent(tmp_path: Path) -> None:
    code = ("import asyncio, sys\nfrom pathlib import Path\n"
            "from modelyard.supervisor.child import Child\nfrom modelyard.supervisor.logfile import LogFile\n"
            "async def main():\n"
            "    child = Child([sys.executable, '-c', 'import time; time.sleep(60)'], {}, '/', "
            f"LogFile(Path({str(tmp_path)!r}) / 'c.log'))\n"
            "    print(child.pid, flush=True)\n    await child.exited\nasyncio.run(main())\n")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    for _ in range(200):
        try:
            if not Path(f"/proc/{pid}/cmdline").read_bytes():
                return
        except OSError:
            return
        time.sleep(0.02)
    pytest.fail("the child lives on")


# -- probes -----------------------------------------------------------------------------------------------------------


async def test_probes_are_real_calls_to_the_real_server(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", score="def run(data):\n    return data\n")
    at = {kind: str(tmp_path / kind) for kind in ("grpc", "http", "admin")}
    argv = [*command(root), "serve", *(word for kind, path in at.items() for word in (f"--{kind}", f"unix:{path}"))]
    server = Child(argv, {"MODELYARD_DEPLOYMENT": "iris"}, "/", LogFile(tmp_path / "server.log"))
    try:
        async with asyncio.timeout(30):
            while await _readyz(at["admin"]) != 200:
                await asyncio.sleep(0.05)
        assert await probe.grpc_ready(at["grpc"]) is True
        assert await probe.grpc_ready(at["grpc"], "iris") is True
        assert await probe.grpc_ready(at["grpc"], "another") is False
        assert await probe.http(at["http"], "GET", "/v2/health/ready") == 200
    finally:
        assert await server.stop(20) == 0


async def _readyz(admin: str) -> int:
    try:
        return await probe.http(admin, "GET", "/readyz")
    except probe.NoAnswer:
        return 0


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 64, b"\x00\x00\x04\x08"])
async def test_what_is_no_grpc_server_is_no_answer(tmp_path: Path, answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(answer)
        writer.close()

    path = str(tmp_path / "s")
    async with await asyncio.start_unix_server(talk, path):
        with pytest.raises(probe.NoAnswer):
            await probe.grpc_ready(path, timeout_s=0.5)
    with pytest.raises(probe.NoAnswer):
        await probe.http(str(tmp_path / "nobody"), "GET", "/readyz")


# -- what is wanted, and how it is started ----------------------------------------------------------------------------


def test_state_is_replaced_whole_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert read_json(path) is None
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2} and path.stat().st_mode & 0o777 == 0o600 and len([*tmp_path.iterdir()]) == 1
    path.write_text('{"a": ')
    assert read_json(path) is None


def test_memory_is_read_with_its_unit() -> None:
    assert [in_bytes(m) for m in (None, "", "1024", "512Mi", "1G", "2Gi", "3k")] == [
        None, None, 1024, 512 << 20, 10**9, 2 << 30, 3000]


def test_an_environment_is_built_from_the_image_up(tmp_path: Path) -> None:
    want = Desired("default", "iris", 3, 2, 600, template(
        image_env={"A": "image", "B": "image"}, env={"B": "deployment", "OMP_NUM_THREADS": "7"},
        resources={"cpu": 0.5}, secrets={"C": {"env": "SOURCE"}}, capture={"enabled": True}))
    env = environment(want, want.template, 1, {"SOURCE": "s3cret", "PATH": "/bin", "MODELYARD_TOKEN": "no"})
    assert (env["A"], env["B"], env["C"], env["PATH"]) == ("image", "deployment", "s3cret", "/bin")
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == ("7", "1"), "what the user says wins"
    assert (env["MODELYARD_DEPLOYMENT"], env["MODELYARD_REPLICA"], env["MODELYARD_IMAGE"]) == ("iris", "1", "scorer:1")
    assert json.loads(env["MODELYARD_CAPTURE"]) == {"enabled": True}
    assert not {"MODELYARD_TOKEN", "SOURCE"} & set(env)


def test_a_secret_that_cannot_be_read_says_which(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match=r"KEY.*nowhere"):
        secret("KEY", {"file": str(tmp_path / "nowhere")}, {})
    with pytest.raises(CannotStart, match=r"KEY.*UNSET"):
        secret("KEY", {"env": "UNSET"}, {})
