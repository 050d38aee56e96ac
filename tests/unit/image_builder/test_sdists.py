"""Packages that exist only as source: built once, in the sandbox, locked by hash."""

import asyncio
import hashlib
import io
import json
import os
import re
import shutil
import socket
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelyard.image_builder import sdists, uv
from modelyard.image_builder.locks import read_lock
from modelyard.image_builder.request import own_platform, own_python
from tests.lanes import slow_but

from .conftest import SCORE, Yard, running
from .packages import index, sandboxed, sdist, wheel  # noqa: F401  (fixtures)

pytestmark = pytest.mark.usefixtures("sandboxed")
OTHER = next(p for p in ("linux/arm64", "linux/amd64") if p != own_platform())


async def built(yard: Yard, name: str = "sourced", **spec: Any) -> tuple[dict, str]:
    """The image once it is over, and its log."""
    doc = await yard.over((await yard.post(**{"name": name, "score": await yard.upload(SCORE), **spec}))["id"])
    return doc, (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()


def sha256(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def left(data: Path) -> list[Path]:
    """Temporary files of builds."""
    return [*data.glob("image-builder/tmp/*")]


@pytest.mark.slow
async def test_it_is_built_once_and_locked_by_both_hashes(
        tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    wheel(index, "tool", "2.0", {"tool/seven.py": "X = 7\n"})
    source = sdist(index, "foo", "1.0", "from tool.seven import X; print('made with', X)", '["tool>=1"]')
    async with running(tmp_path / "one") as yard:
        doc, log = await built(yard, requirements=["foo==1.0"])
        assert doc["phase"] == "ready", log
        assert f"foo 1.0 has no wheel: it is taken from its source foo-1.0.tar.gz, {sha256(source)}" in log
        assert "build: made with 7" in log and "built in a sandbox without network" in log
        text = (await yard.call("GET", f"/v1/images/{doc['id']}/lock")).raw.decode()
        pin = next(p for p in read_lock(text)[0].pins if p.name == "foo")
        assert pin.text == "foo==1.0" and len(pin.hashes) == 2 and sha256(source) in pin.hashes
        bill = json.loads((await yard.call("GET", f"/v1/images/{doc['id']}/sbom")).raw)
        told = next(c for c in bill["components"] if c["name"] == "foo")["hashes"][0]["content"]
        assert {f"sha256:{told}", sha256(source)} == set(pin.hashes)
        assert left(tmp_path / "one") == []
    async with running(tmp_path / "two") as yard:  # another data folder of the same user, and the lock of the first
        again, log = await built(yard, lock=await yard.upload(text.encode()))
        assert again["digest"] == doc["digest"], log
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    async with running(tmp_path / "three") as yard:  # and on another machine: built again from the locked source
        again, log = await built(yard, lock=await yard.upload(text.encode()))
        assert "made with 7" in log and again["digest"] == doc["digest"], log


@pytest.mark.slow
async def test_a_lock_that_knows_only_the_source(tmp_path: Path, index: Path, yard: Yard) -> None:  # noqa: F811
    source = sdist(index, "foo", "1.0")
    doc, log = await built(yard, requirements=["foo"])
    assert doc["phase"] == "ready", log
    text = (await yard.call("GET", f"/v1/images/{doc['id']}/lock")).raw.decode()
    made = next(h for p in read_lock(text)[0].pins if p.name == "foo" for h in p.hashes if h != sha256(source))
    bare = await yard.upload(text.replace(f" \\\n    --hash={made}", "").encode())
    assert made not in bare
    again, log = await built(yard, "by-source", lock=bare)
    assert again["digest"] == doc["digest"] and "built earlier" in log, log
    assert (await yard.call("GET", f"/v1/images/{again['id']}/lock")).raw.decode() == text
    stale = "0" * 64
    for hashes, told in ((text.replace(sha256(source)[7:], stale), "the lock has no hash of its source"),
                         (text.replace(made[7:], stale), "has other hashes of foo==1.0")):
        failed, log = await built(yard, "stale", lock=await yard.upload(hashes.encode()))
        assert failed["phase"] == "failed" and told in failed["reason"], log


@pytest.mark.slow
async def test_what_is_needed_to_build_may_itself_be_source(index: Path, yard: Yard) -> None:  # noqa: F811
    sdist(index, "tool", "1.0")
    sdist(index, "foo", "1.0", "import tool; print('made with', tool.MADE)\n"
          "def get_requires_for_build_wheel(settings=None): return ['tool', 'extra>=2']", '["tool"]')
    wheel(index, "extra", "2.1")
    doc, log = await built(yard, requirements=["foo>=0.5"], constraints=["foo<2"])
    assert doc["phase"] == "ready" and "made with 1" in log and "extra>=2" in log, log
    sdist(index, "one", "1.0", requires='["two"]')
    sdist(index, "two", "1.0", requires='["one"]')
    doc, log = await built(yard, "circle", requirements=["one"])
    assert doc["phase"] == "failed" and "building it needs itself: one → two" in doc["reason"], log


async def test_another_machine_is_refused(index: Path, yard: Yard) -> None:  # noqa: F811
    sdist(index, "foo", "1.0")
    build = sdists.Sdists(own_python(), OTHER, _Quiet(), None, None, ())  # type: ignore[arg-type]
    told = r"foo 1\.0 exists only as source \(foo-1\.0\.tar\.gz\).*not for linux/"
    with pytest.raises(sdists.BuildFailed, match=told):
        await build.add(uv.Sdist("foo", "1.0", "foo-1.0.tar.gz", "file:///x", ""), None)


class _Quiet:
    async def line(self, text: str) -> None: ...


BAD = [
    ("raise RuntimeError('no compiler here')", "no compiler here"),
    ("def get_requires_for_build_wheel(settings=None): return ['-e /etc']", "options are not taken"),
    ("def get_requires_for_build_wheel(settings=None): return ['x @ git+ssh://h/x']", "only https URLs of wheels"),
    ("import zipfile; zipfile.ZipFile('/out/bar-1.0-py3-none-any.whl', 'w').close()", "another package's"),
    ("import os; open('/out/foo-1.0-py3-none-any.whl', 'w').write('x' * 99); os._exit(0)", "no plain zip"),
    ("import os, zipfile\nwith zipfile.ZipFile('/out/foo-1.0-py3-none-any.whl', 'w') as z: z.writestr('../../x', '')\n"
     "os._exit(0)", "leads out of it"),
    ("import os, zipfile\nwith zipfile.ZipFile('/out/foo-1.0-py3-none-any.whl', 'w') as z:\n"
     "  for n in range(20001): z.writestr(str(n), '')\nos._exit(0)", "at most 20000 files"),
    ("import os; os.symlink('/etc/passwd', '/out/foo-1.0-py3-none-any.whl'); os._exit(0)", "made no wheel"),
    ("import os; open('/out/-x', 'w').close(); os._exit(0)", "no name of a file"),
]


@pytest.mark.parametrize(("code", "told"), [BAD[0], *(pytest.param(*bad, marks=pytest.mark.slow) for bad in BAD[1:])])
async def test_what_comes_out_is_looked_at(
        code: str, told: str, index: Path, yard: Yard, tmp_path: Path) -> None:  # noqa: F811
    sdist(index, "foo", "1.0", code)
    doc, log = await built(yard, requirements=["foo==1.0"])
    assert doc["phase"] == "failed" and told in doc["reason"] and "Traceback" not in doc["reason"], log
    assert left(tmp_path / "data") == []


@pytest.fixture
def ear() -> Iterator[tuple[int, list[bytes]]]:
    """A port of this machine, and whoever came."""
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        tcp.setblocking(False)
        heard: list[bytes] = []
        yield tcp.getsockname()[1], heard
        with pytest.raises(BlockingIOError):
            tcp.accept()
    assert heard == []


HOSTILE = {
    "a connection": ("import socket; socket.create_connection(('127.0.0.1', {port})).send(b'x')", "Operation not perm"),
    "the metadata service": ("import urllib.request as u; u.urlopen('http://169.254.169.254/')", "Operation not perm"),
    "the signing key": ("print(open({data!r} + '/signing.key').read())", "No such file"),
    "the data folder": ("import os; print(os.listdir({data!r}))", "No such file"),
    "a file outside": ("open({out!r}, 'w').write('x')", "No such file"),
    "a file of the system": ("open('/usr/lib/modelyard-was-here', 'w')", "Read-only file system"),
    "our environment": ("import os; print(sorted(os.environ.items())); raise OSError('nothing')", "nothing"),
    "another process": ("import os; [open(f'/proc/{{n}}/environ').read() for n in os.listdir('/proc') if n == '1']",
                        "Permission denied"),
    "a fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
                    "processes or threads|of memory"),
    "for ever": ("while True: pass", "took longer than 4 s"),
    "a daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid(); os.fork(); time.sleep(600)\n"
                 "raise OSError('left')", "left"),
}


@pytest.mark.parametrize("name", slow_but({"a connection", "the signing key"}, HOSTILE))
async def test_a_hostile_source_reaches_nothing(
        name: str, index: Path, yard: Yard, tmp_path: Path, ear: tuple[int, list[bytes]],  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_TEST_SECRET", "SECRET")
    outside, data = tmp_path / "outside", tmp_path / "data"
    (data / "signing.key").write_text("KEY-MATERIAL")
    code, told = HOSTILE[name]
    sdist(index, "foo", "1.0", code.format(port=ear[0], data=str(data), out=str(outside)))
    before = set(tmp_path.iterdir())
    doc, log = await built(yard, requirements=["foo==1.0"], timeout_s=4 if name == "for ever" else 60)
    assert doc["phase"] == "failed" and re.search(told, doc["reason"]), log
    assert "KEY-MATERIAL" not in log and "SECRET" not in log
    assert left(data) == [] and not outside.exists() and set(tmp_path.iterdir()) - before <= {tmp_path / "uv"}
    assert not Path("/usr/lib/modelyard-was-here").exists()


@pytest.mark.slow
async def test_deleting_an_image_ends_its_sandbox(index: Path, yard: Yard, tmp_path: Path) -> None:  # noqa: F811
    sdist(index, "foo", "1.0", "print('begun', flush=True)\nwhile True: pass")
    doc = await yard.post(name="stuck", score=await yard.upload(SCORE), requirements=["foo==1.0"])

    async def begun() -> bool:
        log = (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw
        return b"taken from its source" in log and bool(inside())

    await yard.until(begun)
    assert (await yard.call("DELETE", "/v1/images/stuck:1")).json["phase"] == "cancelled"
    await asyncio.wait_for(yard.gone("stuck:1"), 20)
    assert inside() == [] and left(tmp_path / "data") == []


def inside() -> list[str]:
    """Processes of this test that build from source: other workers have their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sdist_hook.py" in path.read_bytes() and ours(path.parent.name):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def ours(pid: str) -> bool:
    while pid not in ("0", str(os.getpid())):
        status = Path("/proc", pid, "status").read_text()
        pid = next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))
    return pid != "0"


SETUP = """
from setuptools import Extension, setup
setup(name="native", version="1.2", packages=["native"],
      ext_modules=[Extension("native.fast", ["fast.c"])] if {compiled} else [])
"""
FAST = """
#include <Python.h>
static struct PyModuleDef about = {PyModuleDef_HEAD_INIT, "fast", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_fast(void) { return PyModule_Create(&about); }
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
async def test_setuptools_and_a_compiler(
        compiled: bool, tmp_path: Path, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index: a setup.py without a pyproject.toml, as most that exist only as source have."""
    if compiled and not (shutil.which("gcc") and Path(sysconfig.get_path("include"), "Python.h").is_file()):
        pytest.skip("there is no C compiler here")
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = {"setup.py": SETUP.format(compiled=compiled), "fast.c": FAST, "native/__init__.py": ""}
    with tarfile.open(tmp_path / "native-1.2.tar.gz", "w:gz") as archive:
        for name, text in texts.items():
            info = tarfile.TarInfo(f"native-1.2/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    doc, log = await built(yard, requirements=["native"])
    assert doc["phase"] == "ready" and "built with setuptools" in log, log
    assert ("linux_" if compiled else "py3-none-any") in log.partition("native 1.2: ")[2].partition("\n")[0], log
