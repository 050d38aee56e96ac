"""A replica that is a container: the same life as a process's, with other ways to start and to be reached."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

from ..adapters.targets_docker_engine import Engine, Plan
from .container import Container
from .desired import in_bytes
from .plan import environment
from .replica import KINDS, Replica, Runs

INSIDE, SPOOL = "/run/modelyard", "/spool"
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
        template = self._template
        user, _, group = template["user"].partition(":")
        self._folder.mkdir(mode=0o700)
        os.chown(self._folder, int(user), int(group))
        want, resources = self._want, template["resources"]
        labels = {"yard": template["yard"], "workspace": want.workspace, "deployment": want.name,
                  "generation": str(want.generation), "replica": self.name}
        plan = Plan(
            name=f"modelyard-{template['yard']}-{want.workspace}-{want.name}-{self.name}.{self._starts}",
            image=template["image_id"], entry=template["entry"], labels=labels, user=template["user"],
            command=["serve", *(part for kind, name in zip(("grpc", "http", "admin"), KINDS, strict=True)
                                for part in (f"--{kind}", f"unix:{INSIDE}/{name}")), "--spool", SPOOL],
            env={"HOME": "/tmp", **environment(want, template, self.ordinal, self._environ, ())},
            folders={INSIDE: str(self._folder), SPOOL: os.path.abspath("spool")}, network=template["network"],
            cpu=resources.get("cpu"), memory=in_bytes(resources.get("memory")), gpu=resources.get("gpu") or 0)
        self.reason = "starting"
        self._child = Container(engine_at(template["engine"]), plan, self._log, self._tell)
        return self._child

    def _tell(self, why: str) -> None:
        if not self.ready:
            self.reason = why or "starting"

    def _memory(self) -> int | None:
        return None

    def _remove_sockets(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
