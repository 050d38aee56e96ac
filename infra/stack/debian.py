"""A base image without an image registry: Debian bookworm with its own Python 3.11, made from Debian's packages.

    python -m infra.stack.debian       # prints the folder: an OCI layout with the tag `latest`

Made once and kept beside the downloads. What the scoring server's wheels need of a system is in it, and no more.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import platform
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .server import CACHE, StackError, apt_install, can_apt, needs, run

VERSION = "bookworm-2"
EPOCH = 1767225600  # files made while it is put together get this time; those of packages keep theirs
COMPILED = 'chroot "$1" python3 -m compileall -q -f --invalidation-mode unchecked-hash /usr/lib/python3.11 || true'
"""Python's own library compiled without times in it: they are not the same in a layer as on the disk it came from."""
PACKAGES = ("python3", "ca-certificates", "libstdc++6")
LEFT_OUT = ("dev", "proc", "sys", "run", "tmp", "usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale",
            "usr/share/lintian", "var/log", "var/cache", "var/lib/apt", "etc/machine-id", "etc/hostname",
            "etc/resolv.conf")
KEPT = frozenset({"dev", "proc", "sys", "run", "tmp", "var/log", "var/cache"})
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
TYPE = "application/vnd.oci.image"


def missing() -> str:
    """Why it cannot be had on this machine; "" when it can, or is there."""
    if home().is_dir():
        return ""
    if os.geteuid() != 0:
        return "a Debian root file system needs root to be made"
    return "" if not needs(mmdebstrap="") else can_apt()


def home() -> Path:
    """Where it is kept."""
    return CACHE / f"debian-{VERSION}-{MACHINES.get(platform.machine(), platform.machine())}"


def base() -> Path:
    """The OCI layout folder, with the tag ``latest``; made when it is not there (20-60 s). StackError when it cannot
    be. Two at once: one waits for the other."""
    if home().is_dir():
        return home()
    if reason := missing():
        raise StackError(f"debian: {reason}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "debian.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home().is_dir():
            _make()
    return home()


def _make() -> None:
    if needs(mmdebstrap=""):
        apt_install("mmdebstrap")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".debian-") as name:
        folder = Path(name)
        excluded = [f"--dpkgopt=path-exclude=/{path}/*" for path in LEFT_OUT if path.startswith("usr/share/")]
        run("mmdebstrap", "--mode=root", "--variant=essential", f"--include={','.join(PACKAGES)}", *excluded,
            f"--customize-hook={COMPILED}", "bookworm", str(folder / "root.tar"), env={"SOURCE_DATE_EPOCH": str(EPOCH)})
        layout = folder / "layout"
        (layout / "blobs/sha256").mkdir(parents=True)
        _image(folder / "root.tar", layout)
        layout.rename(home())


def _image(root: Path, layout: Path) -> None:
    """The layout of one image of one layer."""
    with (layout / "layer").open("wb") as out:
        diff_id = _layer(root, out)
    layer = _kept(layout, (layout / "layer").read_bytes(), "layer.v1.tar+gzip")
    (layout / "layer").unlink()
    machine = MACHINES.get(platform.machine(), platform.machine())
    config = _kept(layout, _json({
        "architecture": machine, "os": "linux", "created": "2026-01-01T00:00:00Z",
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
                   "Cmd": ["bash"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": f"debian {VERSION}: {' '.join(PACKAGES)}"}],
    }), "config.v1+json")
    manifest = _kept(layout, _json({"schemaVersion": 2, "mediaType": f"{TYPE}.manifest.v1+json", "config": config,
                                    "layers": [layer]}), "manifest.v1+json")
    manifest |= {"annotations": {"org.opencontainers.image.ref.name": "latest"},
                 "platform": {"os": "linux", "architecture": machine}}
    (layout / "index.json").write_bytes(_json({"schemaVersion": 2, "mediaType": f"{TYPE}.index.v1+json",
                                               "manifests": [manifest]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _kept(layout: Path, data: bytes, kind: str) -> dict[str, Any]:
    """Stores a blob; its descriptor."""
    word = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / word).write_bytes(data)
    return {"mediaType": f"{TYPE}.{kind}", "digest": f"sha256:{word}", "size": len(data)}


class _Hashed:
    """Writes on, and knows the digest of what went through."""

    def __init__(self, out: gzip.GzipFile) -> None:
        self._out, self.seen = out, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.seen.update(data)
        return self._out.write(data)


def _layer(root: Path, out: BinaryIO) -> str:
    """The root file system as a gzipped layer, in the order of names; the digest of its tar."""
    with gzip.GzipFile("", "wb", 6, out, mtime=0) as squeezed, tarfile.open(root) as source:
        hashed = _Hashed(squeezed)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT) as layer:  # type: ignore[call-overload]
            for member in _members(source):
                layer.addfile(member, source.extractfile(member) if member.isreg() else None)
        return f"sha256:{hashed.seen.hexdigest()}"


def _members(source: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Those that belong in an image. A hard link comes after what it links to."""
    for member in sorted(source.getmembers(), key=lambda m: (m.islnk(), m.name)):
        name = PurePosixPath(member.name).as_posix().lstrip("/")
        above = next((path for path in LEFT_OUT if name == path or name.startswith(f"{path}/")), "")
        if name in ("", ".") or (above and name not in KEPT):
            continue
        member.name, member.linkname = name, member.linkname.removeprefix("./") if member.islnk() else member.linkname
        member.pax_headers = {}
        member.mtime = int(member.mtime)
        yield member


if __name__ == "__main__":
    try:
        print(base())
    except StackError as exc:
        sys.exit(str(exc))
