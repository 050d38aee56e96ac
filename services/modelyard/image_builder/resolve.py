"""The lock of an image: given, of an earlier try of its build, of a build that asked for the same, or resolved now."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import NotFound
from ..core.layout import image_key
from ..core.requirements import constraint, requirement
from ..kernel.service import Context
from . import parts, store, uv
from .locks import EMPTY, Lock, read_lock
from .log import BuildLog
from .memo import Memo, key
from .model import Image
from .pull import Folder
from .sdists import Sdists, by_name

RESOLVED_S = 24 * 3600
SERVER = Path(__file__).parents[1] / "scoring" / "requirements.txt"


@dataclass(frozen=True)
class Resolver:
    """Of one build. ``folder`` makes one for temporary files."""

    ctx: Context
    doc: Image
    log: BuildLog
    memo: Memo
    folder: Folder
    sdists: Sdists

    async def lock(self, given: Lock | None, needs: Collection[str]) -> Lock:
        """The lock, kept where a repeated build finds it. ``needs``: requirements that are not the caller's."""
        where = image_key(self.doc.workspace, self.doc.id, "lock")
        lock = given or await self._stored(where, needs) or await self._resolved(needs)
        await self.ctx.blobs.put(where, store.Chunks(lock.text.encode()))
        names = ", ".join(p.text for p in lock.pins)
        self.log.note(f"locked {len(lock.pins)} packages: {names}" if lock.pins else EMPTY)
        return lock

    async def tools(self, needs: Collection[str]) -> Lock:
        """Of what only the build uses, and the image's own requirements; the same when the build is repeated."""
        where = image_key(self.doc.workspace, self.doc.id, "tools")
        lock = await self._stored(where, needs) or await self._resolved(needs)
        await self.ctx.blobs.put(where, store.Chunks(lock.text.encode()))
        return lock

    async def _stored(self, where: str, needs: Collection[str]) -> Lock | None:
        """What an earlier try resolved; None where that needed something else (a model may have become a graph)."""
        try:
            raw = b"".join([chunk async for chunk in self.ctx.blobs.get(where)])
        except NotFound:
            return None
        lock = read_lock(raw.decode())[0]
        return None if lock.pins and lock.missing(sorted(needs)) else lock

    async def _resolved(self, needs: Collection[str]) -> Lock:
        doc = self.doc
        wanted = sorted(parts.once({*needs, *(requirement(r)[0] for r in doc.requirements)}))
        bounds = sorted({constraint(c)[0] for c in doc.constraints})
        name = key("resolved", wanted, doc.python_version, doc.platform, uv.index(), *([bounds] if bounds else ()))
        for found in (await self.memo.get(name), await self.memo.shared(name)):
            if found and 0 <= time.time() - found["at"] < RESOLVED_S:
                await self.log.line("requirements: the same as of a build of the last 24 hours; its lock is used")
                return read_lock(found["lock"])[0]
        await self.log.line(f"requirements: {', '.join(wanted)}"
                            + (f"; within {', '.join(bounds)}" if bounds else ""))
        folder, sdists = await self.folder(), self.sdists
        lock = sdists.locked(await sdists.with_them(
            lambda links: uv.resolve(wanted, bounds, doc.python_version, doc.platform, folder, self.log, links),
            by_name([*wanted, *bounds])))
        await self.memo.put(name, {"at": time.time(), "lock": lock.text}, shared=True)
        return lock


@functools.cache
def server_requirements() -> Sequence[str]:
    """What the scoring server itself needs. Blocking, once."""
    lines = (line.partition("#")[0].strip() for line in SERVER.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line)
