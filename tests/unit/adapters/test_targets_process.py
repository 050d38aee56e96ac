"""The local target's own promises: ports, secrets, disks, layers from strangers, and supervisors that die."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from modelyard.adapters.blobs_dir import DirGrants
from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.targets_process import ProcessTarget
from modelyard.core.errors import Invalid, ModelyardError, Unavailable
from modelyard.ports.targets import Observed, Workload
from tests import handmade

pytestmark = pytest.mark.slow  # real programs are started and stopped

ENV = "import os\n\ndef run(data):\n    return {k: os.environ.get(k) for k in data['data']}\n"


class Bench:
    def __init__(self, data: Path) -> None:
        self.data = data
        self.images = LayoutImages(data / "images")
        self.target = ProcessTarget("local", self.images, data)
        self.grants = DirGrants(data / "blobs")
        self.run = data / "run/default/iris"

    async def workload(self, generation: int = 1, score: str = ENV, tag: str = "1", **changes: Any) -> Workload:
        digest = changes.pop("digest", None) or await handmade.image(self.images, "scorer", tag, score)
        plain: dict[str, Any] = {"replicas": 1, "models": (), "ports": {}, "capture": {}, "limits": {},
                                 "grant": await self.grants.lend("default", "iris", 600)}
        return Workload(workspace="default", name="iris", generation=generation, image=f"scorer:{tag}", repo="scorer",
                        digest=digest, **{**plain, **changes})

    async def until(self, when: Callable[[Observed], bool]) -> Observed:
        async with asyncio.timeout(40):
            while not when(seen := await self.target.observe("default", "iris")):
                await asyncio.sleep(0.05)
        return seen

    async def serve(self, generation: int = 1, **changes: Any) -> Observed:
        await self.target.apply(await self.workload(generation, **changes))
        return await self.until(lambda o: o.serving == generation and o.ready == len(o.replicas))

    def supervisor(self) -> int:
        return next(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and str(self.run).encode() in
                    (p / "cmdline").read_bytes() and b"modelyard.supervisor" in (p / "cmdline").read_bytes())

    def written(self) -> bytes:
        """Everything that lies in the run folder."""
        return b"".join(p.read_bytes() for p in self.run.rglob("*") if p.is_file())


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.target.check()
    yield bench
    await bench.target.remove("default", "iris")


async def asked(seen: Observed, *names: str) -> dict[str, Any]:
    def call() -> dict[str, Any]:
        request = urllib.request.Request(f"{seen.endpoints['rest']}/score", json.dumps({"data": names}).encode(),
                                         {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    return await asyncio.to_thread(call)


# -- ports and supervisors --------------------------------------------------------------------------------------------


async def test_a_port_that_another_program_holds_is_named(bench: Bench) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(Invalid) as caught:
            await bench.target.apply(await bench.workload(ports={"grpc": port, "rest": 0}))
    assert caught.value.code == "port-in-use" and str(port) in caught.value.message
    assert (await bench.target.observe("default", "iris")).state == "absent"


async def test_the_ports_are_kept_when_everything_was_stopped(bench: Bench) -> None:
    before = await bench.serve()
    await ProcessTarget("local", bench.images, bench.data, ends=True).close()
    assert (await bench.target.observe("default", "iris")).state == "absent"
    assert await bench.target.list() == [("default", "iris")]
    assert (await bench.serve()).ports == before.ports


async def test_children_die_with_their_supervisor_and_the_good_generation_comes_back(bench: Bench) -> None:
    await bench.serve()
    broken = await bench.workload(2, handmade.BROKEN, "2")
    await bench.target.apply(broken)
    bad = await bench.until(lambda o: o.failed != "")
    children = [r.pid for r in bad.replicas if r.pid]
    os.kill(bench.supervisor(), signal.SIGKILL)
    async with asyncio.timeout(10):
        while (await bench.target.observe("default", "iris")).state != "absent" or any(map(_alive, children)):
            await asyncio.sleep(0.05)
    await bench.target.apply(broken)
    back = await bench.until(lambda o: o.ready == 1)
    assert (back.serving, back.failed, back.ports) == (1, bad.failed, bad.ports), "what was given up stays given up"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_supervisor_without_its_folder_ends(bench: Bench) -> None:
    await bench.serve()
    pid = bench.supervisor()
    bench.run.rename(bench.run.with_name("moved"))
    (bench.run.with_name("moved") / "lock").unlink()
    async with asyncio.timeout(30):
        while _alive(pid):
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("own", [True, False])
async def test_a_data_folder_with_a_long_name_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     own: bool) -> None:
    """Sockets lie in a short folder then: in TMPDIR, if that is one."""
    data = tmp_path / ("x" * 120)
    data.mkdir()
    short = tempfile.TemporaryDirectory(dir="/tmp", prefix="short-")
    monkeypatch.setenv("TMPDIR", short.name if own else str(data))
    bench = Bench(data)
    try:
        seen = await bench.serve()
        elsewhere = Path(json.loads((bench.run / "sockets.json").read_text())["path"])
        assert elsewhere.is_dir() and await asked(seen, "MODELYARD_DEPLOYMENT") == {"MODELYARD_DEPLOYMENT": "iris"}
        assert str(elsewhere.parent) == (short.name if own else "/tmp")
    finally:
        await bench.target.remove("default", "iris")
        short.cleanup()
    assert not elsewhere.exists()


async def test_memory_over_the_limit_ends_a_replica_with_that_reason(bench: Bench) -> None:
    grows = "held = []\n\ndef run(data):\n    held.append(bytearray(400_000_000))\n    return 1\n"
    seen = await bench.serve(score=grows, resources={"memory": "300Mi"})
    with contextlib.suppress(OSError):  # it may be ended before its answer has left
        await asked(seen)
    ended = await bench.until(lambda o: any(r.restarts for r in o.replicas))
    assert ended.failed == "", "it was good, and is started again"
    log = b"".join([part async for part in bench.target.logs("default", "iris", 50)]).decode()
    assert "more than its limit of 300 MiB" in log


async def test_a_model_that_hangs_is_started_anew_with_that_reason(bench: Bench) -> None:
    hangs = "import time\n\ndef run(data):\n    while data['data'] == ['hang']:\n        time.sleep(1)\n    return 1\n"
    seen = await bench.serve(score=hangs, limits={"timeout_ms": 200}, env={"MODELYARD_STUCK_S": "0.5"})
    with pytest.raises(urllib.error.HTTPError) as late:
        await asked(seen, "hang")
    assert late.value.code == 504
    seen = await bench.until(lambda o: sum(r.restarts for r in o.replicas) == 1 and o.ready == 1)
    assert await asked(seen) == 1
    log = b"".join([part async for part in bench.target.logs("default", "iris", 50)]).decode()
    assert "the code of a model hangs" in log


async def test_scoring_code_that_ends_the_process_is_started_anew(bench: Bench) -> None:
    exits = "import os\n\ndef run(data):\n    os._exit(7) if data['data'] else None\n    return 1\n"
    seen = await bench.serve(score=exits)
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        await asked(seen, "now")
    seen = await bench.until(lambda o: sum(r.restarts for r in o.replicas) == 1 and o.ready == 1)
    assert await asked(seen) == 1


# -- environment and secrets ------------------------------------------------------------------------------------------


async def test_a_replica_sees_its_environment_and_not_ours(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_TOKEN", "ours alone")
    monkeypatch.setenv("SOMETHING_ELSE", "ours as well")
    seen = await bench.serve(env={"COLOUR": "red", "FROM_IMAGE": "over"}, resources={"cpu": 1.5})
    assert await asked(seen, "COLOUR", "FROM_IMAGE", "MODELYARD_TOKEN", "SOMETHING_ELSE", "OMP_NUM_THREADS") == {
        "COLOUR": "red", "FROM_IMAGE": "over", "MODELYARD_TOKEN": None, "SOMETHING_ELSE": None, "OMP_NUM_THREADS": "2"}


async def test_secrets_are_read_at_start_and_written_nowhere(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "xyzzy-from-env")
    file = bench.data / "key"
    file.write_text("plugh-from-file\n")
    secrets = {"DB": {"env": "DB_PASSWORD"}, "KEY": {"file": str(file)}}
    seen = await bench.serve(secrets=secrets)
    assert await asked(seen, "DB", "KEY") == {"DB": "xyzzy-from-env", "KEY": "plugh-from-file"}
    kept = await asyncio.to_thread(bench.written)
    assert b"DB_PASSWORD" in kept and b"xyzzy" not in kept and b"plugh" not in kept
    monkeypatch.setenv("DB_PASSWORD", "changed")
    seen = await bench.serve(2, secrets=secrets, env={"roll": "yes"})
    assert (await asked(seen, "DB"))["DB"] == "changed", "a running supervisor is told of the new value"


async def test_a_secret_that_is_not_there_is_the_reason(bench: Bench) -> None:
    await bench.target.apply(await bench.workload(secrets={"DB": {"env": "NOT_SET_ANYWHERE"}}))
    bad = await bench.until(lambda o: o.failed != "")
    assert "secret DB" in bad.failed and "NOT_SET_ANYWHERE" in bad.failed
    with pytest.raises(Invalid):
        await bench.target.apply(await bench.workload(2, secrets={"DB": {"kubernetes": "db/password"}}))


# -- capture ----------------------------------------------------------------------------------------------------------


async def test_captured_calls_are_shipped_before_the_folder_goes(bench: Bench) -> None:
    seen = await bench.serve(capture={"enabled": True}, grant="file:///nowhere?workspace=a&deployment=b&secret=c")
    await asked(seen)
    with pytest.raises(Unavailable):
        await bench.target.remove("default", "iris")
    assert [*bench.run.glob("spool/*.seg")] and await bench.target.list() == [("default", "iris")]
    await bench.target.apply(await bench.workload(capture={"enabled": True}))
    await bench.target.remove("default", "iris")
    assert not bench.run.exists()
    assert [*(bench.data / "blobs/capture/iris/.segments").rglob("*.seg")]


# -- layers -----------------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"x") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("layer", [
    member("opt/../../../escape"), member("../escape"), member("opt/link", tarfile.SYMTYPE, "/etc"),
    member("opt/hard", tarfile.LNKTYPE, "/etc/passwd"), member("opt/fifo", tarfile.FIFOTYPE),
    member("opt/device", tarfile.CHRTYPE), b"not a tar at all" * 100, member("opt/file", data=b"y" * 4096)[:1500],
], ids=["dots", "above", "symlink", "hardlink", "fifo", "device", "noise", "cut"])
async def test_a_hostile_layer_is_refused_and_leaves_nothing(bench: Bench, layer: bytes) -> None:
    digest = await handmade.put(bench.images, "scorer", "9", [layer], {})
    with pytest.raises(Invalid):
        await bench.target.apply(await bench.workload(digest=digest))
    assert not [*bench.data.rglob("escape")] and await bench.target.list() == []
    assert [*(bench.data / "layers").iterdir()] == []


async def test_an_image_that_is_not_ours_is_refused(bench: Bench) -> None:
    digest = await handmade.put(bench.images, "scorer", "9", [member("opt/other/file")], {})
    with pytest.raises(Invalid) as caught:
        await bench.target.apply(await bench.workload(digest=digest))
    assert "scoring server" in caught.value.message
    with pytest.raises(ModelyardError) as gone:
        await bench.target.apply(await bench.workload(digest="sha256:" + "0" * 64))
    assert gone.value.code == "image-gone"


async def test_what_lies_outside_opt_is_not_unpacked(bench: Bench) -> None:
    layers = [member("etc/passwd"), handmade.tar(handmade.environment()), handmade.tar(handmade.scorer(ENV))]
    digest = await handmade.put(bench.images, "scorer", "9", layers, {})
    await bench.target.apply(await bench.workload(digest=digest))
    assert not [*bench.data.glob("roots/*/etc")]


async def test_layers_are_unpacked_once_shared_and_collected(bench: Bench) -> None:
    first = await bench.workload(1, ENV, "1")
    await asyncio.gather(*(bench.target.apply(first) for _ in range(3)))
    two = ENV + "# two\n"
    await bench.serve(2, score=two, tag="2")
    await bench.target.apply(await bench.workload(2, two, "2"))
    assert len([*bench.data.glob("layers/[0-9a-f]*")]) == 2, "the environment is shared, the first scoring file is gone"
    (root,) = bench.data.glob("roots/[0-9a-f]*")
    launch = root / "opt/modelyard/launch.py"
    (layer,) = bench.data.glob("layers/*/opt/modelyard/launch.py")
    assert launch.samefile(layer) and launch.stat().st_mode & 0o222 == 0
    await bench.target.remove("default", "iris")
    assert [*bench.data.glob("layers/*")] == [] and [*bench.data.glob("roots/[0-9a-f]*")] == []


async def test_compiled_code_is_carried_over_for_the_very_same_file_only(bench: Bench) -> None:
    await bench.serve(1)
    (old,) = bench.data.glob("roots/[0-9a-f]*")
    for name in ("opt/modelyard/__pycache__/launch", "opt/modelyard/score/__pycache__/score"):
        compiled = old / f"{name}.cpython-311.pyc"
        compiled.parent.mkdir(exist_ok=True)
        compiled.write_bytes(b"marked")
    same_size = ENV.replace("data['data']", 'data["data"]')
    digest = await handmade.image(bench.images, "scorer", "2", same_size)
    await bench.target.apply(await bench.workload(2, tag="2", digest=digest))
    new = next(p for p in bench.data.glob("roots/[0-9a-f]*") if p != old)
    assert (new / "opt/modelyard/__pycache__/launch.cpython-311.pyc").read_bytes() == b"marked"
    stale = new / "opt/modelyard/score/__pycache__/score.cpython-311.pyc"
    assert not stale.exists() or stale.read_bytes() != b"marked", "another source of the same size and time"
