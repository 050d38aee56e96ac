"""What a service is, and what it is given: two frozen dataclasses, and the one way to change a document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.documents import Document, Where
from ..core.errors import AlreadyApplied, Conflict, Invalid, NotFound
from ..core.events import Envelope, Fact, announce
from ..ports.blobs import BlobStore, CaptureGrants
from ..ports.builders import DockerfileBuilder
from ..ports.images import ImageStore
from ..ports.store import DocumentStore
from ..ports.targets import DeploymentTarget
from .observe import CONFLICTS, current_traceparent
from .wakes import Changes

if TYPE_CHECKING:
    from .forward import Peers
    from .web import Route

D = TypeVar("D", bound=Document)
Change = Callable[[D], tuple[D, Sequence[Fact]] | None]
"""Given the newest document: the next one and what to announce, or None when there is nothing to change."""
RETRIES = 50


async def no_other_images(url: str) -> ImageStore:
    """What a context without adapters says."""
    raise Invalid(f"no other image store can be opened here, {url} neither")


@dataclass(frozen=True)
class Context:
    """What a service may touch. ``store`` holds this service's documents only; services never hold the bus."""

    service: str
    store: DocumentStore
    blobs: BlobStore
    images: ImageStore
    grants: CaptureGrants
    targets: Mapping[str, DeploymentTarget]
    peers: Peers
    data: Path
    wake: Callable[[str], None] = lambda what: None
    """``wake("build")``: somebody has work for that loop, look now."""
    open_images: Callable[[str], Awaitable[ImageStore]] = no_other_images
    """Opens another image store than ``images`` by its URL, to read from; the caller closes it."""
    dockerfiles: DockerfileBuilder | None = None
    """Builds the Dockerfiles that users bring, where the settings name such a builder."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    changes: Changes = field(default_factory=Changes)

    async def commit(self, doc: D, *facts: Fact, cause: str | None = None) -> D:
        """One commit: state, events and cause. Raises what ``DocumentStore.commit`` raises."""
        doc, events = announce(doc, self.service, *facts, traceparent=current_traceparent(), now=self.now())
        try:
            stored = await self.store.commit(doc, events, cause)
        except AlreadyApplied:
            raise
        except Conflict:
            CONFLICTS.labels(self.service, doc.kind).inc()
            raise
        self.changes.tell(doc.kind, doc.workspace, doc.id)
        return stored

    async def change(self, type_: type[D], id: str, fn: Change[D], *, workspace: str = "default",
                     cause: str | None = None) -> D:
        """Reads, applies ``fn``, commits; on Conflict reads again. ``fn`` must be pure. NotFound when absent.

        AlreadyApplied is not an error here: the document as it stands is returned.
        """
        for _ in range(RETRIES):
            doc = await self.store.get(type_, id, workspace=workspace)
            if doc is None:
                raise NotFound(f"there is no {type_.kind} '{id}'", kind=type_.kind, id=id)
            step = fn(doc)
            if step is None:
                return doc
            try:
                return await self.commit(step[0], *step[1], cause=cause)
            except AlreadyApplied:
                return doc
            except Conflict:
                continue
        raise Conflict(f"{type_.kind} '{id}' changes too often; try again")


Handler = Callable[[Context, Envelope], Awaitable[None]]
"""Records intent in milliseconds, commits with ``cause=event.id``, and may be called again for one event."""


@dataclass(frozen=True)
class Loop:
    """Converges documents of one type. Work is what is ``due``; the kernel leases, renews, repeats, backs off.

    ``step`` acts through ports and gives back how to settle: a pure Change, applied by the kernel to the newest
    document (re-read and re-applied on Conflict). The kernel clears lease and attempts with it and sets ``due``
    to what the Change left when it moved it, else None. A step that raises is tried again with back-off.
    """

    name: str
    of: type[Document]
    step: Callable[[Context, Any], Awaitable[Change[Any]]]
    where: Where = field(default_factory=dict)
    mine: Callable[[Context, Any], bool] = lambda ctx, doc: True
    """Whether this process may take a document that is due; what it leaves alone is another's."""
    parallel: int = 4
    lease_s: float = 15.0
    every_s: float = 0.5
    max_backoff_s: float = 60.0


@dataclass(frozen=True)
class Service:
    """A room, declared. ``owns`` are the route prefixes that other services forward here."""

    name: str
    documents: tuple[type[Document], ...]
    owns: tuple[str, ...]
    routes: Callable[[Context], Sequence[Route]]
    handlers: Mapping[str, Handler] = field(default_factory=dict)
    loops: tuple[Loop, ...] = ()


