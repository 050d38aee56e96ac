"""DockerfileBuilder: somebody else's builder for Dockerfiles that users bring; what it makes is a base of ours."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import Port

Told = Callable[[str], Awaitable[None]]
"""Hears each line that the builder says, as it says it."""


@dataclass(frozen=True)
class Ask:
    """``context`` is a tar of regular files with a ``Dockerfile`` at its top. ``name`` says whose build it is: the
    builder keeps its own cache of steps by it, that of the last build of each name."""

    context: Path
    name: str


class DockerfileBuilder(Port):
    """Dockerfiles are untrusted: what their steps may reach and use is set where the builder is opened, never by who
    asks. No credential is given to a step."""

    @abstractmethod
    async def inputs(self, images: Sequence[str]) -> str | None:
        """What decides a build beside its context: the builder's own settings, and what these names of images (those
        after ``FROM``) mean to it now. Equal answers: an earlier result will do. None while it has not all of them."""

    @abstractmethod
    async def build(self, ask: Ask, told: Told) -> str:
        """Builds, and returns what ``save`` takes. Raises BuildFailed with the builder's own words: a step that failed,
        a Dockerfile that does not parse, an image that cannot be had, the limits of time and memory; Unavailable when
        the builder is away or lost. Cancelled: the step that runs is killed, and no container is left when it
        returns."""

    @abstractmethod
    async def save(self, image: str, to: Path) -> None:
        """Writes the image to a new file, as ``docker save`` does. Raises NotFound when it is gone, Unavailable."""
