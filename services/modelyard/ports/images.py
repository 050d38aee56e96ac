"""ImageStore: OCI blobs and manifests, in a layout folder or a registry."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterable, AsyncIterator

from . import Port


class ImageStore(Port):
    """``repo`` is an image name; digests are ``sha256:…`` and are checked both ways (else Invalid, and nothing
    is kept)."""

    @abstractmethod
    async def put_blob(self, repo: str, digest: str, chunks: AsyncIterable[bytes]) -> bool:
        """Stores a blob; False when it was there already (then ``chunks`` is not read). Where an upload breaks off and
        cannot be resumed, ``chunks`` that can be iterated over again are read again, and others are Unavailable."""

    @abstractmethod
    def get_blob(self, repo: str, digest: str, start: int = 0) -> AsyncIterator[bytes]:
        """The bytes from ``start``. Raises NotFound. A whole read (start 0) that does not hash to the digest
        raises Invalid at its end."""

    @abstractmethod
    async def put_manifest(self, repo: str, tag: str, manifest: bytes, media_type: str) -> str:
        """Stores the manifest, points ``tag`` at it, returns its digest. Its blobs must be there (else Invalid). What
        the tag pointed at before goes as with ``remove``."""

    @abstractmethod
    async def get_manifest(self, repo: str, reference: str) -> tuple[bytes, str] | None:
        """(bytes, media type) by tag or digest, or None."""

    @abstractmethod
    async def remove(self, repo: str, tag: str) -> None:
        """Takes the tag away, and the manifest when no other tag of the repo has it. Removing twice is fine.

        Blobs that no manifest of any repo needs go as well: at once in a folder; in a registry when its own garbage
        collection runs, for it alone knows what is on its way in. Until then they may still be read by digest."""
