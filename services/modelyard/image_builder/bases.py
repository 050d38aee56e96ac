"""Base images: what a reference means, which image of a list fits, and what its files say. Pure.

A reference is ``HOST[:PORT]/REPOSITORY[:TAG|@DIGEST]``, or ``oci-layout:///FOLDER[:TAG|@DIGEST]`` on the builder's own
machine. TLS is spoken but on loopback; ``oci://…?tls=off`` says otherwise.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import BuildFailed, Invalid
from .tarring import TAR, TAR_GZ, Layer

TITLE = "base: "
"""What the titles of a base's layers begin with."""
LAYOUT = "oci-layout://"
HOSTED = re.compile(
    r"^(?:oci://)?(?P<host>(?:[A-Za-z0-9.\-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?)/(?P<repo>[a-z0-9][a-z0-9._\-/]*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._\-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
    r"(?P<query>\?tls=(?:on|off))?\Z")
FOLDER = re.compile(
    r"^(?P<path>/[^?#@\x00-\x1f]*?)(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._\-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?\Z")
HUB, HUB_PEOPLE = "docker.io", "library/"
MEDIA = {
    TAR: TAR, TAR_GZ: TAR_GZ, "application/vnd.docker.image.rootfs.diff.tar": TAR,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": TAR_GZ}
"""A base's layer as it is called there → as OCI calls it. The bytes are the same."""
NO_PLATFORM = frozenset({"unknown/unknown", "None/None"})
"""What an entry of a list says that is no image: attestations and the like."""
OLDEST = 11
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PYTHON = re.compile(r"(?:^|/)bin/python3(?:\.(\d{1,2}))?$")
TOLD = re.compile(r"(?:^|/)(?:bin/python3(?:\.\d{1,2})?|ld-musl-[^/]+|libstdc\+\+\.so\.6)$|^opt/modelyard/launch\.py$"
                  r"|^opt/env/lib$")
"""The files of a base that decide something."""


@dataclass(frozen=True)
class Reference:
    """``url`` opens the store that has it; ``version`` is a tag or a digest in its repository ``repo``."""

    url: str
    repo: str
    version: str


@dataclass(frozen=True)
class Files:
    """What of one layer decides something: paths with where they lead, if they are links; and what it takes away:
    paths, and folders (with a slash at the end, "" for all) whose contents come from layers below."""

    there: Mapping[str, str] = field(default_factory=dict)
    gone: Sequence[str] = ()


@dataclass(frozen=True)
class Base:
    """A base that an image can be built on, its layers in the store."""

    name: str
    digest: str
    layers: tuple[Layer, ...]
    env: tuple[str, ...]
    history: tuple[Mapping[str, Any], ...]
    python: str
    interpreter: str


def reference(text: str) -> Reference:
    """Invalid for what is no reference, and for one with credentials in it."""
    if text.startswith(LAYOUT):
        found = FOLDER.match(text.removeprefix(LAYOUT))
        if found is None or found["path"] == "/" or ".." in found["path"].split("/"):
            raise Invalid("write oci-layout:///FOLDER:TAG, a folder on the image builder's machine")
        return Reference(LAYOUT + found["path"], "base", found["digest"] or found["tag"] or "latest")
    first = text.partition("://")[2] or text
    if "@" in first.partition("/")[0]:
        raise Invalid("credentials in a reference are refused; run docker login there as the user that Modelyard runs "
                      "as")
    found = HOSTED.match(text)
    if found is None or not (set(".:") & set(found["host"]) or found["host"] == "localhost"):
        raise Invalid("write HOST/REPOSITORY:TAG, such as docker.io/library/python:3.11-slim, or oci-layout:///FOLDER")
    repo = found["repo"]
    if found["host"] == HUB and "/" not in repo:
        repo = HUB_PEOPLE + repo
    return Reference(f"oci://{found['host']}{found['query'] or ''}", repo, found["digest"] or found["tag"] or "latest")


def chosen(listed: Iterable[Mapping[str, Any]], platform: str) -> str:
    """The digest of the image for ``platform`` in a list of them. BuildFailed, telling which there are."""
    there = set()
    for entry in listed:
        about = entry.get("platform") or {}
        name = f"{about.get('os')}/{about.get('architecture')}"
        if name == platform:
            return str(entry["digest"])
        there.add(name)
    told = ", ".join(sorted(there - NO_PLATFORM)) or "none"
    raise BuildFailed(f"the base has no image for {platform}; it has: {told}")


def together(layers: Iterable[Files]) -> dict[str, str]:
    """The files that are seen when layers lie on each other."""
    seen: dict[str, str] = {}
    for layer in layers:
        for gone in layer.gone:
            below = gone if gone.endswith("/") or not gone else f"{gone}/"
            seen = {path: link for path, link in seen.items() if path != gone and not path.startswith(below)}
        seen |= layer.there
    return seen


def fits(files: Mapping[str, str], name: str) -> list[str]:
    """What a builder should know of a base that can be built on, as warnings. BuildFailed for one that cannot."""
    if "opt/modelyard/launch.py" in files or "opt/env/lib" in files:
        raise BuildFailed(f"the base {name} holds a scoring server already; give the base that it was built on")
    if any("ld-musl-" in path for path in files):
        raise BuildFailed(f"the base {name} has musl as its C library (Alpine), for which packages have no wheels; "
                          "give one with glibc: Debian, Ubuntu, Red Hat …")
    if not any(path.endswith("libstdc++.so.6") for path in files):
        return [f"the base {name} has no libstdc++.so.6, which wheels of numpy and gRPC need; if replicas do not "
                "start, add it there (Debian: libstdc++6)"]
    return []


def interpreter(files: Mapping[str, str], env: Iterable[str], wanted: str | None, name: str) -> tuple[str, str]:
    """The Python of a base: its minor version (``3.11``) and its path. What ``python3`` means there, unless another
    is ``wanted``. BuildFailed when there is none."""
    search = dict(pair.partition("=")[::2] for pair in env).get("PATH", PATH)
    order = [folder.strip("/") for folder in search.split(":")]
    found = {path: int(match[1]) for path in files if (match := PYTHON.search(path)) and match[1]}

    def rank(path: str) -> tuple[int, int, str]:
        folder = posixpath.dirname(path)
        return order.index(folder) if folder in order else len(order), -found[path], path

    usable = sorted((path for path, minor in found.items() if minor >= OLDEST), key=rank)
    if wanted is not None:
        usable = [path for path in usable if f"3.{found[path]}" == wanted]
    else:
        usable.sort(key=lambda path: (rank(path)[0], not _is_default(path, files), rank(path)))
    if not usable:
        there = ", ".join(f"3.{minor}" for minor in sorted(set(found.values()))) or "none"
        asked = f"Python {wanted}" if wanted else f"Python 3.{OLDEST} or newer"
        raise BuildFailed(f"the base {name} has no {asked}; what it has under bin/: {there}"
                          + ("; leave python away, or give another base" if wanted and found else ""))
    return f"3.{found[usable[0]]}", f"/{usable[0]}"


def _is_default(path: str, files: Mapping[str, str]) -> bool:
    """Whether ``python3`` beside it leads to it."""
    leads = files.get(posixpath.join(posixpath.dirname(path), "python3"), "")
    return posixpath.basename(leads) == posixpath.basename(path)
