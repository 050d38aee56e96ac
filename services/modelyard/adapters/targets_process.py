"""DeploymentTarget ``process://``: replicas are processes of this machine, run by one supervisor per deployment.

Scoring code runs as the user that Modelyard runs as. It is not a sandbox.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from ..core.errors import Unavailable
from ..ports.images import ImageStore
from ..ports.targets import Workload
from . import targets_process_runs as runs
from .folder import in_thread
from .targets_process_roots import Roots
from .targets_process_trees import SharedLayers
from .targets_supervised import SupervisedTarget


class ProcessTarget(SupervisedTarget):
    """One data folder's deployments on this machine, under ``<data>/run``, their images unpacked beside it."""

    needs_base = False

    def __init__(self, name: str, images: ImageStore, data: Path, ends: bool = False,
                 shared: SharedLayers | None = None) -> None:
        super().__init__(name, data.absolute() / "run", ends)
        self._roots = Roots(data.absolute(), images, shared)

    async def check(self) -> None:
        if not sys.platform.startswith("linux"):
            raise Unavailable("the local target needs Linux (x86-64 or arm64)")
        await super().check()

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            with contextlib.suppress(OSError):
                await self._roots.harvest()

    async def _template(self, workload: Workload, run: Path) -> dict[str, Any]:
        root = await self._roots.prepare(workload.repo, workload.digest)
        return {"root": str(root.path), "python": getattr(sys, "_base_executable", sys.executable),
                "image_env": root.env, "serves": [workload.name] if root.score else list(root.models)}

    async def _collect(self) -> None:
        """That it could not is no reason to fail what was asked."""
        keep = await in_thread(runs.roots_in_use, self._runs)
        with contextlib.suppress(OSError):
            await self._roots.collect({*keep, *(self._roots.path(digest) for digest in self._pinned)})
