"""A node: what it makes of a data folder, what it refuses, how it starts and stops."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from modelyard import node
from modelyard.core.errors import Conflict, Invalid, ModelyardError
from modelyard.kernel import folder
from modelyard.settings import Settings, load

pytestmark = pytest.mark.slow  # real programs are started and stopped

EVERY = ["registry", "image-builder", "deployer", "telemetry"]


@contextlib.asynccontextmanager
async def opened(data: Path, *names: str, **flags: object) -> AsyncIterator[node.Node]:
    given: Settings = await asyncio.to_thread(load, data=data, **{"port": 0, **flags})  # type: ignore[arg-type]
    async with node.opened(given, names) as one:
        yield one


async def get(url: str, path: str) -> tuple[int, dict[str, object]]:
    async with aiohttp.ClientSession() as http, http.get(url + path) as answer:
        return answer.status, await answer.json(content_type=None)


async def refused(data: Path, *names: str, **flags: object) -> ModelyardError:
    with pytest.raises(ModelyardError) as caught:
        async with opened(data, *names, **flags):
            pass
    return caught.value


async def test_all_services_in_one_process(tmp_path: Path) -> None:
    data = tmp_path / "new" / "data"
    async with opened(data) as one:
        work = asyncio.create_task(one.work())
        assert await get(one.url, "/livez") == (200, {"status": "ok"})
        status, ready = await get(one.url, "/readyz")
        assert (status, ready["status"], ready["services"]) == (200, "ok", EVERY)
        for path in ("/v1/models", "/v1/images", "/v1/deployments"):
            assert await get(one.url, path) == (200, {"items": [], "next": None})
        _, document = await get(one.url, "/v1/openapi.json")
        assert {"/v1/models", "/v1/images", "/v1/deployments", "/v1/telemetry/{deployment}", "/v1/events"} <= \
            document["paths"].keys()  # type: ignore[attr-defined]
        assert not work.done()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert stat.S_IMODE((data / "service.token").stat().st_mode) == 0o600
    assert (data / "VERSION").read_text() == "1\n"
    assert not [p for p in data.iterdir() if p.name.startswith(".")]
    with pytest.raises(aiohttp.ClientConnectionError):
        await get(one.url, "/livez")


async def test_apart_they_find_each_other(tmp_path: Path) -> None:
    ports = {}
    for name in EVERY:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            ports[name] = s.getsockname()[1]
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    documents = []
    async with contextlib.AsyncExitStack() as stack:
        for name in EVERY:
            one = await stack.enter_async_context(opened(tmp_path, name, services=urls, port=None))
            assert one.url == urls[name] and one.names == [name]  # its own port, from `services`
        for url in urls.values():
            for path in ("/v1/models", "/v1/images", "/v1/deployments"):
                assert await get(url, path) == (200, {"items": [], "next": None})
            assert (await get(url, "/v1/dead"))[1]["unreachable"] == []
            documents.append((await get(url, "/v1/openapi.json"))[1])
    assert all(d == documents[0] for d in documents)


async def test_two_servers_on_one_folder(tmp_path: Path) -> None:
    async with opened(tmp_path):
        for names in ((), ("registry",), ("telemetry", "deployer")):
            error = await refused(tmp_path, *names)
            assert isinstance(error, Conflict) and error.code == "data-in-use"
            assert str(os.getpid()) in error.message and str(tmp_path) in error.message
    async with opened(tmp_path, "registry"), opened(tmp_path, "telemetry"):
        assert (await refused(tmp_path, "registry")).code == "data-in-use"


async def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = await refused(tmp_path, port=port)
        assert error.code == "port-in-use" and str(port) in error.message and "--port" in error.message
    async with opened(tmp_path, port=port):  # nothing was left held
        pass


async def test_a_host_that_is_not_here(tmp_path: Path) -> None:
    error = await refused(tmp_path, host="192.0.2.1", insecure=True)
    assert error.code == "host-refused" and "192.0.2.1" in error.message


async def test_unknown_service_and_scheme(tmp_path: Path) -> None:
    assert "no service is called cellar" in (await refused(tmp_path, "cellar")).message
    error = await refused(tmp_path, bus="carrier-pigeon:///x")
    assert isinstance(error, Invalid) and "carrier-pigeon" in error.message


@pytest.mark.parametrize("version", ["2\n", "17", "", "one"])
async def test_a_folder_of_another_version(tmp_path: Path, version: str) -> None:
    (tmp_path / "VERSION").write_text(version)
    error = await refused(tmp_path)
    assert error.code == "data-version" and str(tmp_path) in error.message and "--data" in error.message
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "locks") == ["VERSION"]


async def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    mode = tmp_path.stat().st_mode
    error = await refused(tmp_path)
    assert error.code == "data-folder" and "thesis.tex" in error.message
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"] and tmp_path.stat().st_mode == mode


async def test_a_path_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for data in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/modelyard")):
        error = await refused(data)
        assert error.code == "data-folder" and str(data) in error.message and "--data" in error.message


@pytest.fixture
def readonly(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "shut").mkdir(mode=0o500)
    yield tmp_path / "shut"
    (tmp_path / "shut").chmod(0o700)


def test_a_folder_that_is_not_writable(readonly: Path) -> None:
    """As an ordinary user: root may write everywhere."""
    code = ("import os, sys, pathlib\n"
            "from modelyard.kernel.folder import prepare\n"
            "from modelyard.core.errors import Invalid\n"
            "os.getuid() or os.setuid(65534)\n"
            "try: prepare(pathlib.Path(sys.argv[1]))\n"
            "except Invalid as e: print(e.code, e)")
    os.chmod(readonly.parent, 0o755)
    for above in readonly.parents:  # pytest's folders are closed to others
        if os.access(above, os.W_OK) and above.stat().st_uid == os.getuid() and "pytest" in above.name:
            above.chmod(0o755)
    if os.getuid() == 0:
        os.chown(readonly, 65534, 65534)
    done = subprocess.run([sys.executable, "-c", code, str(readonly)], capture_output=True, text=True, timeout=30)
    assert done.stdout.startswith("data-folder ") and "Permission denied" in done.stdout, done.stderr


def test_many_start_on_a_new_folder_at_once(tmp_path: Path) -> None:
    """Each process must find the same token, and none may take another's first file for a stranger's."""
    code = ("import sys, pathlib; from modelyard.kernel.folder import prepare, service_token\n"
            "data = pathlib.Path(sys.argv[1]); prepare(data); print(service_token(data))")
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data")], stdout=subprocess.PIPE)
               for _ in range(6)]
    tokens = {process.communicate(timeout=60)[0] for process in running}
    assert len(tokens) == 1 and len(tokens.pop().strip()) >= 40
    assert all(process.returncode == 0 for process in running)


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    folder.prepare(tmp_path)
    code = ("import sys, pathlib, time; from modelyard.kernel.folder import lock\n"
            "lock(pathlib.Path(sys.argv[1]), 'registry'); print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(Conflict, match=str(holder.pid)):
        folder.lock(tmp_path, "registry")
    os.close(folder.lock(tmp_path, "deployer"))
    holder.kill()
    holder.wait()
    holder.stdout.close()
    os.close(folder.lock(tmp_path, "registry"))


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    node.check_machine()
    for system, machine in [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")]:
        monkeypatch.setattr("platform.system", lambda system=system: system)
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        with pytest.raises(Invalid, match=f"not on {system} {machine.lower()}"):
            node.check_machine()


PROGRAM = """
import asyncio, sys
from modelyard.node import run
from modelyard.settings import load
from pathlib import Path
asyncio.run(run(load(data=Path(sys.argv[1]), port=0), sys.argv[2:], ready=lambda url, names: print(url, flush=True)))
"""


@contextlib.contextmanager
def program(data: Path, *names: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(data), *names], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_it_drains_and_ends(tmp_path: Path, how: signal.Signals) -> None:
    with program(tmp_path / "data") as (process, url):
        async with aiohttp.ClientSession() as http:
            stream = await http.get(url + "/v1/events")
            began = time.monotonic()
            process.send_signal(how)
            await asyncio.wait_for(stream.content.read(), 10)
        _, told = await asyncio.to_thread(process.communicate, timeout=25)
        assert process.returncode == 0, told
        assert time.monotonic() - began < 10 and "Traceback" not in told and '"message": "stopped"' in told


async def test_the_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with program(tmp_path / "data", "registry") as (process, url):
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PUT /v1/artifacts/sha256:" + b"0" * 64 + b" HTTP/1.1\r\nHost: localhost\r\n"
                     b"Content-Length: 9\r\nContent-Type: application/octet-stream\r\n\r\nabc")
        await writer.drain()
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.5)
        assert process.poll() is None  # an upload is in flight
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, 3) == 130
        writer.close()
