"""A target in memory: replicas are numbers that become ready after a while, and go on when deployers die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from modelyard.core.errors import Conflict, NotFound
from modelyard.ports.targets import DeploymentTarget, Observed, Replica, Workload

START_S = 1.0


@dataclass
class Run:
    workload: Workload
    ready_at: float
    before: Workload | None = None


class Ground:
    """What runs. ``applied`` is every generation that was ever started, in order, for each deployment."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str], Run] = {}
        self.applied: dict[tuple[str, str], list[int]] = {}


class MemoryTarget(DeploymentTarget):
    needs_base = False

    def __init__(self, ground: Ground) -> None:
        self.ground = ground

    async def check(self) -> None:
        return

    async def close(self) -> None:
        return

    async def apply(self, workload: Workload) -> Observed:
        key, now = (workload.workspace, workload.name), asyncio.get_running_loop().time()
        run = self.ground.runs.get(key)
        if run is not None and workload.generation < run.workload.generation:
            raise Conflict(f"generation {run.workload.generation} of '{workload.name}' runs already")
        if run is None or workload.generation > run.workload.generation:
            before = None if run is None else run.workload if run.ready_at <= now else run.before
            self.ground.runs[key] = Run(workload, now + START_S, before)
            self.ground.applied.setdefault(key, []).append(workload.generation)
        return await self.observe(*key)

    async def observe(self, workspace: str, name: str) -> Observed:
        run = self.ground.runs.get((workspace, name))
        if run is None:
            return Observed("absent")
        rolled = run.ready_at <= asyncio.get_running_loop().time()
        serving = run.workload if rolled else run.before
        new = () if rolled else _replicas(run.workload, ready=False)
        old = _replicas(serving, ready=True) if serving else ()
        return Observed("present", run.workload.generation, serving.generation if serving else 0,
                        0 if rolled else run.workload.generation, image=serving.image if serving else "",
                        replicas=old + new, endpoints={"rest": f"memory://{name}"}, ports={"rest": 1})

    async def remove(self, workspace: str, name: str) -> None:
        self.ground.runs.pop((workspace, name), None)

    async def logs(self, workspace: str, name: str, tail: int = 100, follow: bool = False) -> AsyncIterator[bytes]:
        if (workspace, name) not in self.ground.applied:
            raise NotFound(f"'{name}' never ran here", kind="deployment", id=name)
        for generation in self.ground.applied[workspace, name][-tail:]:
            yield f"generation {generation}\n".encode()

    async def list(self) -> list[tuple[str, str]]:
        return sorted(self.ground.runs)


def _replicas(workload: Workload, *, ready: bool) -> tuple[Replica, ...]:
    return tuple(Replica(f"{workload.generation}-{n}", workload.generation, ready) for n in range(workload.replicas))
