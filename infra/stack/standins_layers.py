"""The layers of the stand-in images: Debian's packages, and the servers that this stack installs for itself.

Made once and kept beside the downloads, each by what it was made from. A layer is a gzipped tar and the digest of its
tar, as image configurations name it.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from . import debian
from .azurite import Azurite
from .kafka import Kafka
from .mongo import BINARY, Mongo
from .server import CACHE, Server, apt_install, needs, run

VERSION = "1"  # of how layers are made: a new one makes them all again
PACKAGES = (*debian.PACKAGES, "adduser", "busybox", "docker-registry", "libcurl4", "openjdk-17-jre-headless",
            "prometheus", "python3-pip", "python3-venv")
PARTS = {  # of Debian's files above the base: the first pattern that a path begins with; what has none is for all
    "": re.compile(r"usr/share/(javascript|nodejs|fonts|perl)/|usr/lib/[^/]+/perl/|usr/lib/python3\.11/.*__pycache__"),
    "java": re.compile(r"usr/lib/jvm/|usr/share/java/|etc/java"),
    "prometheus": re.compile(r"usr/bin/prom|usr/share/prometheus|etc/prometheus"),
    "registry": re.compile(r"usr/bin/docker-registry|etc/docker/"),
    "pip": re.compile(r"usr/lib/python3/dist-packages/|usr/share/python-wheels/|usr/bin/pip"),
    "tools": re.compile(""),
}
"""Part → what belongs in it; that of no name is left out: documents, scripts and fonts that no stand-in serves."""
MADE: dict[str, type[Server]] = {"kafka": Kafka, "mongod": Mongo, "azurite": Azurite}
"""Part → the server of this stack that it is taken from."""
FOLDERS = 'mkdir -p "$1/usr/share/man/man1"'
"""Java's package puts links there, and fails where it is not."""
NOT_RUN = (".map", ".ts", ".md", ".flow")
"""Endings of what npm packages carry beside programs: half of their size."""


@dataclass(frozen=True)
class Layer:
    """``path``: gzipped; ``diff_id``: the digest of the tar in it."""

    path: Path
    diff_id: str


Entry = tuple[tarfile.TarInfo, BinaryIO | None]


class Writer:
    """A layer being written: ``add`` its members, then ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = hashlib.sha256()
        self._out = path.open("wb")
        self._squeezed = gzip.GzipFile("", "wb", 1, self._out, mtime=0)
        self._tar = tarfile.open(fileobj=self, mode="w|",  # type: ignore[call-overload]  # noqa: SIM115 -- closed by close
                                 format=tarfile.PAX_FORMAT)

    def write(self, data: bytes) -> int:
        self._seen.update(data)
        return self._squeezed.write(data)

    def add(self, member: tarfile.TarInfo, content: BinaryIO | None = None) -> None:
        self._tar.addfile(member, content)

    def close(self) -> str:
        """The digest of the tar."""
        self._tar.close()
        self._squeezed.close()
        self._out.close()
        return f"sha256:{self._seen.hexdigest()}"


def servers(part: str) -> Layer:
    """A part by its name: of ``PARTS``, or ``debian``, ``kafka``, ``mongod``, ``node``, ``azurite``."""
    if part == "debian":
        return _base()
    if part in PARTS:
        return _debian()[part]
    key, sources = _own(part)
    return _kept(part, key, lambda folder: _one(folder, part, sources()))[part]


def users() -> tuple[str, str]:
    """``/etc/passwd`` and ``/etc/group`` of the root file system with all packages."""
    folder = _debian()["tools"].path.parent
    return (folder / "passwd").read_text(), (folder / "group").read_text()


def _own(part: str) -> tuple[str, Callable[[], Iterator[Entry]]]:
    """What a server of the stack's own is made of: (what it changes with, its files)."""
    if part in MADE:
        MADE[part].install()
    if part == "kafka":
        return Kafka.version, lambda: tree(Kafka.home() / "libs", "opt/kafka/libs")
    if part == "mongod":
        return Mongo.version, lambda: tree(Mongo.home() / BINARY, "usr/bin/mongod")
    if part == "azurite":
        return Azurite.version, lambda: tree(Azurite.home() / "node_modules", "usr/local/lib/azurite/node_modules")
    node = Path(shutil.which("node") or "node").resolve()
    return run(str(node), "--version").strip(), lambda: tree(node, "usr/local/bin/node")


def tree(source: Path, target: str) -> Iterator[Entry]:
    """A file or a folder with all below it, owned by root, in the order of names."""
    for path in [source] if source.is_file() else sorted(p for p in source.rglob("*") if not p.is_dir()):
        name = target if path == source else f"{target}/{path.relative_to(source)}"
        if path.name.endswith(NOT_RUN):
            continue
        member = tarfile.TarInfo(name)
        member.mtime = debian.EPOCH
        if path.is_symlink():
            member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
            yield member, None
            continue
        about = path.stat()
        member.size, member.mode = about.st_size, 0o755 if about.st_mode & 0o111 else 0o644
        with path.open("rb") as content:
            yield member, content


def _kept(name: str, key: str, make: Callable[[Path], dict[str, str]]) -> dict[str, Layer]:
    """Layers by their names, from the cache; ``make`` writes ``<name>.tar.gz`` and tells their digests when they are
    not there. Two at once: one waits for the other."""
    word = hashlib.sha256(f"{VERSION} {platform.machine()} {key}".encode()).hexdigest()[:12]
    folder = CACHE / f"standin-{name}-{word}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / f"standin-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".standin-{name}-") as made:
                    draft = Path(made) / "layers"
                    draft.mkdir()
                    (draft / "diff_ids.json").write_text(json.dumps(make(draft)))
                    draft.rename(folder)
    diff_ids: dict[str, str] = json.loads((folder / "diff_ids.json").read_text())
    return {part: Layer(folder / f"{part}.tar.gz", diff_id) for part, diff_id in diff_ids.items()}


def _one(folder: Path, part: str, entries: Iterable[Entry]) -> dict[str, str]:
    writer = Writer(folder / f"{part}.tar.gz")
    for member, content in entries:
        writer.add(member, content)
    return {part: writer.close()}


def small(entries: Sequence[tuple[tarfile.TarInfo, bytes]], path: Path) -> Layer:
    """A layer of files in memory."""
    writer = Writer(path)
    for member, content in entries:
        writer.add(member, io.BytesIO(content))
    return Layer(path, writer.close())


# -- Debian -----------------------------------------------------------------------------------------------------------


def _base() -> Layer:
    blobs = debian.base() / "blobs"

    def blob(digest: str) -> Path:
        return blobs / digest.replace(":", "/")

    index = json.loads((debian.base() / "index.json").read_bytes())
    manifest = json.loads(blob(index["manifests"][0]["digest"]).read_bytes())
    config = json.loads(blob(manifest["config"]["digest"]).read_bytes())
    return Layer(blob(manifest["layers"][0]["digest"]), config["rootfs"]["diff_ids"][0])


def _debian() -> dict[str, Layer]:
    """The parts of Debian above its base."""
    base = _base()
    return _kept("debian", f"{base.diff_id} {PACKAGES} {PARTS}", lambda folder: _packages(folder, base))


def _packages(folder: Path, base: Layer) -> dict[str, str]:
    if needs(mmdebstrap=""):
        apt_install("mmdebstrap")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".standin-root-") as name:
        root = Path(name) / "root.tar"
        run("mmdebstrap", "--mode=root", "--variant=essential", f"--include={','.join(PACKAGES)}",
            f"--essential-hook={FOLDERS}", "bookworm", str(root), env={"SOURCE_DATE_EPOCH": str(debian.EPOCH)})
        writers = {part: Writer(folder / f"{part}.tar.gz") for part in PARTS if part}
        with tarfile.open(root) as source:
            below = _below(base)
            for member, content in _above(source, below):
                part = next(part for part, pattern in PARTS.items() if pattern.match(member.name))
                if part:
                    writers[part].add(member, content)
            for wanted in ("passwd", "group"):
                (folder / wanted).write_bytes(_content(source, source.getmember(f"./etc/{wanted}")))
        return {part: writer.close() for part, writer in writers.items()}


def _below(base: Layer) -> dict[str, str]:
    """Name → what it is, of everything in the base."""
    with tarfile.open(base.path) as layer:
        return {member.name: _word(layer, member) for member in layer.getmembers()}


def _above(source: tarfile.TarFile, below: dict[str, str]) -> Iterator[Entry]:
    """The members that the base lacks or has otherwise. A hard link becomes a file: what it links to may lie below."""
    for member in sorted(source.getmembers(), key=lambda m: m.name):
        name = member.name.removeprefix("./").strip("/")
        above = next((path for path in (*debian.LEFT_OUT, *debian.SOURCES)
                      if name == path or name.startswith(f"{path}/")), "")
        if name in ("", ".") or (above and name not in debian.KEPT) or member.ischr() or member.isblk():
            continue
        if below.get(name) == _word(source, member):
            continue
        content = _content(source, member) if member.isreg() or member.islnk() else None
        kept = copy.copy(member)  # the source finds its members by their names
        kept.name, kept.pax_headers, kept.mtime = name, {}, int(member.mtime)
        if content is not None:
            kept.type, kept.size, kept.linkname = tarfile.REGTYPE, len(content), ""
        yield kept, io.BytesIO(content) if content is not None else None


def _content(source: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with contextlib.closing(source.extractfile(member) or io.BytesIO()) as content:
        return content.read()


def _word(source: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """What makes a member the same as another: content and rights, not times."""
    rights = f"{member.mode:o} {member.uid} {member.gid}"
    if member.isreg() or member.islnk():
        return f"file {rights} {hashlib.sha256(_content(source, member)).hexdigest()}"
    return f"{member.type!r} {rights} {member.linkname}"
