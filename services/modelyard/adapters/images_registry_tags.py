"""Which tags of a repository have a manifest: asked of the registry once, and remembered where that is safe.

A manifest is only deleted when no other tag has it, and a registry tells what a tag has for one tag a call. So that
the removal of one version does not ask about hundreds of others, a tag that is a number (a version of an image) is
asked about once a process. Such a tag can still move, when a build is repeated: whoever moves one changes the tag
``sha256-moved`` of the repository before and after, and what others remember of the repository is void. The number of
a tag that was removed does not come again. Of all other tags nothing is remembered: anybody may move them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re

from .images_names import MANIFESTS
from .images_registry_http import Door

SIDE_BY_SIDE = 8
PAGE = 1000
MOVED = "sha256-moved"
ABOUT = re.compile(r"^sha256-[0-9a-f]{64}")
"""What a tag begins with whose manifest speaks of another one (OCI's fallback for referrers): it is never that one,
nor speaks of a third."""
VERSION = re.compile(r"^[0-9]+$")
MOST = 200
"""Repositories that are remembered."""


class Tags:
    """Of the repositories behind one door."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._known: dict[str, dict[str, str]] = {}
        self._marks: dict[str, str | None] = {}

    def note(self, name: str, tag: str, digest: str) -> None:
        """The tag has this manifest: we put it."""
        if VERSION.match(tag) and name in self._known:
            self._known[name][tag] = digest

    async def digest(self, name: str, tag: str) -> str | None:
        """What the tag has now, or None."""
        found = await self._door.ask("HEAD", f"/v2/{name}/manifests/{tag}", about=f"tag {tag} of {name}", ok=(200, 404),
                                     repo=name, headers={"Accept": MANIFESTS})
        if found.status == 404:
            return None
        if told := found.headers.get("Docker-Content-Digest", ""):
            return told
        body = await self._door.ask("GET", f"/v2/{name}/manifests/{tag}", about=f"tag {tag} of {name}", repo=name,
                                    headers={"Accept": MANIFESTS})
        return f"sha256:{hashlib.sha256(body.body).hexdigest()}"

    async def others(self, name: str, digest: str, tag: str) -> list[str]:
        """The tags, other than ``tag``, that have the manifest that it has or had."""
        there = await self._all(name)
        known = self._remembered(name, await self.digest(name, MOVED) if MOVED in there else None)
        for gone in known.keys() - set(there):
            del known[gone]
        limit, kind = asyncio.Semaphore(SIDE_BY_SIDE), _about(tag)

        async def one(other: str) -> str | None:
            if (found := known.get(other)) is None:
                async with limit:
                    found = await self.digest(name, other)
                if found is not None and VERSION.match(other):
                    known[other] = found
            return found

        may = [other for other in there if other != tag and other != MOVED and _about(other) == kind]
        found = await asyncio.gather(*(one(other) for other in may))
        return [other for other, has in zip(may, found, strict=True) if has == digest]

    def _remembered(self, name: str, mark: str | None) -> dict[str, str]:
        if name not in self._known or self._marks[name] != mark:
            while len(self._known) >= MOST:
                self._known.pop(next(iter(self._known)))
            self._known[name], self._marks[name] = {}, mark
        return self._known[name]

    async def _all(self, name: str) -> list[str]:
        tags: dict[str, None] = {}
        while True:
            after = f"&last={next(reversed(tags))}" if tags else ""
            page = await self._door.ask("GET", f"/v2/{name}/tags/list?n={PAGE}{after}", ok=(200, 404),
                                        about=f"tags of {name}", repo=name)
            found = (json.loads(page.body) if page.status == 200 else {}).get("tags") or []
            before = len(tags)
            tags.update(dict.fromkeys(found))
            if len(found) < PAGE or len(tags) == before:
                return list(tags)


def _about(tag: str) -> str:
    found = ABOUT.match(tag)
    return found[0] if found else ""
