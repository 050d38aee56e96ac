"""BlobStore on Azure Blob Storage: block blobs, streamed both ways."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from azure.core import MatchConditions
from azure.core import exceptions as azure
from azure.storage.blob import BlobBlock
from azure.storage.blob.aio import BlobClient, ContainerClient

from ..core.errors import Invalid, NotFound, Unavailable
from ..ports.blobs import Blob, BlobStore
from .blobs_azure_link import Link, error_code
from .blobs_dir import CONTROL, check_key

BLOCK = 8 << 20
"""Up to this size a blob is one Put Blob; above it goes in blocks of this size, ``PARALLEL`` of them at once."""
PARALLEL = 3
Captures = list[tuple[str, str]]
ABSENT = {"match_condition": MatchConditions.IfMissing}
"""``If-None-Match: *``"""
TAKEN = (azure.ResourceExistsError, azure.ResourceModifiedError)


class AzureBlobs(BlobStore):
    """Opened by ``AzureBlobs.open``. A large blob is readable when its block list is committed, all of it at once.

    A blob that is replaced while it is read: the reader gets Unavailable, never a mix of two versions.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    @classmethod
    async def open(cls, url: str, *, timeout_s: float = 20.0) -> AzureBlobs:
        """``azure://[ACCOUNT:KEY@]HOST[:PORT][/ACCOUNT]/CONTAINER``; without a key, DefaultAzureCredential."""
        return cls(await Link.open(url, timeout_s))

    async def check(self) -> None:
        container = await self._link.container(self._link.place.container)
        with self._link.ours("check"):
            await container.get_container_properties()

    async def close(self) -> None:
        await self._link.close()

    async def put(self, key: str, chunks: AsyncIterable[bytes], if_absent: bool = False) -> bool:
        check_key(key)
        condition: dict[str, Any] = ABSENT if if_absent else {}
        client = (await self._link.of_key(key, make=True)).get_blob_client(key)
        if if_absent and await self.stat(key) is not None:
            return False
        blocks = _Blocks(self._link, client)
        try:
            waiting = bytearray()
            async for chunk in chunks:
                waiting += chunk
                while len(waiting) >= BLOCK:
                    await blocks.add(bytes(waiting[:BLOCK]))
                    del waiting[:BLOCK]
            with self._link.ours(f"'{key}'"):
                try:
                    if blocks.ids:
                        await blocks.commit(bytes(waiting), condition)
                    else:
                        await client.upload_blob(bytes(waiting), overwrite=not if_absent, length=len(waiting))
                except TAKEN:
                    return False
            return True
        finally:
            await blocks.end()

    async def get(self, key: str, start: int = 0) -> AsyncIterator[bytes]:
        check_key(key)
        client = (await self._link.of_key(key)).get_blob_client(key)
        with self._link.ours(f"'{key}'"):
            try:
                stream = await client.download_blob(offset=start or None)
            except azure.ResourceNotFoundError as exc:
                raise NotFound(f"there is no blob '{key}'", key=key) from exc
            except azure.HttpResponseError as exc:
                if exc.status_code == 416 and await self.stat(key) is not None:  # nothing behind its end
                    return
                raise
        pieces = aiter(stream.chunks())
        while True:
            with self._link.ours(f"'{key}'"):
                try:
                    piece = await anext(pieces, None)
                except azure.ResourceModifiedError as exc:
                    raise Unavailable(f"'{key}' was replaced while it was read; read it again") from exc
            if piece is None:
                return
            if piece:
                yield piece

    async def stat(self, key: str) -> Blob | None:
        check_key(key)
        client = (await self._link.of_key(key)).get_blob_client(key)
        with self._link.ours(f"'{key}'"):
            try:
                found = await client.get_blob_properties()
            except azure.ResourceNotFoundError:
                return None
        return Blob(key, found.size, found.last_modified)

    async def list(self, prefix: str = "", after: str = "") -> AsyncIterator[Blob]:
        if prefix.startswith("/") or any(part in (".", "..") for part in prefix.split("/")) or CONTROL.search(prefix):
            raise Invalid(f"'{prefix}' is not the beginning of a blob key")
        name, about = self._link.container_of(prefix)
        if about is not None:
            async for blob in self._of(name, prefix, after):
                yield blob
            return
        captures = await self._captures(prefix, after)
        async for blob in self._of(name, prefix, after):
            while captures and captures[0][0] < blob.key:
                async for captured in self._of(captures.pop(0)[1], prefix, after):
                    yield captured
            yield blob
        for _, container in captures:
            async for captured in self._of(container, prefix, after):
                yield captured

    async def _captures(self, prefix: str, after: str) -> Captures:
        """(prefix of its keys, container) of the deployments whose capture the list reaches, sorted by key: each lies
        in the list as one piece, between two keys of the main container."""
        if not re.match(r"^(c|w|\Z)", prefix):
            return []
        found = (await self._link.captures()).items()
        return sorted((keys, name) for keys, name in found
                      if keys.startswith(prefix) and (keys > after or after.startswith(keys)))

    async def _of(self, container: str, prefix: str, after: str) -> AsyncIterator[Blob]:
        client: ContainerClient = self._link.client.get_container_client(container)
        pages = aiter(client.list_blobs(name_starts_with=prefix or None))
        while True:
            with self._link.ours(f"a list of '{prefix}'"):
                try:
                    item = await anext(pages, None)
                except azure.ResourceNotFoundError:  # no container: nothing was put yet
                    return
            if item is None:
                return
            if item.name > after:
                yield Blob(item.name, item.size, item.last_modified)

    async def delete(self, key: str) -> None:
        check_key(key)
        client = (await self._link.of_key(key)).get_blob_client(key)
        with self._link.ours(f"'{key}'"):
            try:
                await client.delete_blob()
            except azure.ResourceNotFoundError:
                return


class _Blocks:
    """The blocks of one upload on their way. Their names are this upload's own; what is not committed the service
    forgets after a week."""

    def __init__(self, link: Link, client: BlobClient) -> None:
        self._link, self._client = link, client
        self._mark = uuid.uuid4().hex
        self.ids: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(self, data: bytes) -> None:
        """Waits while as many as may be are on their way. Raises what one of them met."""
        self.ids.append(f"{self._mark}-{len(self.ids):06}")
        self._tasks.add(asyncio.create_task(self._stage(self.ids[-1], data)))
        while len(self._tasks) >= PARALLEL:
            await self._some()

    async def _stage(self, name: str, data: bytes) -> None:
        with self._link.ours(f"'{self._client.blob_name}'"):
            await self._client.stage_block(name, data, length=len(data))

    async def _some(self) -> None:
        done, self._tasks = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def commit(self, rest: bytes, condition: dict[str, Any]) -> None:
        """All of it is the blob from now on. When another writer committed meanwhile, our blocks are gone: that is
        TAKEN with a condition, and Unavailable without."""
        if rest:
            await self.add(rest)
        while self._tasks:
            await self._some()
        try:
            await self._client.commit_block_list([BlobBlock(name) for name in self.ids], **condition)
        except azure.HttpResponseError as exc:
            if error_code(exc) == "InvalidBlockList" and condition:
                raise azure.ResourceExistsError("another writer was first") from exc
            if error_code(exc) == "InvalidBlockList":
                name = self._client.blob_name
                raise Unavailable(f"another writer replaced '{name}' meanwhile; put it again") from exc
            raise

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
