"""What every server of the stack has: a folder, a port, a process, and the verbs install, start, stop, status.

    with Kafka(tmp_path / "kafka") as kafka:      # installs, starts, waits until it answers; stops at the end
        kafka.url                                 # kafka://127.0.0.1:41223
        kafka.kill(); kafka.start()               # a crash, and the same server on the same port and data again

The folder holds ``server.json`` (pid, port), ``server.log`` (kept, appended to) and ``data``. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("MODELYARD_TEST_CACHE")
             or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelyard-stack")
"""Downloads, by version; read once, for tests give their programs other caches."""
RUN = Path(os.environ.get("MODELYARD_TEST_RUN") or ROOT / ".stack")
"""Where ``make stack`` keeps each server's folder."""


class StackError(Exception):
    """Says what is missing or went wrong, and what to do."""


@dataclass(frozen=True)
class Status:
    """``state`` is ``running``, ``stopped`` or ``absent`` (never started)."""

    state: str
    pid: int | None = None
    url: str = ""
    log: str = ""


class Server(ABC):
    """A server in a folder. Its port is given, else kept from an earlier start, else any free one."""

    name: ClassVar[str]
    version: ClassVar[str]
    start_s: ClassVar[float] = 60.0
    stop_s: ClassVar[float] = 30.0
    advertised: int = 0
    """The port that a server which names itself to its clients tells them: a proxy's before it; 0: its own."""

    def __init__(self, folder: Path | None = None, port: int = 0) -> None:
        self.folder = (folder or RUN / self.name).absolute()
        self.data = self.folder / "data"
        self.log = self.folder / "server.log"
        given = port or int(os.environ.get(f"MODELYARD_TEST_{self.name.upper()}_PORT") or 0) * (folder is None)
        self.port = given or int(self._note().get("port", 0))
        self._process: subprocess.Popen[bytes] | None = None

    # -- the four verbs ---------------------------------------------------------------------------------------------

    @classmethod
    def missing(cls) -> str:
        """Why it cannot be installed or run on this machine, with what to do; "" when it can. Downloads nothing."""
        return ""

    @classmethod
    @abstractmethod
    def installed(cls) -> bool:
        """Whether nothing has to be downloaded."""

    @classmethod
    def install(cls) -> None:
        """Downloads what is not there. Two at once: one waits for the other. StackError when it cannot be had."""
        if reason := cls.missing():
            raise StackError(f"{cls.name}: {reason}")
        if cls.installed():
            return
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / f"{cls.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not cls.installed():
                cls._install()

    def start(self) -> Self:
        """Installs, starts, and waits until it answers; one that runs already is left as it is."""
        self.install()
        if self.pid() is not None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(exist_ok=True)
        self.port = self.port or free_port()
        self._prepare()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command(), env={**os.environ, **self._environ()}, stdout=log,
                                             stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
                                             start_new_session=True)
        self._write(self._process.pid)
        try:
            self._await()
            self._first()
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """SIGTERM, then SIGKILL when it does not end in time. Only what ``start`` started; repeating is fine."""
        self._end(signal.SIGTERM, self.stop_s)

    def status(self) -> Status:
        pid = self.pid()
        if pid is None:
            return Status("stopped" if self.folder.exists() else "absent", log=str(self.log))
        return Status("running", pid, self.url, str(self.log))

    # -- for fault tests --------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL, and gone when it returns."""
        self._end(signal.SIGKILL, 10.0)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.thaw()
        self.stop()

    # -- what a server says of itself -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def url(self) -> str:
        """How Modelyard's settings name it."""

    @classmethod
    @abstractmethod
    def _install(cls) -> None:
        """Downloads into ``cls.home()``, so that a half-done download never looks installed."""

    @abstractmethod
    def _command(self) -> Sequence[str]: ...

    @abstractmethod
    def answers(self) -> bool:
        """Whether it serves now; asked again and again while it starts."""

    def _environ(self) -> Mapping[str, str]:
        return {}

    def _prepare(self) -> None:  # noqa: B027
        """Writes configuration, formats storage: before every start, so it must not harm what is there."""

    def _first(self) -> None:  # noqa: B027
        """What is done once it answers, before ``start`` returns (a replica set is initiated); may be repeated."""

    @classmethod
    def home(cls) -> Path:
        """Where this version's files are cached."""
        return CACHE / f"{cls.name}-{cls.version}"

    # -- processes ---------------------------------------------------------------------------------------------------

    def pid(self) -> int | None:
        """Of the running process that ``start`` started, here or in another program; else None."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None
        note = self._note()
        pid = note.get("pid")
        return int(pid) if pid and began(int(pid)) == note.get("began") else None

    def _note(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads((self.folder / "server.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def _write(self, pid: int) -> None:
        note = {"name": self.name, "pid": str(pid), "began": began(pid), "port": str(self.port)}
        draft = self.folder / "server.json.new"
        draft.write_text(json.dumps(note))
        draft.replace(self.folder / "server.json")

    def _await(self) -> None:
        end = time.monotonic() + self.start_s
        while not self.answers():
            if self.pid() is None:
                raise StackError(f"{self.name} ended at once; the end of {self.log}:\n{self.tail()}")
            if time.monotonic() > end:
                raise StackError(f"{self.name} does not answer after {self.start_s:.0f} s; the end of {self.log}:\n"
                                 f"{self.tail()}")
            time.sleep(0.1)

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _signal(self, number: int) -> None:
        if (pid := self.pid()) is not None:
            os.kill(pid, number)

    def _end(self, number: int, seconds: float) -> None:
        pid = self.pid()
        if pid is None:
            return
        os.kill(pid, number)
        end = time.monotonic() + seconds
        while self.pid() is not None:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                end = time.monotonic() + 10
            time.sleep(0.05)


def began(pid: int) -> str:
    """When a process began, as the kernel tells it: a pid with the same beginning is the same process. "" when gone."""
    try:
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if parts[0] == "Z" else parts[19]


def free_port() -> int:
    """A TCP port of 127.0.0.1, below the range that the system gives to clients."""
    for port in _candidates():
        with socket.socket() as s, contextlib.suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", port))
            return port
    raise StackError("no port is free on 127.0.0.1")


def _candidates() -> Iterator[int]:
    begin = 15000 + (os.getpid() * 97 + time.monotonic_ns() // 1000) % 12000
    yield from (15000 + (begin + n * 7 - 15000) % 12000 for n in range(2000))


def accepts(port: int) -> bool:
    """Whether something listens on 127.0.0.1:``port``."""
    with socket.socket() as s:
        s.settimeout(0.5)
        return s.connect_ex(("127.0.0.1", port)) == 0


def run(*argv: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, seconds: float = 900) -> str:
    """A program's standard output; StackError with the end of what it said when it fails."""
    try:
        done = subprocess.run(argv, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=seconds)
    except FileNotFoundError as exc:
        raise StackError(f"{argv[0]} is not installed") from exc
    except subprocess.TimeoutExpired as exc:
        raise StackError(f"{' '.join(argv[:3])} did not end within {seconds:.0f} s") from exc
    if done.returncode:
        raise StackError(f"{' '.join(argv)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def needs(**programs: str) -> str:
    """``needs(java="install Java 17")``: why the first missing program is missing; "" when all are here."""
    return next((f"{name} is not installed: {how}" for name, how in programs.items() if shutil.which(name) is None), "")


def apt_install(*packages: str) -> None:
    """Debian packages, as root. Lists are fetched once when a package is not known."""
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    with (CACHE / "apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages)
        try:
            run(*install, env=env)
        except StackError:
            run("apt-get", "update", "-qq", env=env)
            run(*install, env=env)


def can_apt() -> str:
    """"" when Debian packages can be installed; else why not."""
    if os.geteuid() != 0:
        return "Debian's packages need root to be installed"
    return needs(**{"apt-get": "only Debian and its kin have it"})
