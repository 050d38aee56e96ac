"""Which repositories of ours have which blobs: so that a blob is mounted from one, not sent again.

What this process put or found is remembered. What was there before it is read off the newest manifests of the
repositories below the prefix, once, where the registry lists them; not knowing costs an upload, nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from ..core.errors import ModelyardError
from .images_names import descriptors

MOST = 50_000
REPOS, TAGS = 64, 2
SIDE_BY_SIDE = 8
REFERRERS = "sha256-"
"""What the tags of documents about images begin with: they hold no layers."""
Json = Callable[[str, str], Awaitable[dict[str, object] | None]]
"""Asks the registry: (repository or "", path) → what it says, None when it does not."""


class Known:
    """``prefix`` is what our repositories' names begin with, "" or ``yard/``."""

    def __init__(self, prefix: str, ask: Json) -> None:
        self._prefix, self._ask = prefix, ask
        self._where: OrderedDict[str, str] = OrderedDict()
        self._read: asyncio.Task[None] | None = None

    def note(self, repo: str, *digests: str) -> None:
        """This repository has these blobs."""
        for digest in digests:
            self._where[digest] = repo
            self._where.move_to_end(digest)
        while len(self._where) > MOST:
            self._where.popitem(last=False)

    def drop(self, digest: str) -> None:
        """What was known of this blob is not so."""
        self._where.pop(digest, None)

    async def where(self, digest: str) -> str | None:
        """A repository that has the blob, as far as is known."""
        if digest not in self._where:
            if self._read is None:
                self._read = asyncio.create_task(self._learn())
            await asyncio.wait({self._read})
        return self._where.get(digest)

    async def close(self) -> None:
        if self._read is not None:
            self._read.cancel()
            await asyncio.gather(self._read, return_exceptions=True)

    async def _learn(self) -> None:
        limit = asyncio.Semaphore(SIDE_BY_SIDE)

        async def one(repo: str) -> None:
            async with limit:
                tags = _texts(await self._ask(repo, f"/v2/{repo}/tags/list"), "tags")
                for tag in [tag for tag in tags if not tag.startswith(REFERRERS)][-TAGS:]:
                    body = await self._ask(repo, f"/v2/{repo}/manifests/{tag}") or {}
                    for part in descriptors(json.loads(json.dumps(body))):
                        self._where.setdefault(str(part["digest"]), repo)

        try:
            listed = await self._ask("", f"/v2/_catalog?n={REPOS}&last={self._prefix.rstrip('/')}")
            ours = [name for name in _texts(listed, "repositories") if name.startswith(self._prefix)]
            await asyncio.gather(*(one(repo) for repo in ours), return_exceptions=True)
        except ModelyardError:
            return


def _texts(found: dict[str, object] | None, key: str) -> list[str]:
    listed = (found or {}).get(key)
    return [str(one) for one in listed] if isinstance(listed, list) else []
