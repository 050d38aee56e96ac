"""The layers of an image's locked packages: of an earlier build here, of one in another data folder, or made now.

Which of the three it was never shows in the image: the layers are named by what they are made from, and the image
store checks each digest as it takes them in.
"""

from __future__ import annotations

import asyncio
import csv
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion

from ..core.errors import BuildFailed, Invalid
from ..kernel.cache import Cache
from ..kernel.service import Context
from . import parts, store, uv
from .locks import Lock, read_lock
from .log import BuildLog
from .memo import Memo, key
from .model import Image
from .sdists import Sdists
from .suites import unused
from .tarring import PACKER, Entry, Layer, tar
from .wheels import LARGE, Distribution, clashing, distributions, grouped, taken_from

FORMAT = 5
BLOBS = "blobs-v1"
_BUSY: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()


def told(layer: Layer) -> str:
    """For the log."""
    return f"layer {layer.title}: {layer.size / 1e6:.2f} MB, {layer.digest[:19]}"


@dataclass(frozen=True)
class Environments:
    """The environments of one build. ``cache`` is the user's; the memo is the data folder's, with the cache behind."""

    ctx: Context
    doc: Image
    log: BuildLog
    memo: Memo
    cache: Cache
    sdists: Sdists

    async def of(self, lock: Lock, folder: Callable[[], Awaitable[Path]],
                 ) -> tuple[list[Layer], list[dict[str, str]], Lock]:
        """Layers in the store, the packages in them, and the lock with the hashes of what was built from source.
        ``folder`` makes one for temporary files."""
        name = key("env", FORMAT, lock.digest, self.doc.python_version, self.doc.platform, LARGE, *PACKER)
        async with _BUSY.setdefault(name, asyncio.Lock()):
            found = await self.memo.get(name)
            if found is not None and await store.there(self.ctx, self.doc, store.unpack(found["layers"])):
                await self.log.line(f"environment: {len(found['layers'])} layers of an earlier build")
            else:
                found = await self.cached(name) or await self.install(lock, await folder())
                await self.memo.put(name, found, shared=True)
        whole = read_lock(found["lock"])[0] if "lock" in found else lock
        return store.unpack(found["layers"]), found["packages"], whole

    async def cached(self, name: str) -> dict[str, Any] | None:
        """What another data folder's build made, now in this one's store. None when it is not whole."""
        found: dict[str, Any] | None = await self.memo.shared(name)
        if found is None:
            return None
        limit = asyncio.Semaphore(store.UPLOADS)

        async def one(layer: Layer) -> bool:
            async with limit:
                return await self.take(layer)

        if not all(await store.together([one(layer) for layer in store.unpack(found["layers"])])):
            return None
        await self.log.line(f"environment: {len(found['layers'])} layers of an earlier build, from the user's cache")
        return found

    async def take(self, layer: Layer) -> bool:
        """One layer from the cache into the store; False when it is not there, or not what it was."""
        path = await asyncio.to_thread(self.cache.find, BLOBS, _hex(layer))
        if path is None:
            return await store.there(self.ctx, self.doc, [layer])
        try:
            await self.ctx.images.put_blob(self.doc.repo, layer.digest, store.Chunks(path))
        except (Invalid, OSError):
            await asyncio.to_thread(self.cache.drop, BLOBS, _hex(layer))
            return False
        return True

    async def wheels(self, lock: Lock, folder: Path, links: Path | None) -> dict[str, str]:
        """File name → sha256 of what may be installed, where the lock leaves a choice; nothing when it is not told:
        the bill of materials then goes without those hashes, and says so in the log."""
        if all(len(pin.hashes) == 1 for pin in lock.pins):
            return {}
        try:
            return await uv.wheels(lock, self.doc.python_version, self.doc.platform, folder, self.log, links)
        except (BuildFailed, ValueError, OSError) as exc:
            if isinstance(exc, BuildFailed) and exc.detail.get("lacking"):
                raise
            await self.log.line(f"warning: the bill of materials will not tell the hashes of all wheels: {exc}")
            return {}

    async def install(self, lock: Lock, folder: Path) -> dict[str, Any]:
        """uv unpacks the wheels, and they become layers."""
        async def both(links: Path | None) -> list[Any]:
            whole = self.sdists.locked(lock, given=True)
            return [*await store.together([
                uv.install(whole, self.doc.python_version, self.doc.platform, folder, self.log, links),
                self.wheels(whole, folder, links)]), links]

        root, wheels, links = await self.sdists.with_them(both, {p.name: p.text for p in lock.pins},
                                                   {p.name: p.hashes for p in lock.pins})
        whole = self.sdists.locked(lock, given=True)
        assert isinstance(root, Path) and isinstance(wheels, dict)
        try:
            left = await asyncio.to_thread(unused, root)
            found = await asyncio.to_thread(distributions, root, self.doc.python_version, left)
        except (KeyError, ValueError, csv.Error, FileNotFoundError) as exc:
            raise BuildFailed(f"a package is not installed as wheels are: {exc}") from exc
        if left:
            tops = ", ".join(sorted({folder.partition("/")[0] for folder in left}))
            self.log.note(f"left out: the test suites inside of {tops}, which nothing here imports")
        found = await self.apart(found, left, whole, folder, links)
        squeezed, sent, groups = asyncio.Semaphore(2), asyncio.Semaphore(store.UPLOADS), grouped(found)

        async def one(number: int, title: str, entries: list[Entry]) -> Layer:
            out = folder / f"env-{number}.layer"
            async with squeezed:
                made = await asyncio.to_thread(_layer, title, entries, out)
            async with sent:
                await store.put(self.ctx, self.doc, made)
            await self.log.line(told(made.layer))
            await asyncio.to_thread(self.keep, made.layer, out)
            return made.layer

        layers = await store.together([one(n, title, entries) for n, (title, entries) in enumerate(groups)])
        await asyncio.to_thread(self.cache.prune)
        packages = [d.told(wheel_of(d, whole, wheels)) for d in found]
        return {"layers": store.pack(layers), "packages": packages, **({"lock": whole.text} if whole != lock else {})}

    async def apart(
        self, found: list[Distribution], left: Set[str], lock: Lock, folder: Path, links: Path | None,
    ) -> list[Distribution]:
        """Distributions with files of the same name are installed once more, each alone: an image has the same files
        every time, and of two the one whose layer, or name, comes last."""
        again: dict[str, Path] = {}
        for one in clashing(found):
            alone = folder / f"alone-{len(again)}"
            await asyncio.to_thread(alone.mkdir)
            own = Lock(tuple(pin for pin in lock.pins if pin.name == canonicalize_name(one.name)))
            again[one.name] = await uv.install(own, self.doc.python_version, self.doc.platform, alone, self.log, links)
        return await asyncio.to_thread(taken_from, found, again, self.doc.python_version, left) if again else found

    def keep(self, layer: Layer, out: Path) -> None:
        """A layer's file goes to the cache. Blocking."""
        self.cache.keep(BLOBS, _hex(layer), lambda beside: move(out, beside))
        out.unlink(missing_ok=True)


def wheel_of(found: Distribution, lock: Lock, wheels: Mapping[str, str]) -> str:
    """The sha256 of the wheel that was installed: its name, version and tags are those of the distribution, and the
    lock has its hash. "" when that is not clear."""
    name = canonicalize_name(found.name)
    allowed = {h for pin in lock.pins if pin.name == name for h in pin.hashes}
    if len(allowed) == 1:
        return allowed.pop()
    fit: dict[str, frozenset[str]] = {}
    for file, sha256 in wheels.items():
        try:
            of, _, _, tags = parse_wheel_filename(file)
        except (InvalidWheelFilename, InvalidVersion):
            continue
        if of == name and f"sha256:{sha256}" in allowed:
            fit[f"sha256:{sha256}"] = frozenset(map(str, tags))
    same = [digest for digest, tags in fit.items() if tags == found.tags] if len(fit) > 1 else list(fit)
    return same[0] if len(same) == 1 else ""


def move(source: Path, target: Path) -> None:
    """By name, or by copy to another file system. Raises OSError."""
    try:
        os.rename(source, target)
    except OSError:
        shutil.copyfile(source, target)
    target.chmod(0o400)


def _layer(title: str, entries: Sequence[Entry], out: Path) -> parts.Made:
    return parts.made(title, tar(entries), gzip=True, into=out)


def _hex(layer: Layer) -> str:
    return layer.digest.removeprefix("sha256:")
