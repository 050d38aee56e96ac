"""A replica that is a container: the same life as a process's, with other ways to start and to be reached."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..adapters.targets_docker_engine import Engine, Plan
from .container import Container
from .desired import in_bytes
from .plan import environment
from .replica import KINDS, Replica, Runs

INSIDE, SPOOL, COMPILED = "/run/modelyard", "/spool", "/pycache"
engine_at = functools.cache(Engine)
"""One client for all replicas."""


class ContainerReplica(Replica):
    """Its sockets lie in a folder that is its container's own; the engine holds it to its limits."""

    def address(self, kind: str) -> str:
        return str(self._folder / kind)

    @property
    def _folder(self) -> Path:
        return self._sockets / f"{self.name}.{self._starts}"

    def _start(self) -> Runs:
        self._starts += 1
        compiled = Path("compiled", self._template["digest"].removeprefix("sha256:")).absolute()
        for folder in (self._folder, compiled.parent, compiled):
            self._give(folder)
        self.reason = "starting"
        self._child = Container(engine_at(self._template["engine"]), self._plan(compiled), self._log, self._tell)
        return self._child

    def _give(self, folder: Path) -> None:
        user, _, group = self._template["user"].partition(":")
        folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(folder, int(user), int(group))

    def _plan(self, compiled: Path) -> Plan:
        want, template, resources = self._want, self._template, self._template["resources"]
        doors = zip(("grpc", "http", "admin"), KINDS, strict=True)
        return Plan(
            name=f"modelyard-{template['yard']}-{want.workspace}-{want.name}-{self.name}.{self._starts}",
            image=template["image_id"], entry=_compiling(template["entry"]), user=template["user"],
            command=["serve", *(word for option, kind in doors for word in (f"--{option}", f"unix:{INSIDE}/{kind}")),
                     "--spool", SPOOL],
            env={"HOME": "/tmp", **environment(want, template, self.ordinal, self._environ, ())},
            folders={INSIDE: str(self._folder), SPOOL: os.path.abspath("spool"), COMPILED: str(compiled)},
            labels={"yard": template["yard"], "workspace": want.workspace, "deployment": want.name,
                    "generation": str(want.generation), "replica": self.name},
            network=template["network"], cpu=resources.get("cpu"), memory=in_bytes(resources.get("memory")),
            gpu=resources.get("gpu") or 0)

    def _tell(self, why: str) -> None:
        if not self.ready:
            self.reason = why or "starting"

    def _memory(self) -> int | None:
        return None

    def _remove_sockets(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _compiling(entry: Sequence[str]) -> list[str]:
    """The image's root is read-only and holds no compiled code, which takes seconds to make: it is kept for the next
    start, of this image in this deployment alone."""
    return [entry[0], "-X", f"pycache_prefix={COMPILED}", *entry[1:]]
