"""DeploymentTarget: a place where replicas run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..core.attest import PublicKey
from . import Port


@dataclass(frozen=True)
class Workload:
    """What should run: everything a target needs, resolved. A target is given a digest, never a reference."""

    workspace: str
    name: str
    generation: int
    image: str                    # iris-scorer:7
    repo: str                     # iris-scorer
    digest: str                   # sha256:… of the manifest, in the ImageStore that the target was built with
    replicas: int
    models: tuple[str, ...]       # ("iris:4",)
    ports: Mapping[str, int]      # {"grpc": 8081, "rest": 8080}: kept in the document, chosen by ``apply`` when empty
    capture: Mapping[str, Any]    # core.specs.Capture as JSON
    limits: Mapping[str, Any]     # core.specs.Limits as JSON
    resources: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Any] = field(default_factory=dict)   # name -> core.specs.Secret as JSON; resolved at start
    grant: str = ""               # the capture URL lent to the shipper
    progress_deadline_s: int = 600


@dataclass(frozen=True)
class Replica:
    """One process or container. ``ready`` only after a real scoring-server probe."""

    name: str
    generation: int
    ready: bool
    pid: int | None = None
    restarts: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Observed:
    """What is there. ``serving`` is the generation that answers calls (0: none); ``candidate`` the one still on
    its way (0: none). ``failed`` says why the newest generation was given up ("": it was not)."""

    state: Literal["absent", "present"]
    generation: int = 0
    serving: int = 0
    candidate: int = 0
    failed: str = ""
    image: str = ""
    replicas: tuple[Replica, ...] = ()
    endpoints: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)

    @property
    def ready(self) -> int:
        """Replicas of the serving generation that are ready."""
        return sum(r.ready and r.generation == self.serving for r in self.replicas)


class DeploymentTarget(Port):
    """Declarative: ``apply`` says what should run and returns soon; ``observe`` says what does."""

    needs_base: ClassVar[bool] = True
    """Whether an image must bring its operating system (its ``base``). Not where replicas are processes of a machine
    that has one: there an image with a base runs as well, without it."""

    signed_by: Sequence[PublicKey] = ()
    """Only images whose provenance one of these keys signed may run here; none: any may. The deployer sees to it. Every
    target's URL may set it: ``?require_signed=/etc/modelyard/yard.pub``, a file of public keys."""

    @abstractmethod
    async def apply(self, workload: Workload) -> Observed:
        """Starts converging. Repeating is fine. A new generation rolls: the old serves until the new one passes a
        real probe, without a failed call; when that does not happen within ``progress_deadline_s``, the new
        replicas stop, the old go on, and ``observe`` gives the reason in ``failed``.
        A generation below what runs: Conflict. A port that another program holds: Invalid, naming it.
        """

    @abstractmethod
    async def observe(self, workspace: str, name: str) -> Observed:
        """Never raises for what is absent: it says so."""

    @abstractmethod
    async def remove(self, workspace: str, name: str) -> None:
        """Drains and stops everything of it; returns when it is gone. Removing twice is fine."""

    @abstractmethod
    def logs(self, workspace: str, name: str, tail: int = 100, follow: bool = False) -> AsyncIterator[bytes]:
        """The replicas' output, lines prefixed with the replica's name. NotFound when there never was one."""

    @abstractmethod
    async def list(self) -> list[tuple[str, str]]:
        """(workspace, name) of everything of ours that is there, wanted or not: finds orphans."""
