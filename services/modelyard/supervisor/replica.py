"""One replica: started, probed, watched, restarted with back-off, drained."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from . import probe
from .child import Child
from .desired import Desired, in_bytes
from .logfile import LogFile
from .plan import CannotStart, environment, program, workdir

FIRST_PROBE_S, PROBE_S, PROBE_TIMEOUT_S, MISSES = 0.1, 2.0, 5.0, 3
HEALTHY_S, MAX_DELAY_S = 10.0, 30.0
STUCK_S = 60.0
KINDS = ("grpc", "rest", "admin")
SPREADS = "grpc"
"""The kind whose connections are sent on."""
DRAIN_S, GRACE_S = 20.0, 27.0
PAGE = os.sysconf("SC_PAGE_SIZE")


class Hangs(Exception):
    """It answers, and says that only a new process helps."""


class Runs(Protocol):
    """What runs for a replica: a child process or a container."""

    pid: int | None
    exited: asyncio.Future[int]
    taken_away: bool

    @property
    def how(self) -> str: ...

    def kill(self) -> None: ...

    async def stop(self, grace_s: float) -> int: ...


class Replica:
    """``ready`` only after real calls were answered. ``reason`` says why it is not; ``failed_starts`` counts starts
    in a row that never got there. ``connections`` is the relay's count of what it has open to it."""

    def __init__(self, want: Desired, roll: int, ordinal: int, sockets: Path, changed: Callable[[], None],
                 environ: Mapping[str, str]) -> None:
        self.name = f"{roll}-{ordinal}"
        self.ordinal = ordinal
        self.ready = False
        self.reason = "starting"
        self.restarts = 0
        self.failed_starts = 0
        self.connections = 0
        self.leaving = False
        self._staying: Counter[str] = Counter()
        self._spreads = 0
        self._want, self._template = want, want.template
        self._sockets, self._changed, self._environ = sockets, changed, environ
        self._log = LogFile(Path("logs") / f"{self.name}.log")
        self._child: Runs | None = None
        self._starts = 0
        self._streak = 0
        self._ready_since = 0.0
        self._cut_short = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def pid(self) -> int | None:
        return None if self._child is None or self._child.exited.done() else self._child.pid

    def address(self, kind: str) -> str:
        return str(self._sockets / f"{self.name}.{self._starts}.{kind}")

    def load(self, kind: str) -> int:
        """Connections of a kind that are here to stay: those that were told to go do not count."""
        return self._staying[kind]

    def opened(self, kind: str) -> Callable[[], None]:
        """Counts a connection; gives back what is to be called at its end."""
        self.connections += 1
        self._staying[kind] += 1
        self._idle.clear()
        return partial(self._closed, kind, self._spreads)

    def _closed(self, kind: str, spreads: int) -> None:
        self.connections -= 1
        if kind != SPREADS or spreads == self._spreads:
            self._staying[kind] -= 1
        if not self.connections:
            self._idle.set()

    def report(self, generation: int) -> dict[str, Any]:
        up = self.ready and not self.leaving and self.pid is not None  # its end is known a moment before it is taken in
        return {"name": self.name, "generation": generation, "ready": up, "pid": self.pid,
                "restarts": self.restarts, "reason": "draining" if self.leaving else self.reason}

    async def drain(self) -> None:
        """Takes it out of service without losing a call: no new connections, then none left, then the end."""
        self.leaving = True
        if self.pid is not None and self.ready:
            with contextlib.suppress(probe.NoAnswer):
                await probe.http(self.address("admin"), "POST", "/drain")
            assert self._child is not None
            idle = asyncio.ensure_future(self._idle.wait())
            either: list[asyncio.Future[Any]] = [idle, self._child.exited]
            await asyncio.wait(either, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
        await self.stop()

    async def spread(self) -> None:
        """Another replica is ready: its callers connect anew, to whoever has the fewest. Their calls do not notice.
        What they have here counts no more from now on: they come back before it is closed, and would all go
        elsewhere."""
        self._spreads += 1
        self._staying[SPREADS] = 0
        with contextlib.suppress(probe.NoAnswer):
            await probe.http(self.address("admin"), "POST", "/spread")

    async def stop(self) -> None:
        """Ends it: SIGTERM, in which it answers what it has, SIGKILL when that takes too long."""
        self.leaving = True
        self._cut_short.set()
        if self._child is not None:
            await self._child.stop(GRACE_S)
        await self._task
        self._log.close()

    def kill(self, reason: str) -> None:
        self.reason = reason
        if self._child is not None:
            self._child.kill()

    async def _run(self) -> None:
        while not self.leaving:
            was_ready, healthy = await self._live_once()
            self._changed()
            if self.leaving:
                return
            self.failed_starts = 0 if was_ready else self.failed_starts + 1
            self._streak = 1 if healthy else self._streak + 1
            delay = 0.0 if was_ready and self._streak == 1 else min(MAX_DELAY_S, 2.0 ** (self._streak - 1))
            self._log.say(f"[modelyard] {self.reason}; starting again in {delay:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._cut_short.wait()
            self.restarts += 1

    async def _live_once(self) -> tuple[bool, bool]:
        """From start to exit. (it became ready, it was ready for so long that old crashes are forgotten)."""
        try:
            child = self._start()
        except (CannotStart, OSError) as exc:
            self.reason = str(exc)
            return False, False
        watch = asyncio.get_running_loop().create_task(self._watch(child))
        code = await child.exited
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        was_ready, self.ready = self._ready_since > 0, False
        lasted = asyncio.get_running_loop().time() - self._ready_since
        self._ready_since = 0.0
        if not self.reason.startswith("killed:"):
            self.reason = f"{child.how}: {self._log.reason()}" if code > 0 else child.how
        self._remove_sockets()
        return was_ready or child.taken_away, (was_ready and lasted >= HEALTHY_S) or child.taken_away

    def _remove_sockets(self) -> None:
        for kind in KINDS:
            Path(self.address(kind)).unlink(missing_ok=True)

    def _start(self) -> Runs:
        self._starts += 1
        env = environment(self._want, self._template, self.ordinal, self._environ)
        argv = [*program(self._template), "serve", "--grpc", f"unix:{self.address('grpc')}",
                "--http", f"unix:{self.address('rest')}", "--admin", f"unix:{self.address('admin')}",
                "--spool", os.path.abspath("spool")]
        self._child = Child(argv, env, workdir(self._template), self._log)
        if self.reason.startswith("killed:"):
            self.reason = "starting"
        return self._child

    async def _watch(self, child: Runs) -> None:
        """Probes until it is ready, then for ever. Cancelled at its end."""
        loop = asyncio.get_running_loop()
        misses, answered = 0, loop.time()
        memory = self._memory()
        stuck_s = self._stuck_s()
        while not child.exited.done():
            await asyncio.sleep(PROBE_S if self.ready else FIRST_PROBE_S)
            try:
                up = await self._probe()
                misses, answered = 0, loop.time()
            except probe.NoAnswer:
                misses += 1
                up = self.ready and misses < MISSES
                if self._ready_since and loop.time() - answered > stuck_s:
                    self.kill(f"killed: it answered no probe for {stuck_s:g} s")
            except Hangs:
                self._set(False, loop.time())
                self.reason = "killed: the code of a model hangs"
                self._changed()
                await child.stop(GRACE_S)  # its other models answer what they have
                return
            if memory and child.pid and (used := _resident(child.pid)) > memory:
                self.kill(f"killed: it used {used >> 20} MiB, more than its limit of {memory >> 20} MiB")
            self._set(up, loop.time())

    def _stuck_s(self) -> float:
        """So long it may answer no probe: code that never lets go of the interpreter cannot be told from a hang."""
        least = float(self._template["limits"].get("timeout_ms", 0)) / 500
        with contextlib.suppress(ValueError):
            return max(float(self._template["env"].get("MODELYARD_STUCK_S") or STUCK_S), least)
        return max(STUCK_S, least)

    def _memory(self) -> int | None:
        """The bytes at which we end it; None when there is no limit, or somebody else sees to it."""
        return in_bytes(self._template["resources"].get("memory"))

    def _set(self, up: bool, now: float) -> None:
        if up == self.ready:
            return
        self.ready = up
        self.reason = "" if up else "answers no probe"
        if up and not self._ready_since:
            self._ready_since = now
        self._changed()

    async def _probe(self) -> bool:
        """Its own word every time; real calls through the data plane before it is believed the first time."""
        if await probe.http(self.address("admin"), "GET", "/readyz", PROBE_TIMEOUT_S) != 200:
            if self._ready_since and await probe.http(self.address("admin"), "GET", "/livez", PROBE_TIMEOUT_S) != 200:
                raise Hangs
            return False
        if self.ready:
            return True
        if await probe.http(self.address("rest"), "GET", "/v2/health/ready", PROBE_TIMEOUT_S) != 200:
            return False
        asked = [None, *self._template.get("serves", [])[:4]]
        return all([await probe.grpc_ready(self.address("grpc"), name, PROBE_TIMEOUT_S) for name in asked])


def _resident(pid: int) -> int:
    """Bytes of memory that are this process's own (files that it maps are not counted)."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * PAGE
