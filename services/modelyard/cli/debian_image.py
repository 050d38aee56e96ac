"""Root file systems as an OCI layout: the first is a layer, and of each one after it what it adds to the one before.

The same files give the same bytes: members in the order of names, no time later than a given one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

LEFT_OUT = ("dev", "proc", "sys", "run", "tmp", "usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale",
            "usr/share/lintian", "var/log", "var/cache", "var/lib/apt", "etc/machine-id", "etc/hostname",
            "etc/resolv.conf")
SOURCES = ("etc/apt/sources.list", "etc/apt/sources.list.d")
"""Where apt keeps the names of mirrors."""
KEPT = frozenset({"dev", "proc", "sys", "run", "tmp", "var/log", "var/cache", "etc/apt/sources.list.d"})
"""Folders that stay, empty."""
PYTHON = re.compile(r"usr/bin/python3\.(\d+)\Z")
GONE = ".wh."
"""Before the name of what a layer takes away from those below it."""
TYPE = "application/vnd.oci.image"


@dataclass(frozen=True)
class Layers:
    """``roots``: tars of whole file systems, each with all that the one before has. ``told`` says of each what it is;
    ``mirrors``: whether what apt was told of them stays; ``epoch``: the latest time in it, in seconds."""

    roots: Sequence[Path]
    told: Sequence[str]
    mirrors: bool
    epoch: int


def write(layout: Path, layers: Layers, machine: str) -> tuple[int, int]:
    """Makes the layout of one image, tagged ``latest``; its Python's minor version (0: none), and its layers' bytes."""
    (layout / "blobs/sha256").mkdir(parents=True)
    python, diff_ids, made = 0, [], []
    below: _Root | None = None
    with ExitStack() as opened:
        for path in layers.roots:
            root = _Root(opened.enter_context(tarfile.open(path)), layers)
            python = max(python, root.python)
            members = root.files.values() if below is None else _more(below, root)
            diff_ids.append(_layer(layout / "layer", root, members))
            made.append(_moved(layout, "layer.v1.tar+gzip"))
            below = root
    created = datetime.fromtimestamp(layers.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    config = _kept(layout, _json({
        "architecture": machine, "os": "linux", "created": created,
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
                   "Cmd": ["bash"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": created, "created_by": told} for told in layers.told],
    }), "config.v1+json")
    manifest = _kept(layout, _json({"schemaVersion": 2, "mediaType": f"{TYPE}.manifest.v1+json", "config": config,
                                    "layers": made}), "manifest.v1+json")
    manifest |= {"annotations": {"org.opencontainers.image.ref.name": "latest"},
                 "platform": {"os": "linux", "architecture": machine}}
    (layout / "index.json").write_bytes(_json({"schemaVersion": 2, "mediaType": f"{TYPE}.index.v1+json",
                                               "manifests": [manifest]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return python, sum(layer["size"] for layer in made)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _kept(layout: Path, data: bytes, kind: str) -> dict[str, Any]:
    """Stores a blob; its descriptor."""
    (layout / "layer").write_bytes(data)
    return _moved(layout, kind)


def _moved(layout: Path, kind: str) -> dict[str, Any]:
    """What lies in ``layer`` becomes a blob; its descriptor."""
    with (layout / "layer").open("rb") as file:
        word = hashlib.file_digest(file, "sha256").hexdigest()
    target = (layout / "layer").rename(layout / "blobs/sha256" / word)
    return {"mediaType": f"{TYPE}.{kind}", "digest": f"sha256:{word}", "size": target.stat().st_size}


# -- what a layer holds -----------------------------------------------------------------------------------------------


class _Root:
    """A root file system: what of it belongs in an image, in the order of names; links come after all else."""

    def __init__(self, source: tarfile.TarFile, layers: Layers) -> None:
        self.source = source
        out = LEFT_OUT if layers.mirrors else (*LEFT_OUT, *SOURCES)
        self.files = {member.name: member for member in _members(source, out, layers.epoch)}
        self.python = max((int(found[1]) for name in self.files if (found := PYTHON.match(name))), default=0)

    def digest(self, name: str) -> bytes:
        """Of a file's content."""
        content = self.source.extractfile(self.files[name])
        return hashlib.file_digest(content, "sha256").digest() if content else b""  # type: ignore[arg-type]


def _members(source: tarfile.TarFile, left_out: Sequence[str], epoch: int) -> Iterator[tarfile.TarInfo]:
    """Those that belong in an image. A hard link comes after what it links to."""
    for member in sorted(source.getmembers(), key=lambda m: (m.islnk(), m.name)):
        name = PurePosixPath(member.name).as_posix().lstrip("/")
        above = next((path for path in left_out if name == path or name.startswith(f"{path}/")), "")
        if name in ("", ".") or (above and name not in KEPT):
            continue
        member.name, member.linkname = name, member.linkname.removeprefix("./") if member.islnk() else member.linkname
        member.pax_headers = {}
        member.mtime = min(int(member.mtime), epoch)
        yield member


def _more(below: _Root, root: _Root) -> list[tarfile.TarInfo]:
    """What ``root`` has and ``below`` has not, or has otherwise, with the folders above it; and a mark for each name
    that it has no longer. A layer is unpacked by itself: no link of it may lead out of it."""
    new = {name for name in root.files if not _same(below, root, name)}
    links = [member for member in root.files.values() if member.islnk()]
    new |= {link.name for link in links if link.linkname in new}
    new |= {link.linkname for link in links if link.name in new}
    gone = below.files.keys() - root.files.keys()
    gone -= {name for name in gone if gone & set(_folders(name))}  # one mark for a folder is enough
    new |= {above for name in new | gone for above in _folders(name) if above in root.files}
    marks = []
    for name in gone:
        mark = tarfile.TarInfo(str(PurePosixPath(name).with_name(GONE + PurePosixPath(name).name)))
        mark.mtime = below.files[name].mtime
        marks.append(mark)
    return sorted([*(root.files[name] for name in new), *marks], key=lambda m: (m.islnk(), m.name))


def _folders(name: str) -> list[str]:
    return [str(above) for above in PurePosixPath(name).parents]


def _same(below: _Root, root: _Root, name: str) -> bool:
    old, new = below.files.get(name), root.files[name]
    if old is None or any(getattr(old, of) != getattr(new, of) for of in (
            "type", "mode", "uid", "gid", "size", "mtime", "linkname", "devmajor", "devminor")):
        return False
    return not new.isreg() or below.digest(name) == root.digest(name)


def _layer(to: Path, root: _Root, members: Iterable[tarfile.TarInfo]) -> str:
    """Writes them as a gzipped layer; the digest of its tar."""
    with to.open("wb") as out, gzip.GzipFile("", "wb", 6, out, mtime=0) as squeezed:
        hashed = _Hashed(squeezed)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT) as layer:  # type: ignore[call-overload]
            for member in members:
                layer.addfile(member, root.source.extractfile(member) if member.isreg() and member.size else None)
        return f"sha256:{hashed.seen.hexdigest()}"


class _Hashed:
    """Writes on, and knows the digest of what went through."""

    def __init__(self, out: gzip.GzipFile) -> None:
        self._out, self.seen = out, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.seen.update(data)
        return self._out.write(data)
