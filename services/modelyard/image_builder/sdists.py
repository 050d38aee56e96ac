"""Packages that exist only as source: each is fetched, built once in the sandbox, and offered as a wheel.

uv resolves and installs wheels only, always. Where it says that a package has none, its sdist is fetched without
running anything of it, what it is built with is resolved as wheels in turn, the wheel is made in the sandbox and kept
in the user's cache, and uv is asked again with that wheel in a folder of its own. So an sdist's metadata, too, comes
out of the sandbox.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from platform import libc_ver
from typing import TypeVar
from weakref import WeakValueDictionary

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from ..core.errors import BuildFailed
from ..core.requirements import requirement
from ..kernel.cache import Cache
from . import sandbox, uv
from .fetch import fetch
from .locks import Lock, Pin
from .log import BuildLog
from .memo import key
from .request import own_platform, own_python

FORMAT = 1
KIND = "sdist-wheels-v1"
HOOK = Path(__file__).with_name("sdist_hook.py")
DEPTH, MANY, ROUNDS = 4, 64, 3
ENTRIES, UNPACKED = 20_000, 2 << 30
END_RECORD = b"PK\x05\x06"
_BUSY: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """A wheel that was built: ``foo==1.0``, and the sha256 of the sdist and of the wheel."""

    text: str
    source: str
    wheel: str


@dataclass
class Sdists:
    """Those of one build. ``folder`` makes one for temporary files; ``hidden`` is what no build may see."""

    python: str
    platform: str
    log: BuildLog
    cache: Cache
    folder: Callable[[], Awaitable[Path]]
    hidden: Sequence[Path]
    limits: sandbox.Limits = sandbox.LIMITS
    within: tuple[str, ...] = ()
    """What this is for: the packages whose build needs these."""
    made: dict[str, Made] = field(default_factory=dict)
    links: Path | None = None

    async def with_them(self, attempt: Callable[[Path | None], Awaitable[T]], asked: Mapping[str, str],
                        hashes: Mapping[str, Sequence[str]] = {}) -> T:
        """What ``attempt`` gives, tried again with each package built that it lacks. It is called with the folder of
        the wheels made so far. ``asked``: package → the requirement that says which version of it; ``hashes``: package
        → those of a lock, which must have its source's."""
        while True:
            try:
                return await attempt(self.links)
            except BuildFailed as exc:
                lacking = [name for name in exc.detail.get("lacking", ()) if name not in self.made]
                found = [sdist for name in lacking if (sdist := await self.look(asked.get(name, name)))]
                if not found or len(self.made) >= MANY:
                    raise
                for sdist in found:
                    await self.add(sdist, hashes.get(sdist.name))

    async def look(self, wanted: str) -> uv.Sdist | None:
        folder = await self.folder()
        try:
            return await uv.source(wanted, self.python, self.platform, folder, self.log)
        except BuildFailed:
            return None  # the first reason is the better one

    async def add(self, sdist: uv.Sdist, hashes: Sequence[str] | None) -> None:
        """Its wheel, from the cache or made now, lies in ``links``."""
        what = f"{sdist.name} {sdist.version}"
        if sdist.name in self.within or len(self.within) >= DEPTH:
            raise BuildFailed(f"{what} exists only as source, and building it needs itself: {' → '.join(self.within)}")
        if (self.platform, self.python) != (own_platform(), own_python()):
            raise BuildFailed(
                f"{what} exists only as source ({sdist.file}), which is built only for the machine and the Python that "
                f"run the image builder ({own_platform()}, Python {own_python()}), not for {self.platform}, Python "
                f"{self.python}: give a wheel of it (UV_FIND_LINKS names a folder), or build there")
        if self.links is None:
            self.links = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="wheels-", dir=await self.folder()))
        here = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="sdist-", dir=await self.folder()))
        source = here / _plain(sdist.file)
        sha256 = sdist.sha256 or await self.fetched(sdist, source)
        if hashes is not None and f"sha256:{sha256}" not in hashes:
            raise BuildFailed(f"{what} has no wheel, and the lock has no hash of its source, sha256:{sha256}")
        await self.log.line(f"{what} has no wheel: it is taken from its source {sdist.file}, sha256:{sha256}")
        name = key("wheel", FORMAT, sha256, self.python, self.platform)
        async with _BUSY.setdefault(name, asyncio.Lock()):
            wheel = await asyncio.to_thread(self.earlier, name)
            told = "built earlier" if wheel else "built in a sandbox without network"
            if wheel is None:
                if sdist.sha256:
                    await self.fetched(sdist, source)
                wheel = await self.build(sdist, source, here)
                await asyncio.to_thread(self.cache.keep, KIND, name, partial(_kept, wheel))
            digest = await asyncio.to_thread(self.offer, wheel, sdist)
        self.made[sdist.name] = Made(f"{sdist.name}=={sdist.version}", f"sha256:{sha256}", f"sha256:{digest}")
        if not wheel.name.endswith("-any.whl"):
            told += f"; compiled for the C library of this machine ({' '.join(libc_ver())}): a base needs one as new"
        await self.log.line(f"{what}: {wheel.name}, sha256:{digest}, {told}")

    def earlier(self, name: str) -> Path | None:
        """The wheel in the user's cache. Blocking."""
        found = self.cache.find(KIND, name)
        return next(found.glob("*.whl"), None) if found else None

    async def fetched(self, sdist: uv.Sdist, path: Path) -> str:
        return await asyncio.to_thread(fetch, sdist.url, path, sdist.sha256, uv.environment())

    async def build(self, sdist: uv.Sdist, source: Path, here: Path) -> Path:
        """Asks it what it needs, then builds it, each in a sandbox of its own."""
        what, hook = f"building {sdist.name} {sdist.version} from its source", here / HOOK.name
        await asyncio.to_thread(shutil.copyfile, HOOK, hook)
        given: list[str] | None = None
        program, tools = (await asyncio.to_thread(sandbox.python))[0], None
        for _ in range(ROUNDS):
            inside = {f"/in/{hook.name}": hook, f"/in/{source.name}": source, **({"/env": tools} if tools else {})}
            found = await sandbox.run(
                what, ["/env/bin/python" if tools else program, "-sB", f"/in/{hook.name}", f"/in/{source.name}",
                       json.dumps(given)],
                here, self.log, limits=self.limits, shown=inside, hidden=self.hidden, path="/env/bin")
            if wheel := next((path for name, path in found.items() if name.endswith(".whl")), None):
                await asyncio.to_thread(check, wheel, sdist)
                return wheel
            if "needs.json" not in found:
                break
            given = await asyncio.to_thread(_needs, found["needs.json"], what)
            tools = await self.tools(given, sdist, here)
        raise BuildFailed(f"{what} failed: it ended well, and made no wheel")

    async def tools(self, needs: list[str], sdist: uv.Sdist, here: Path) -> Path:
        """The environment that it is built in."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="tools-", dir=here))

        async def there() -> Path:
            return folder

        own = Sdists(self.python, self.platform, self.log, self.cache, there, self.hidden, self.limits,
                     (*self.within, sdist.name))
        await self.log.line(f"{sdist.name} {sdist.version} is built with {', '.join(needs) or 'nothing'}")
        lock = Lock(())
        if needs:
            lock = own.locked(await own.with_them(
                lambda links: uv.resolve(needs, (), self.python, self.platform, folder, self.log, links),
                by_name(needs)))
        program = (await asyncio.to_thread(sandbox.python))[0]
        return await uv.toolbox(lock, program, folder, self.log, own.links)

    def offer(self, wheel: Path, sdist: uv.Sdist) -> str:
        """A copy of it in ``links``, checked once more: the cache is not guarded against its owner. Blocking."""
        check(wheel, sdist)
        assert self.links is not None
        place = self.links / wheel.name
        shutil.copyfile(wheel, place)
        return _sha256(place)

    def locked(self, lock: Lock, *, given: bool = False) -> Lock:
        """The lock with both hashes of each package that was built: of the wheel, and of the source that it can be
        built from again. BuildFailed where a ``given`` one has others."""
        return Lock(tuple(self._pinned(pin, given) for pin in lock.pins))

    def _pinned(self, pin: Pin, given: bool) -> Pin:
        made = self.made.get(pin.name)
        if made is None or made.text != pin.text:
            return pin
        if given and made.wheel not in pin.hashes and set(pin.hashes) != {made.source}:
            raise BuildFailed(
                f"the lock has other hashes of {pin.text} than the wheel that its source {made.source} gives here, "
                f"{made.wheel}: add --hash={made.wheel} to its line where that is right")
        return Pin(pin.name, pin.text, tuple(sorted({made.source, made.wheel})))


def by_name(lines: Sequence[str]) -> dict[str, str]:
    """Package → what all of these requirements say of its version."""
    found: dict[str, SpecifierSet] = {}
    for parsed in map(Requirement, lines):
        name = canonicalize_name(parsed.name)
        found[name] = found.get(name, SpecifierSet()) & parsed.specifier
    return {name: f"{name}{specifier}" for name, specifier in found.items()}


def check(wheel: Path, sdist: uv.Sdist) -> None:
    """That it is the wheel of this sdist, and no bomb. BuildFailed otherwise. Blocking."""
    what = f"the wheel that was built of {sdist.name} {sdist.version}"
    try:
        name, version, *_ = parse_wheel_filename(wheel.name)
        if (name, version) != (sdist.name, Version(sdist.version)):
            raise BuildFailed(f"{what} is another package's: {wheel.name}")
        with wheel.open("rb") as file:  # before zipfile reads a directory of any length
            file.seek(max(0, os.fstat(file.fileno()).st_size - 22))
            tail = file.read()
        if tail[:4] != END_RECORD or struct.unpack("<H", tail[10:12])[0] > ENTRIES:
            raise BuildFailed(f"{what} is no plain zip of at most {ENTRIES} files")
        with zipfile.ZipFile(wheel) as packed:
            infos = packed.infolist()
    except (InvalidWheelFilename, InvalidVersion, zipfile.BadZipFile, NotImplementedError) as exc:
        raise BuildFailed(f"{what} is no wheel: {exc}") from exc
    if sum(info.file_size for info in infos) > UNPACKED:
        raise BuildFailed(f"{what} unpacks to more than {UNPACKED >> 20} MiB")
    for info in infos:
        if info.filename.startswith("/") or ".." in info.filename.split("/") or "\\" in info.filename:
            raise BuildFailed(f"{what} has a file that leads out of it: {info.filename!a}")


def _needs(file: Path, what: str) -> list[str]:
    try:
        said = json.loads(file.read_bytes()[:100_000])
    except ValueError:
        said = None
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said) or len(said) > 200:
        raise BuildFailed(f"{what} failed: its build requirements are no list of names")
    for one in said:
        if why := requirement(one)[1]:
            raise BuildFailed(f"{what} failed: its build requirement {one[:100]!a} is not taken: {why}")
    return said


def _plain(name: str) -> str:
    """A file name as the sandbox takes it; what it ends in says how it is packed."""
    if not sandbox.RESULT.fullmatch(name) or not name.endswith((".tar.gz", ".tgz", ".zip", ".tar.bz2", ".tar.xz")):
        raise BuildFailed(f"{name[:100]!a} is no name of an sdist: NAME-VERSION.tar.gz")
    return name


def _kept(wheel: Path, beside: Path) -> None:
    beside.mkdir()
    shutil.copyfile(wheel, beside / wheel.name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
