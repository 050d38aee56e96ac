"""DeploymentTarget ``docker://``: replicas are containers of an engine on this machine.

As for processes, a supervisor per deployment owns the address and relays to replicas by unix sockets, which lie in a
folder that a container shares with it: nothing of a container is published, and a roll loses no call
(docs/decisions/0011-docker-target.md). The shipper runs beside the supervisor, over the spool that containers share.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Self

from ..core.errors import Invalid, ModelyardError, Unavailable
from ..ports.images import ImageStore
from ..ports.targets import Workload
from . import targets_process_runs as runs
from .folder import in_thread
from .targets_docker_engine import LABEL, Engine
from .targets_docker_images import EngineImages
from .targets_supervised import SupervisedTarget

USER = 10001
"""Who scoring code is in a container, when we are root; else who we are: the spool is shared by both."""


class DockerTarget(SupervisedTarget):
    """One data folder's deployments in one engine, under ``<data>/docker/<target>``. ``yard`` tells this folder's
    containers and images from those of other yards in the same engine."""

    def __init__(self, name: str, images: ImageStore, data: Path, ends: bool, engine: Engine,
                 network: str) -> None:
        super().__init__(name, data.absolute() / "docker" / name, ends)
        self.yard = hashlib.sha256(os.fsencode(self._runs)).hexdigest()[:12]
        self._network = network
        self._engine = engine
        self._images = EngineImages(engine, images, f"modelyard-{self.yard}")

    @classmethod
    async def open(cls, url: str, name: str, images: ImageStore, data: Path, ends: bool = False,
                   network: str = "bridge", at_exit: str = "keep") -> Self:
        """``docker://``, ``docker:///PATH/docker.sock``, ``docker://127.0.0.1:PORT``; ``network``: which one of the
        engine's networks containers are in (``none``: they reach nobody). ``at_exit=end``: what runs ends with the
        deployer, drained, and starts with it again: for one in a container, which its supervisors cannot outlive."""
        if at_exit not in ("keep", "end"):
            raise Invalid(f"targets.{name}: at_exit is keep or end, not '{at_exit[:40]}'", field=f"targets.{name}")
        return cls(name, images, data, ends or at_exit == "end", await in_thread(Engine, url), network)

    async def check(self) -> None:
        if not sys.platform.startswith("linux"):
            raise Unavailable("the docker target needs Linux: containers share sockets with this machine")
        await in_thread(self._engine.check)
        await super().check()

    async def list(self) -> list[tuple[str, str]]:
        """Containers without a folder included."""
        found = await in_thread(self._engine.containers, {"yard": self.yard})
        theirs = {(labels[f"{LABEL}workspace"], labels[f"{LABEL}deployment"]) for _, labels in found}
        return sorted({*await self._folders(), *theirs})

    async def _template(self, workload: Workload, run: Path) -> dict[str, Any]:
        await in_thread(self._engine.check)
        placed = await self._images.place(workload.repo, workload.digest)
        root = os.geteuid() == 0
        await in_thread(_give_spool, run / "spool", USER if root else None)
        return {
            "engine": self._engine.host, "image_id": placed.id, "entry": list(placed.entry), "network": self._network,
            "yard": self.yard, "user": f"{USER}:{USER}" if root else f"{os.geteuid()}:{os.getegid()}",
            "root": str(run), "python": sys.executable, "image_env": {},
            "serves": [workload.name] if placed.score else list(placed.models),
        }

    async def _sweep(self, workspace: str, name: str) -> None:
        labels = {"yard": self.yard, "workspace": workspace, "deployment": name}
        left = await in_thread(self._engine.containers, labels)
        await asyncio.gather(*(in_thread(self._engine.remove, id_) for id_, _ in left))

    async def _collect(self) -> None:
        """That it could not is no reason to fail what was asked."""
        keep = {*await in_thread(runs.digests_in_use, self._runs), *self._pinned}
        await in_thread(_forget_compiled, self._runs, keep)
        with contextlib.suppress(ModelyardError):
            await self._images.collect(keep)


def _forget_compiled(folder: Path, keep: set[str]) -> None:
    """What Python compiled of images that are not in use any more."""
    for compiled in folder.glob("*/*/compiled/*"):
        if f"sha256:{compiled.name}" not in keep:
            shutil.rmtree(compiled, ignore_errors=True)


def _give_spool(spool: Path, user: int | None) -> None:
    """Containers write there, as another user than root."""
    runs.private_folder(spool)
    if user is not None:
        os.chown(spool, user, user)
