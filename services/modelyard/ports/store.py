"""DocumentStore: state. The atomic unit is one document."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..core.documents import Document, Where
from ..core.events import Envelope
from . import Port

D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class Pending:
    """Events of one document that nobody has published yet, in the order of their commits."""

    workspace: str
    kind: str
    id: str
    events: tuple[Envelope, ...]


class DocumentStore(Port):
    """Documents of one service, by (workspace, kind, id).

    A stored record is the body, the revision, the outbox (events not yet published) and the causes (the last
    256 event ids that this document handled). Callers never see outbox or causes.
    Raises Unavailable when the store does not answer, Invalid for a filter on a field that is not indexed.
    Not promised: any order between documents, or a snapshot over several of them.
    """

    @abstractmethod
    async def get(self, type_: type[D], id: str, *, workspace: str = "default", tombstone: bool = False) -> D | None:
        """The newest committed state, or None. A deleted document is given only when ``tombstone`` is set."""

    @abstractmethod
    async def find(
        self,
        type_: type[D],
        where: Where | None = None,
        *,
        workspace: str | None = "default",
        order: str = "id",
        after: tuple[str | int | float, str] | None = None,
        limit: int = 100,
        tombstones: bool = False,
    ) -> list[D]:
        """Up to ``limit`` documents that match every term of ``where`` (grammar: ``core.documents.Where``).

        ``order`` is an indexed scalar field, ``-`` before it for descending; ties go by id in the same
        direction. ``after`` is the last document's (order field's value, id) and continues behind it: a walk
        during inserts misses nothing that was there when it began and repeats nothing.
        Times compare as RFC 3339 text. ``workspace=None`` crosses workspaces: loops only.
        Documents without the order field are left out when it is not ``id``. Uses indexes, never a scan.
        A document that this version cannot read is left out, logged by its key and counted
        (``modelyard_documents_unreadable``); ``limit=1`` asks for one, and raises Invalid (``unreadable``) as ``get``.
        """

    @abstractmethod
    async def commit(self, doc: D, events: Sequence[Envelope] = (), cause: str | None = None) -> D:
        """Writes state, events and cause in one write: together or not at all. Returns the next revision.

        ``doc.revision`` 0 creates, else it must be the stored one; otherwise Conflict and no change. Creating
        over a tombstone needs the tombstone's revision. ``cause`` seen before on this document:
        AlreadyApplied and no change. Deleting is the commit of ``deleted=True``.
        Durable against the death of this process when it returns.
        """

    @abstractmethod
    async def pending(self, limit: int, wait: float = 0.0) -> list[Pending]:
        """Up to ``limit`` documents with unpublished events, the longest waiting first; all workspaces.

        When there is none, waits up to ``wait`` seconds for the first: a commit through this store is seen at once,
        one through another store of the service within a second. With ``wait``, what another store committed a
        moment ago may be left to it first.
        """

    @abstractmethod
    async def sent(self, pending: Pending) -> None:
        """These events are on the bus: takes them out of the outbox. Changes no revision; repeating is fine."""
