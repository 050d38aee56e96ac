"""What targets of this machine share: one supervisor per deployment, which owns its address and outlives us.

A deployment is a folder ``<runs>/<workspace>/<name>/``: ``desired.json`` (what we want), ``state.json`` and
``ports.json`` (the supervisor's), ``control`` (its socket), ``lock`` (held while it lives), ``logs/``, ``spool/``.
Whoever opens the same data folder finds supervisors by their folders and goes on with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import Conflict, Invalid, NotFound, Unavailable
from ..ports.targets import DeploymentTarget, Observed, Replica, Workload
from . import targets_process_runs as runs
from .folder import in_thread
from .targets_process_logs import LogReader

ANSWER_S = 10.0
STOP_S = 75.0
"""A supervisor gives replicas 27 s to end, and its shipper 5."""
LINE = 1 << 22


class SupervisedTarget(DeploymentTarget):
    """``ends``: closing ends what runs; else it goes on, to be adopted. A kind of target says what a replica is
    started from (``_template``), and what it keeps beside the folders (``_collect``, ``_sweep``)."""

    def __init__(self, name: str, folder: Path, ends: bool) -> None:
        self.name = name
        self._ends = ends
        self._runs = folder
        self._turn: dict[Path, asyncio.Lock] = {}
        self._pinned: Counter[str] = Counter()

    @abstractmethod
    async def _template(self, workload: Workload, run: Path) -> dict[str, Any]:
        """Puts the image in place and says what replicas start from. What of it depends on the kind of target;
        the rest is added here."""

    @abstractmethod
    async def _collect(self) -> None:
        """Takes away what nobody runs from any more, but nothing of the images whose digests are pinned."""

    async def _sweep(self, workspace: str, name: str) -> None:
        """Ends what a supervisor that died left running."""

    async def check(self) -> None:
        try:
            await in_thread(runs.private_folder, self._runs)
        except OSError as exc:
            raise Unavailable(f"{self._runs} cannot be used: {exc}; give another folder with --data") from exc

    async def close(self) -> None:
        """Supervisors go on, and another target on this folder adopts them; or they end (``ends``). Their folders
        stay: ``apply`` brings them back as they were."""
        found = await self._folders() if self._ends else []
        done = await asyncio.gather(*(self._stop(self._run(*one)) for one in found), return_exceptions=True)
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
            poke = {"op": "apply", "environ": _environ_for(workload.secrets)}
            self._pinned[workload.digest] += 1
            try:
                template = await self._template(workload, run)
                await in_thread(runs.write_run, run, _desired(workload, template), workload.grant)
            finally:
                self._pinned -= Counter([workload.digest])
            told = await self._ask(run, poke)
            if told is None:
                await self._sweep(workload.workspace, workload.name)
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
            if await in_thread(run.is_dir):
                await self._stop(run)
                await self._sweep(workspace, name)
                await in_thread(runs.ship, run, name)
                await in_thread(runs.delete, run)
            else:
                with contextlib.suppress(Unavailable):  # its folder comes first; if it was lost, ``list`` still tells
                    await self._sweep(workspace, name)
        self._turn.pop(run, None)
        await self._collect()

    async def _folders(self) -> list[tuple[str, str]]:
        found = await in_thread(lambda: sorted(self._runs.glob("*/*/desired.json")))
        return [(path.parent.parent.name, path.parent.name) for path in found if not path.parent.name.startswith(".")]

    async def logs(self, workspace: str, name: str, tail: int = 100, follow: bool = False) -> AsyncIterator[bytes]:
        run = self._run(workspace, name)
        if not await in_thread(run.is_dir):
            raise NotFound(f"nothing was ever started of the deployment '{name}'", kind="deployment", id=name)
        async for lines in LogReader(run / "logs").read(tail, follow):
            yield lines

    def _run(self, workspace: str, name: str) -> Path:
        if not all(part and part[0] != "." and "/" not in part and "\0" not in part for part in (workspace, name)):
            raise Invalid(f"'{workspace}/{name}' cannot be the name of a folder")
        return self._runs / workspace / name

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

    async def list(self) -> list[tuple[str, str]]:
        return await self._folders()


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


def _desired(workload: Workload, template: Mapping[str, Any]) -> dict[str, Any]:
    """The supervisor's input. Of secrets only where they are found; of capture only what replicas act on."""
    return {
        "workspace": workload.workspace, "name": workload.name, "generation": workload.generation,
        "replicas": workload.replicas, "ports": dict(workload.ports),
        "progress_deadline_s": workload.progress_deadline_s,
        "template": {
            "image": workload.image, "digest": workload.digest, **template,
            "capture": {k: v for k, v in workload.capture.items() if k != "retention_days"},
            "limits": dict(workload.limits), "resources": dict(workload.resources), "env": dict(workload.env),
            "secrets": {k: dict(v) for k, v in workload.secrets.items()},
        },
    }


def _environ_for(secrets_: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables that secrets name, as they are for us now: handed on by socket, never by file."""
    foreign = [name for name, source in secrets_.items() if source.get("kubernetes")]
    if foreign:
        raise Invalid(f"the secrets {', '.join(foreign)} are in Kubernetes; this target reads env and file only")
    names = {source["env"] for source in secrets_.values() if source.get("env")}
    return {name: os.environ[name] for name in names if name in os.environ}
