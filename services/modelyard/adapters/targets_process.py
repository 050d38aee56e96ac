"""DeploymentTarget ``process://``: replicas are processes of this machine, run by one supervisor per deployment.

``<data>/run/<workspace>/<name>/`` is all there is of a deployment: ``desired.json`` (what we want), ``state.json``
and ``ports.json`` (the supervisor's), ``control`` (its socket), ``lock`` (held while it lives), ``logs/``, ``spool/``.
Supervisors outlive us: whoever opens the same data folder finds them by their folders and goes on with them.
Scoring code runs as the user that Modelyard runs as. It is not a sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import Conflict, Invalid, NotFound, Unavailable
from ..ports.images import ImageStore
from ..ports.targets import DeploymentTarget, Observed, Replica, Workload
from . import targets_process_runs as runs
from .folder import in_thread
from .targets_process_logs import LogReader
from .targets_process_roots import Root, Roots
from .targets_process_trees import SharedLayers

ANSWER_S = 10.0
STOP_S = 75.0
"""A supervisor gives replicas 27 s to end, and its shipper 5."""
LINE = 1 << 22


class ProcessTarget(DeploymentTarget):
    """One data folder's deployments on this machine. ``ends``: closing ends them; else they go on, to be adopted."""

    def __init__(self, name: str, images: ImageStore, data: Path, ends: bool = False,
                 shared: SharedLayers | None = None) -> None:
        self.name = name
        self._ends = ends
        self._data = data.absolute()
        self._runs = self._data / "run"
        self._images = images
        self._roots = Roots(self._data, images, shared)
        self._turn: dict[Path, asyncio.Lock] = {}
        self._pinned: Counter[Path] = Counter()

    async def check(self) -> None:
        if not sys.platform.startswith("linux"):
            raise Unavailable("the local target needs Linux (x86-64 or arm64)")
        try:
            await in_thread(runs.private_folder, self._runs)
        except OSError as exc:
            raise Unavailable(f"{self._runs} cannot be used: {exc}; give another folder with --data") from exc

    async def close(self) -> None:
        """Supervisors go on, and another ProcessTarget on this folder adopts them; or they end (``ends``). Their
        folders stay: ``apply`` brings them back as they were."""
        found = await self.list() if self._ends else []
        done = await asyncio.gather(*(self._stop(self._run(*one)) for one in found), return_exceptions=True)
        await self._harvest()
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome

    async def apply(self, workload: Workload) -> Observed:
        run = self._run(workload.workspace, workload.name)
        async with self._turn.setdefault(run, asyncio.Lock()):
            before = await in_thread(runs.read_json, run / "desired.json")
            if before is not None and workload.generation < before["generation"]:
                raise Conflict(f"generation {before['generation']} of '{workload.name}' runs; "
                               f"{workload.generation} is older")
            environ = _environ_for(workload.secrets)
            pin = self._roots.path(workload.digest)
            self._pinned[pin] += 1
            try:
                root = await self._roots.prepare(workload.repo, workload.digest)
                await in_thread(runs.write_run, run, _desired(workload, root), workload.grant)
            finally:
                self._pinned -= Counter([pin])
            poke = {"op": "apply", "environ": environ}
            told = await self._ask(run, poke)
            if told is None:
                await in_thread(runs.start, run, workload.name)
                told = await self._ask(run, poke)
            if told is None:
                raise Unavailable(f"the supervisor of '{workload.name}' ended at its start; see {run / 'logs'}")
        await self._collect()
        return _observed(told)

    async def observe(self, workspace: str, name: str) -> Observed:
        told = await self._ask(self._run(workspace, name), {"op": "observe"})
        return Observed("absent") if told is None else _observed(told)

    async def remove(self, workspace: str, name: str) -> None:
        run = self._run(workspace, name)
        async with self._turn.setdefault(run, asyncio.Lock()):
            if not await in_thread(run.is_dir):
                return
            await self._stop(run)
            await in_thread(runs.ship, run, name)
            await in_thread(runs.delete, run)
        self._turn.pop(run, None)
        await self._collect()

    async def logs(self, workspace: str, name: str, tail: int = 100, follow: bool = False) -> AsyncIterator[bytes]:
        run = self._run(workspace, name)
        if not await in_thread(run.is_dir):
            raise NotFound(f"nothing was ever started of the deployment '{name}'", kind="deployment", id=name)
        async for lines in LogReader(run / "logs").read(tail, follow):
            yield lines

    async def list(self) -> list[tuple[str, str]]:
        found = await in_thread(lambda: sorted(self._runs.glob("*/*/desired.json")))
        return [(path.parent.parent.name, path.parent.name) for path in found if not path.parent.name.startswith(".")]

    def _run(self, workspace: str, name: str) -> Path:
        if not all(part and part[0] != "." and "/" not in part and "\0" not in part for part in (workspace, name)):
            raise Invalid(f"'{workspace}/{name}' cannot be the name of a folder")
        return self._runs / workspace / name

    async def _collect(self) -> None:
        """What nobody runs from any more goes away. That it could not is no reason to fail what was asked."""
        keep = await in_thread(runs.roots_in_use, self._runs)
        with contextlib.suppress(OSError):
            await self._roots.collect({*keep, *self._pinned})

    async def _harvest(self) -> None:
        with contextlib.suppress(OSError):
            await self._roots.harvest()

    async def _ask(self, run: Path, what: Mapping[str, Any], within_s: float = ANSWER_S) -> dict[str, Any] | None:
        """The supervisor's answer, None when there is none. Unavailable when it is there and does not answer."""
        try:
            async with asyncio.timeout(within_s):
                reader, writer = await _connect(run)
                try:
                    writer.write(json.dumps(what).encode() + b"\n")
                    line = await reader.readline()
                finally:
                    writer.close()
        except (FileNotFoundError, NotADirectoryError, ConnectionError):
            return None
        except (OSError, TimeoutError) as exc:
            raise Unavailable(f"the supervisor in {run} does not answer: {exc or 'too slow'}") from exc
        if not line:
            return None
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise Unavailable(f"the supervisor in {run}: {told['error']}")
        return told

    async def _stop(self, run: Path) -> None:
        """Ended when it returns: its lock is free."""
        await self._ask(run, {"op": "stop"}, STOP_S)
        await in_thread(runs.wait_free, run, STOP_S)


async def _connect(run: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """By way of the folder's descriptor, since a socket's path has at most 107 bytes and a folder's may be longer."""
    folder = await in_thread(os.open, run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return await asyncio.open_unix_connection(f"/proc/self/fd/{folder}/control", limit=LINE)
    finally:
        os.close(folder)


def _observed(told: Mapping[str, Any]) -> Observed:
    ports: dict[str, int] = told["ports"]
    return Observed(
        "present", generation=told["generation"], serving=told["serving"], candidate=told["candidate"],
        failed=told["failed"], image=told["image"], replicas=tuple(Replica(**r) for r in told["replicas"]), ports=ports,
        endpoints={"grpc": f"127.0.0.1:{ports['grpc']}", "rest": f"http://127.0.0.1:{ports['rest']}"},
    )


def _desired(workload: Workload, root: Root) -> dict[str, Any]:
    """The supervisor's input. Of secrets only where they are found; of capture only what replicas act on."""
    return {
        "workspace": workload.workspace, "name": workload.name, "generation": workload.generation,
        "replicas": workload.replicas, "ports": dict(workload.ports),
        "progress_deadline_s": workload.progress_deadline_s,
        "template": {
            "image": workload.image, "digest": workload.digest, "root": str(root.path),
            "python": getattr(sys, "_base_executable", sys.executable), "image_env": root.env,
            "serves": [workload.name] if root.score else list(root.models),
            "capture": {k: v for k, v in workload.capture.items() if k != "retention_days"},
            "limits": dict(workload.limits), "resources": dict(workload.resources), "env": dict(workload.env),
            "secrets": {k: dict(v) for k, v in workload.secrets.items()},
        },
    }


def _environ_for(secrets_: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables that secrets name, as they are for us now: handed on by socket, never by file."""
    foreign = [name for name, source in secrets_.items() if source.get("kubernetes")]
    if foreign:
        raise Invalid(f"the secrets {', '.join(foreign)} are in Kubernetes; the local target reads env and file only")
    names = {source["env"] for source in secrets_.values() if source.get("env")}
    return {name: os.environ[name] for name in names if name in os.environ}
