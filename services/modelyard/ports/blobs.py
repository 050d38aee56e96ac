"""BlobStore: bytes under keys. CaptureGrants: leave to add to one deployment's capture, and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from datetime import datetime

from . import Port


@dataclass(frozen=True)
class Blob:
    """A blob's name and size in bytes."""

    key: str
    size: int
    modified: datetime


class BlobStore(Port):
    """Keys are ``/``-separated relative paths without ``.`` or ``..`` (else Invalid). Streams both ways.

    Raises Unavailable when the store does not answer or is full (the message says which).
    """

    @abstractmethod
    async def put(self, key: str, chunks: AsyncIterable[bytes], if_absent: bool = False) -> bool:
        """Stores the whole stream, readable when it returns; True when this call wrote it.

        With ``if_absent`` and a blob there: False, and the blob is untouched. A stream that raises, or a crash,
        leaves no partial object.
        """

    @abstractmethod
    def get(self, key: str, start: int = 0) -> AsyncIterator[bytes]:
        """The bytes from offset ``start``, in chunks. Raises NotFound before the first chunk.

        Of one version: a blob that is replaced meanwhile is read on as it was, or the read raises Unavailable.
        """

    @abstractmethod
    async def stat(self, key: str) -> Blob | None:
        """Its size and time, or None."""

    @abstractmethod
    def list(self, prefix: str = "", after: str = "") -> AsyncIterator[Blob]:
        """Blobs whose key starts with ``prefix`` and sorts after ``after`` (as text), sorted by key."""

    @abstractmethod
    async def delete(self, key: str) -> None:
        """Gone when it returns; deleting what is not there is fine."""


class CaptureGrants(Port):
    """Lends write access to ``capture/<deployment>/`` to a shipper that runs beside user code."""

    @abstractmethod
    async def lend(self, workspace: str, deployment: str, seconds: int) -> str:
        """A URL that can create new objects in that deployment's ``.segments/`` for ``seconds``, nothing else.

        Lending again renews. Raises Unavailable.
        """

    @abstractmethod
    async def revoke(self, workspace: str, deployment: str) -> None:
        """No URL lent before works any more. Revoking what was never lent is fine."""
