"""The sandbox by itself: what it keeps in, as root and as anybody else, and that nothing runs where there is none."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelyard.core.errors import BuildFailed
from modelyard.image_builder import sandbox
from modelyard.image_builder.sandbox import Limits
from tests.lanes import slow_but

from .packages import sandboxed  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("sandboxed")
SMALL = Limits(memory=96 << 20, disk=8 << 20, files=500, processes=20, cpu_s=2, wall_s=30, result=1 << 20)
ROOT = Path(__file__).parents[3]
OVER = {
    "memory": ("held = [bytearray(8 << 20) for _ in range(500)]", "of memory"),
    "memory that is shared": ("import mmap\nheld = mmap.mmap(-1, 1 << 30)\n"
                              "for at in range(0, 1 << 30, 4096): held[at] = 1", "of memory"),
    "memory of many": ("import os, time\nfor _ in range(8): os.fork()\nheld = bytearray(30 << 20)\ntime.sleep(60)",
                       "of memory|processes"),
    "address space": ("import mmap; mmap.mmap(-1, 64 << 30)", "Cannot allocate memory"),
    "disk": ("import time; open('/tmp/a', 'w').write('a' * (4 << 20)); open('/tmp/b', 'w').write('b' * (6 << 20))",
             "No space left|it filled"),
    "one file": ("open('/tmp/a', 'w').write('a' * (9 << 20))", "to a file|it filled|No space|File too large"),
    "many files": ("for n in range(10_000): open(f'/tmp/{n}', 'w').close()", "No space left|it filled"),
    "threads": ("import threading, time\nfor _ in range(50): threading.Thread(target=time.sleep, args=(60,)).start()",
                "processes or threads|can't start new thread"),
    "processor time": ("while True: pass", "computed for more than 2 s|over a limit"),
    "results": ("open('/out/a', 'w').write('a' * (2 << 20))", "1048576 are taken at most"),
    "a signal": ("import os; os.kill(os.getpid(), 11)", "Segmentation fault"),
    "status": ("print('so it is'); raise SystemExit(3)", "status 3; its last words: so it is"),
}
FORBIDDEN = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def refused(name, call):
    try:
        assert call() == -1 and ctypes.get_errno() in (1, 38), name
    except OSError as exc:
        assert exc.errno in (1, 2, 13, 22, 30), (name, exc)
for kind in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK, socket.AF_ALG):
    refused(f"socket {kind}", lambda: socket.socket(kind, socket.SOCK_RAW).close())
refused("user namespaces", lambda: libc.unshare(0x10000000))
refused("mount", lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
refused("ptrace", lambda: libc.ptrace(16, 1, 0, 0))
refused("chroot", lambda: libc.chroot(b"/tmp"))
refused("io_uring", lambda: libc.syscall(425, 4, 0))
refused("another's memory", lambda: open("/proc/1/mem", "rb").close() or 0)
refused("another's files", lambda: len(os.listdir("/proc/1/fd")))
refused("the system", lambda: open("/usr/x", "w").close() or 0)
refused("root", lambda: os.setuid(0) or 0)
refused("devices", lambda: os.mknod("/tmp/sda", 0o60600, os.makedev(8, 0)) or 0)
quiet = socket.socket(socket.AF_UNIX)
try:
    quiet.connect(NAME)
    raise SystemExit("an abstract socket of the host was reached")
except ConnectionRefusedError:
    quiet.close()
assert os.getuid() != 0 and os.getgid() != 0 and os.getgroups() in ([], [os.getgid()])
assert sorted(os.environ) == ["HOME", "LANG", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED",
                              "SOURCE_DATE_EPOCH", "TMPDIR"]
assert [fd for fd in os.listdir("/proc/self/fd") if int(fd) > 3] == [], os.listdir("/proc/self/fd")
assert sorted(os.listdir("/")) == sorted(set(os.listdir("/")) & set(ROOTS)), os.listdir("/")
assert os.listdir("/tmp") == [] and os.nice(0) >= 10
assert "0000000000000000" == next(l.split()[1] for l in open("/proc/self/status") if l.startswith("CapEff"))
open("/out/done", "w").write("all of it")
"""


async def python(code: str, folder: Path, limits: Limits = SMALL) -> dict[str, Path]:
    program = (await asyncio.to_thread(sandbox.python))[0]
    return await sandbox.run("it", [program, "-c", code], folder, limits=limits)


@pytest.mark.parametrize("name", slow_but({"memory", "a signal", "status"}, OVER))
async def test_over_a_limit(name: str, tmp_path: Path) -> None:
    code, told = OVER[name]
    with pytest.raises(BuildFailed, match=told):
        await python(code, tmp_path)
    assert [*tmp_path.iterdir()] == []


def forbidden(name: str) -> str:
    roots = {"bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "out", "proc", "sbin", "tmp", "usr",
             *(Path(p).parts[1] for p in sandbox.python()[1])}
    return FORBIDDEN.replace("NAME", repr("\0" + name)).replace("ROOTS", repr(sorted(roots)))


@pytest.fixture
def host_socket() -> Iterator[str]:
    import socket

    name = f"modelyard-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()
        yield name


async def test_what_is_forbidden(tmp_path: Path, host_socket: str) -> None:
    code = await asyncio.to_thread(forbidden, host_socket)
    done = await python(code, tmp_path)
    assert await asyncio.to_thread(done["done"].read_text) == "all of it"


async def test_only_what_is_shown_is_seen(tmp_path: Path) -> None:
    shown, secret = tmp_path / "shown", tmp_path / "shown" / "data"
    secret.mkdir(parents=True)
    (shown / "a").write_text("seen")
    (secret / "key").write_text("secret")
    shown.chmod(0o700)
    (shown / "a").chmod(0o600)
    code = ("print(open('/in/a').read()); import os\n"
            "for call in (lambda: open('/in/a', 'w'), lambda: open('/in/b', 'w'), lambda: os.chmod('/in/a', 0o666)):\n"
            "    try: call()\n    except OSError as exc: assert exc.errno in (1, 13, 30), exc\n"
            "    else: raise SystemExit(1)\n"
            "open('/out/told', 'w').write('fine')")
    program = (await asyncio.to_thread(sandbox.python))[0]
    done = await sandbox.run("it", [program, "-c", code], tmp_path, limits=SMALL, shown={"/in": shown})
    assert done["told"].read_text() == "fine" and (shown / "a").read_text() == "seen"


async def test_what_is_hidden_of_the_system_is_not_there(tmp_path: Path) -> None:
    """A data folder may lie in a folder that every sandbox sees."""
    hidden = (await asyncio.to_thread(sandbox.python))[1] or [Path("/usr/share")]
    with pytest.raises(BuildFailed, match=r"Permission denied|No such file"):
        await sandbox.run("it", ["/bin/sh", "-c", f"ls {hidden[-1]} && ls {hidden[-1]}/*"], tmp_path, limits=SMALL,
                          hidden=hidden)


async def test_cancelling_ends_it(tmp_path: Path) -> None:
    task = asyncio.create_task(python(f"import time; time.sleep(600)  # {tmp_path.name}", tmp_path))
    await until(lambda: bool(running(tmp_path.name)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running(tmp_path.name) == [] and [*tmp_path.iterdir()] == []


HOST = """
import asyncio, sys
from pathlib import Path
from modelyard.image_builder import sandbox
async def main():
    code = sys.argv[2]
    done = await sandbox.run("it", [sandbox.python()[0], "-c", code], Path(sys.argv[1]))
    print({name: path.read_text() for name, path in done.items()}, flush=True)
asyncio.run(main())
"""


def host(code: str, folder: Path, before: str = "", **more: object) -> subprocess.Popen[str]:
    """A builder in a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "services"), *filter(None, sys.path)])}
    return subprocess.Popen([str(more.pop("program", sys.executable)), "-c", before + HOST, str(folder), code], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)  # type: ignore[call-overload]


@pytest.mark.slow
async def test_it_dies_with_the_builder(tmp_path: Path) -> None:
    builder = host(f"import time; time.sleep(600)  # {tmp_path.name}", tmp_path)
    await until(lambda: len(running(tmp_path.name)) > 1)
    os.kill(builder.pid, signal.SIGKILL)
    await asyncio.to_thread(builder.wait)
    await until(lambda: running(tmp_path.name) == [])
    assert builder.stdout is not None
    builder.stdout.close()


@pytest.mark.slow
def test_where_there_is_none_nothing_runs(tmp_path: Path) -> None:
    """The kernel refuses namespaces, to root as well: our own filter of system calls says so."""
    init = ROOT / "services" / "modelyard" / "image_builder" / "sandbox_init.py"
    before = textwrap.dedent(f"""
        import platform, runpy
        told = runpy.run_path({str(init)!r})
        told["libc"].prctl(38, 1, 0, 0, 0)
        told["_filter"](*told["CALLS"][platform.machine()])
        """)
    said = host("open('/out/ran', 'w')", tmp_path, before).communicate(timeout=60)[0]
    assert "does not let us make one" in said and "max_user_namespaces" in said and "BuildFailed" in said, said
    assert "ran" not in said and [*tmp_path.iterdir()] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests are not root already")
@pytest.mark.slow
def test_without_root(host_socket: str) -> None:
    other = {"user": 4321, "group": 4321, "extra_groups": []}
    programs = [sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"]
    program = next((p for p in programs if _works(p, other)), None)
    if program is None:
        pytest.skip("no Python of this version can be run by another user here")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are root's alone
        os.chown(folder, 4321, 4321)
        said = host(forbidden(host_socket), Path(folder), program=program, **other).communicate(timeout=60)[0]
    assert "all of it" in said, said


def _works(program: str, other: dict[str, object]) -> bool:
    try:
        builder = host("", Path("/nowhere"), "import modelyard.image_builder.sandbox; raise SystemExit(0)\n",
                       program=program, **other)
    except OSError:
        return False
    return (builder.communicate(timeout=60), builder.returncode)[1] == 0


def running(mark: str) -> list[str]:
    """Processes that have a mark in their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


async def until(check: object) -> None:
    end = time.monotonic() + 30
    while not await asyncio.to_thread(check):  # type: ignore[arg-type]
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.02)
