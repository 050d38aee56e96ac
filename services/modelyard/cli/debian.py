"""A base image where none can be pulled: Debian with its own Python, made from Debian's packages by mmdebstrap, or by
debootstrap where only that is there.

The same packages give the same bytes: members in the order of names, no time later than SOURCE_DATE_EPOCH, Python's own
library compiled without times in it. What apt was told of mirrors stays out of it, unless a mirror was given.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ..core.errors import BuildFailed, Invalid, Unavailable
from .workplace import Told, ran, workplace

EPOCH = 1767225600
"""The time of files that are made while it is put together, where SOURCE_DATE_EPOCH says none."""
PACKAGES = ("python3", "ca-certificates", "libstdc++6")
LEFT_OUT = ("dev", "proc", "sys", "run", "tmp", "usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale",
            "usr/share/lintian", "var/log", "var/cache", "var/lib/apt", "etc/machine-id", "etc/hostname",
            "etc/resolv.conf")
SOURCES = ("etc/apt/sources.list", "etc/apt/sources.list.d")
"""Where apt keeps the names of mirrors."""
KEPT = frozenset({"dev", "proc", "sys", "run", "tmp", "var/log", "var/cache", "etc/apt/sources.list.d"})
"""Folders that stay, empty."""
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
COMPILE = "python3 -m compileall -q -f --invalidation-mode unchecked-hash /usr/lib/python3.[0-9]*"
PYTHON = re.compile(r"usr/bin/python3\.(\d+)\Z")
OLDEST = 11
WORD = re.compile(r"[a-z0-9][a-z0-9+.\-]*\Z")
TYPE = "application/vnd.oci.image"
LIMIT_S = 3600.0


@dataclass(frozen=True)
class Recipe:
    """What a base is made of. Raises Invalid, with every problem."""

    suite: str = "bookworm"
    packages: tuple[str, ...] = ()
    mirror: str | None = None

    def __post_init__(self) -> None:
        wrong = [f"'{name}' is not the name of a package of Debian" for name in self.packages if not WORD.match(name)]
        if not WORD.match(self.suite):
            wrong.append(f"'{self.suite}' is not a suite of Debian, such as bookworm")
        if self.mirror is not None:
            url = urlsplit(self.mirror)
            if url.username or url.password:
                wrong.append("credentials in a mirror's URL are refused: they would stand in the image")
            elif url.scheme not in ("http", "https", "file") or set(self.mirror) & set(" \t\n"):
                wrong.append("a mirror is a URL: https://HOST/debian")
        if wrong:
            raise Invalid("; ".join(wrong), errors=[{"field": "base", "message": text} for text in wrong])

    @property
    def all(self) -> tuple[str, ...]:
        """Every package that is named, once."""
        return tuple(dict.fromkeys((*PACKAGES, *self.packages)))


@dataclass(frozen=True)
class Made:
    """``reference`` is what ``--base`` takes."""

    reference: str
    python: str
    size: int


def machine() -> str:
    """This machine's architecture as images and Debian call it; as the kernel does where we build no images."""
    return MACHINES.get(platform.machine(), platform.machine())


def missing() -> str:
    """Why it cannot be made on this machine, with what to do; "" when it can."""
    if platform.machine() not in MACHINES:
        return f"images are made for x86-64 and arm64; this machine is {platform.machine()}"
    if _program("mmdebstrap") is None and _program("debootstrap") is None:
        return "neither mmdebstrap nor debootstrap is installed; on Debian and Ubuntu: apt-get install mmdebstrap"
    if os.geteuid() == 0:
        return ""
    if _program("mmdebstrap") is None:
        return "debootstrap needs root: run this as root, or install mmdebstrap: apt-get install mmdebstrap uidmap"
    lacking = [f"{name} (package {package})" for name, package in (("unshare", "util-linux"), ("newuidmap", "uidmap"))
               if _program(name) is None]
    how = "install that, or run this as root"
    return f"without root, mmdebstrap needs {' and '.join(lacking)}: {how}" if lacking else ""


def make(to: Path, recipe: Recipe, told: Told) -> Made:
    """Makes the OCI layout ``to``, with the tag ``latest``, whole or not at all (20-60 s with a mirror near).

    Raises Invalid for a place that cannot be, Unavailable for what this machine lacks, BuildFailed with the tool's
    words.
    """
    to = to.absolute()
    if os.path.lexists(to):
        raise Invalid(f"'{to}' is there already; give another place", field="to")
    if set(str(to)) & set(":?#@") or ".." in to.parts:
        raise Invalid(f"'{to}' cannot be a base's folder: a reference has no : ? # @ or .. in it", field="to")
    epoch = _epoch()
    if reason := missing():
        raise Unavailable(reason)
    to.parent.mkdir(parents=True, exist_ok=True)
    with workplace(to, ("root.tar", "root", "layout"), told) as place:
        root, layout = place / "root.tar", place / "layout"
        (_mmdebstrap if _program("mmdebstrap") else _debootstrap)(recipe, root, epoch, told)
        told("packing it")
        (layout / "blobs/sha256").mkdir(parents=True)
        python, size = _image(root, layout, recipe, epoch)
        layout.rename(to)
    return Made(f"oci-layout://{to}:latest", python, size)


def _epoch() -> int:
    said = os.environ.get("SOURCE_DATE_EPOCH") or str(EPOCH)
    if not said.isdecimal() or len(said) > 10:
        raise Invalid(f"SOURCE_DATE_EPOCH is '{said}': it is a number of seconds", field="SOURCE_DATE_EPOCH")
    return int(said)


# -- the two tools ----------------------------------------------------------------------------------------------------


def _program(name: str) -> str | None:
    """Its path; people's own PATH often lacks the folders of root's programs."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _mmdebstrap(recipe: Recipe, root: Path, epoch: int, told: Told) -> None:
    excluded = [f"--dpkgopt=path-exclude=/{path}/*" for path in LEFT_OUT if path.startswith("usr/share/")]
    _run([_program("mmdebstrap") or "mmdebstrap", f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
          "--variant=essential", f"--include={','.join(recipe.all)}", *excluded,
          f"--customize-hook=chroot \"$1\" sh -c '{COMPILE}' || true", recipe.suite, str(root),
          *([recipe.mirror] if recipe.mirror else [])], epoch, told)


def _debootstrap(recipe: Recipe, root: Path, epoch: int, told: Told) -> None:
    folder = root.with_name("root")
    _run([_program("debootstrap") or "debootstrap", "--variant=minbase", f"--include={','.join(recipe.all)}",
          recipe.suite, str(folder), *([recipe.mirror] if recipe.mirror else [])], epoch, told)
    told("compiling Python's library")
    ran([_program("chroot") or "chroot", str(folder), "sh", "-c", COMPILE], os.environ, told, LIMIT_S)  # may fail
    with tarfile.open(root, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(folder, ".", filter=_unmounted)


def _unmounted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Nothing of the machine's own, should it still be mounted there; no names of owners, which are this machine's."""
    member.uname = member.gname = ""
    return None if member.name.startswith(("./proc/", "./sys/", "./dev/")) else member


def _run(argv: Sequence[str], epoch: int, told: Told) -> None:
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    code, said = ran(argv, env, told, LIMIT_S)
    if code:
        raise BuildFailed("\n".join([f"{Path(argv[0]).name} failed ({code}); it said at the end:", *said]))


# -- the image --------------------------------------------------------------------------------------------------------


def _image(root: Path, layout: Path, recipe: Recipe, epoch: int) -> tuple[str, int]:
    """The layout of one image of one layer; the version of its Python, and its size."""
    out = SOURCES if recipe.mirror is None else ()
    with (layout / "layer").open("wb") as file:
        diff_id, python = _layer(root, file, (*LEFT_OUT, *out), epoch)
    if python < OLDEST:
        raise BuildFailed(f"Debian {recipe.suite} has {f'Python 3.{python}' if python else 'no Python'}; images need 3."
                          f"{OLDEST} or newer: give a newer suite")
    created = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    layer = _moved(layout, "layer.v1.tar+gzip")
    config = _kept(layout, _json({
        "architecture": machine(), "os": "linux", "created": created,
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
                   "Cmd": ["bash"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": created, "created_by": f"Debian {recipe.suite}: {' '.join(recipe.all)}"}],
    }), "config.v1+json")
    manifest = _kept(layout, _json({"schemaVersion": 2, "mediaType": f"{TYPE}.manifest.v1+json", "config": config,
                                    "layers": [layer]}), "manifest.v1+json")
    manifest |= {"annotations": {"org.opencontainers.image.ref.name": "latest"},
                 "platform": {"os": "linux", "architecture": machine()}}
    (layout / "index.json").write_bytes(_json({"schemaVersion": 2, "mediaType": f"{TYPE}.index.v1+json",
                                               "manifests": [manifest]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return f"3.{python}", layer["size"]


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


class _Hashed:
    """Writes on, and knows the digest of what went through."""

    def __init__(self, out: gzip.GzipFile) -> None:
        self._out, self.seen = out, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.seen.update(data)
        return self._out.write(data)


def _layer(root: Path, out: BinaryIO, left_out: Sequence[str], epoch: int) -> tuple[str, int]:
    """The root file system as a gzipped layer, in the order of names; the digest of its tar, and Python's minor."""
    python = 0
    with gzip.GzipFile("", "wb", 6, out, mtime=0) as squeezed, tarfile.open(root) as source:
        hashed = _Hashed(squeezed)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT) as layer:  # type: ignore[call-overload]
            for member in _members(source, left_out, epoch):
                found = PYTHON.match(member.name)
                python = max(python, int(found[1])) if found else python
                layer.addfile(member, source.extractfile(member) if member.isreg() else None)
        return f"sha256:{hashed.seen.hexdigest()}", python


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
