"""A store that is opened when its server answers: services start in any order, and wait for what is missing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..core.documents import Document, Where
from ..core.errors import Unavailable
from ..core.events import Envelope
from ..ports.store import DocumentStore, Pending

D = TypeVar("D", bound=Document)
AGAIN_S = 1.0
"""So long the last failure is told to everybody who asks, before the server is tried again."""


class LateStore(DocumentStore):
    """Until ``open`` succeeds every call raises what it met, Unavailable; from then on it is the opened store."""

    def __init__(self, open: Callable[[], Awaitable[DocumentStore]]) -> None:
        self._open = open
        self._store: DocumentStore | None = None
        self._alone = asyncio.Lock()
        self._failed: tuple[float, Unavailable] | None = None
        self._closed = False

    async def _opened(self) -> DocumentStore:
        if self._store is not None:
            return self._store
        async with self._alone:
            if self._store is None:
                self._store = await self._attempt()
            return self._store

    async def _attempt(self) -> DocumentStore:
        if self._closed:
            raise Unavailable("the store is closed")
        if self._failed is not None and time.monotonic() - self._failed[0] < AGAIN_S:
            raise self._failed[1]
        try:
            return await self._open()
        except Unavailable as exc:
            self._failed = time.monotonic(), exc
            raise

    async def check(self) -> None:
        await (await self._opened()).check()

    async def close(self) -> None:
        self._closed = True
        async with self._alone:
            if self._store is not None:
                await self._store.close()

    async def get(self, type_: type[D], id: str, *, workspace: str = "default", tombstone: bool = False) -> D | None:
        return await (await self._opened()).get(type_, id, workspace=workspace, tombstone=tombstone)

    async def find(self, type_: type[D], where: Where | None = None, *, workspace: str | None = "default",
                   order: str = "id", after: tuple[str | int | float, str] | None = None, limit: int = 100,
                   tombstones: bool = False) -> list[D]:
        return await (await self._opened()).find(type_, where, workspace=workspace, order=order, after=after,
                                                 limit=limit, tombstones=tombstones)

    async def commit(self, doc: D, events: Sequence[Envelope] = (), cause: str | None = None) -> D:
        return await (await self._opened()).commit(doc, events, cause)

    async def pending(self, limit: int, wait: float = 0.0) -> list[Pending]:
        return await (await self._opened()).pending(limit, wait)

    async def sent(self, pending: Pending) -> None:
        await (await self._opened()).sent(pending)
