"""Where code that is not ours runs during a build: no network, no file of ours, nobody's user, bounded in everything.

``sandbox_init.py`` makes it out of the kernel's namespaces, resource limits and a filter of system calls; nothing has
to be installed. Where the kernel does not allow it the build fails and says what to do: nothing is ever run without it.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..core.errors import BuildFailed
from .log import BuildLog

INIT = Path(__file__).with_name("sandbox_init.py")
PYTHON = f"python3.{sys.version_info.minor}"
HIDDEN = ("/usr/local/etc",)
START_S = 30.0
RESULT = re.compile(r"[A-Za-z0-9_][\w.+!-]{0,250}", re.ASCII)
HELP = ("code that is not ours runs in a sandbox only, and this machine does not let us make one ({why}); let the user "
        "who runs the image builder make user namespaces (sysctl user.max_user_namespaces=10000, "
        "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container also "
        "security_opt: seccomp=infra/compose/seccomp.json, systempaths=unconfined and apparmor=unconfined), or give "
        "wheels: UV_FIND_LINKS names a folder of them")


@dataclass(frozen=True)
class Limits:
    """Bytes and seconds. ``memory`` is of all processes together, ``address_space`` and ``cpu_s`` of each. Files lie in
    memory as well, ``disk`` of them at most; ``result`` is what may come out, ``said`` what of its words is logged."""

    memory: int = 2 << 30
    address_space: int = 8 << 30
    processes: int = 128
    cpu_s: int = 1200
    wall_s: float = 1200.0
    disk: int = 2 << 30
    files: int = 200_000
    results: int = 8
    result: int = 256 << 20
    said: int = 200_000


LIMITS = Limits()
OVER = {"memory": "it used more than {0.memory} bytes of memory",
        "processes": "it had {0.processes} processes or threads",
        "disk": "it filled {0.disk} bytes, or {0.files} files", "time": "it took longer than {0.wall_s:g} s"}
SIGNALS = {signal.SIGXCPU: "it computed for more than {0.cpu_s} s", signal.SIGKILL: "it was killed: over a limit",
           signal.SIGXFSZ: "it wrote more than {0.disk} bytes to a file"}


AT_ONCE = 2
"""Of one builder: each may take its share of memory, and twice as files."""
_TURNS: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


@functools.cache
def python() -> tuple[str, list[Path]]:
    """The Python that runs Modelyard, without its environment, and what of the machine must be seen to run it.
    Blocking, once."""
    prefix = Path(sys.base_prefix).resolve()
    program = prefix / "bin" / PYTHON
    shown = {prefix, Path(sysconfig.get_path("stdlib")).resolve()}
    return str(program), [p for p in sorted(shown) if not p.is_relative_to("/usr") and p != Path("/")]


async def run(
    what: str, command: Sequence[str], folder: Path, log: BuildLog | None = None, *, limits: Limits = LIMITS,
    shown: Mapping[str, Path] = {}, hidden: Sequence[Path] = (), path: str = "",
) -> dict[str, Path]:
    """Runs a command that sees what is ``shown`` (inside → here, read-only) and may write to ``/tmp``; what it left in
    ``/out`` lies in a new folder below ``folder`` afterwards, by name. ``path`` stands before the programs' own.

    BuildFailed where no sandbox can be made, when it failed, and when it went over a limit: nothing of it is left then,
    and nothing that it started. Cancelled, it is gone as well.
    """
    if sys.platform != "linux":
        raise BuildFailed(f"{what} is not possible here: " + HELP.format(why=f"it runs {sys.platform}, not Linux"))
    async with _TURNS.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)):
        return await _run(what, command, folder, log, limits, shown, hidden, path)


async def _run(
    what: str, command: Sequence[str], folder: Path, log: BuildLog | None, limits: Limits, shown: Mapping[str, Path],
    hidden: Sequence[Path], path: str,
) -> dict[str, Path]:
    stage = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="sandbox-", dir=folder))
    done: dict[str, Path] | None = None
    try:
        plan = await asyncio.to_thread(_plan, command, stage, limits, shown, hidden, path)
        async with _started(plan) as (process, answer):
            assert process.stdout is not None
            told = asyncio.create_task(_said(process.stdout, log, limits.said))
            try:
                async with asyncio.timeout(limits.wall_s + START_S):
                    ended = json.loads(await answer.readline() or b"{}")
                    last = await told
                    if not (why := _why(ended, limits)):
                        done = await _files(ended["files"], answer, stage, limits)
            finally:
                told.cancel()
    except TimeoutError:
        ended, why, last = {}, OVER["time"].format(limits), ""
    finally:
        if done is None:
            await asyncio.to_thread(shutil.rmtree, stage, ignore_errors=True)
    if done is not None:
        return done
    if ended.get("ended") == "refused":
        raise BuildFailed(f"{what} is not possible here: " + HELP.format(why=why))
    raise BuildFailed(f"{what} failed: {why}" + (f"; its last words: {last}" if last else ""))


def _plan(command: Sequence[str], stage: Path, limits: Limits, shown: Mapping[str, Path], hidden: Sequence[Path],
          path: str) -> dict[str, Any]:
    """What the inside is told. Blocking."""
    _, needed = python()
    for one in shown.values():
        _readable(one)
    return {
        "command": list(command), "stage": str(stage), "disk": limits.disk, "files": limits.files,
        "wall_s": limits.wall_s, "memory": limits.memory, "results": limits.results,
        "shown": [(str(p), str(p)) for p in needed] + [(str(p.resolve()), inside) for inside, p in shown.items()],
        "hidden": [*HIDDEN, *(str(p.resolve()) for p in hidden)],
        "limits": {"AS": limits.address_space, "NPROC": limits.processes, "CPU": limits.cpu_s, "FSIZE": limits.disk,
                   "NOFILE": 1024, "CORE": 0, "MEMLOCK": 1 << 16, "MSGQUEUE": 0},
        "env": {"PATH": f"{path}:/usr/bin:/bin".lstrip(":"), "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8",
                "SOURCE_DATE_EPOCH": "315532800", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}}


def _readable(top: Path) -> None:
    """For the other user that runs inside where we are root, whatever our umask is."""
    if os.geteuid() == 0:
        for path in [top, *top.rglob("*")]:
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode & 0o7777 | (0o555 if path.is_dir() or mode & 0o100 else 0o444))


@asynccontextmanager
async def _started(plan: dict[str, Any]) -> AsyncIterator[tuple[Process, asyncio.StreamReader]]:
    """The process, and what it reports. Afterwards it is gone, with all that it started."""
    reads, writes = os.pipe()
    answer = asyncio.StreamReader()
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(answer), os.fdopen(reads, "rb"))
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(INIT), cwd="/", env={}, pass_fds=(writes,), start_new_session=True,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        finally:
            os.close(writes)
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({**plan, "report": writes}).encode() + b"\n")
            yield process, answer
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its first process is of this group, the rest dies with that
            await process.wait()
    finally:
        pipe.close()


async def _said(stream: asyncio.StreamReader, log: BuildLog | None, most: int) -> str:
    """Takes in all its words; the first of them go to the log. The last line, for the reason of a failure."""
    left, tail, logged = most, b"", b""
    while chunk := await stream.read(1 << 16):
        tail = (tail + chunk)[-4096:]
        if log is None or left <= 0:
            continue
        *lines, logged = (logged + chunk[:left]).split(b"\n")
        left -= len(chunk)
        for line in lines:
            log.note(f"  build: {line.decode(errors='replace').rstrip()}")
        if left <= 0:
            await log.line(f"  build: {logged.decode(errors='replace')} … (the rest is not kept)")
    if log is not None and left > 0:
        if logged:
            log.note(f"  build: {logged.decode(errors='replace')}")
        await log.flush()
    words = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return words[-1].strip()[:300] if words else ""


def _why(ended: Mapping[str, Any], limits: Limits) -> str:
    """What is wrong with how it ended; "" when nothing is."""
    how, code = ended.get("ended"), ended.get("code", 0)
    if how == "refused":
        return str(ended.get("why"))
    if how in OVER:
        return OVER[how].format(limits)
    if how != "itself":
        return "the sandbox itself was killed"
    if code < 0:
        return SIGNALS.get(-code, f"it was ended by {signal.strsignal(-code) or -code}").format(limits)
    return f"it ended with status {code}" if code else ""


async def _files(listed: Sequence[Sequence[Any]], answer: asyncio.StreamReader, into: Path,
                 limits: Limits) -> dict[str, Path]:
    """Its results. BuildFailed for what cannot be one."""
    if (size := sum(size for _, size in listed)) > limits.result:
        raise BuildFailed(f"its results have {size} bytes; {limits.result} are taken at most")
    found = {}
    for name, size in listed:
        if not RESULT.fullmatch(name):
            raise BuildFailed(f"a result is called {name!a}, which is no name of a file here")
        found[name] = into / name
        await asyncio.to_thread(found[name].touch, exist_ok=False)
        while size:
            chunk = await answer.read(min(size, 1 << 20))
            if not chunk:
                raise BuildFailed(f"{name} is cut off")
            await asyncio.to_thread(_append, found[name], chunk)
            size -= len(chunk)
    return found


def _append(path: Path, chunk: bytes) -> None:
    with path.open("ab") as out:
        out.write(chunk)


def trouble() -> str:
    """Why no sandbox can be made here, "" when it can: one is made, and does nothing. Not within a running loop."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            asyncio.run(run("a sandbox", ["/bin/sh", "-c", ":"], Path(folder), limits=Limits(wall_s=START_S)))
        except BuildFailed as exc:
            return exc.message
    return ""
