"""Trees of hard links: a layer's files into a root, into the user's cache, and out of it again.

Nothing here follows a symbolic link. What Python compiles goes along only where its source is the very same file
(one inode): layers have no times, so that Python itself would take the compiled code of another file of the same
size for good. It is scoring code's own user who wrote it there; see ``kernel/cache.py`` about trust.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..kernel.cache import DAY_S, Cache

COMPILED = "__pycache__"
KIND = "layers-v1"
COMMON = frozenset({"env", "modelyard"})
COMMON_HOME = frozenset({"lib", "launch.py"})
Link = Callable[[str, str], None]


def walk(tree: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Each folder below ``tree``, as a path relative to it, and its regular files; compiled code is left out. Raises
    OSError where a folder cannot be read or is taken away meanwhile."""
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        with os.scandir(os.path.join(tree, inside)) as found:
            entries = list(found)
        yield inside, [e for e in entries if e.is_file(follow_symlinks=False)]
        waiting += [os.path.join(inside, e.name) for e in entries
                    if e.name != COMPILED and e.is_dir(follow_symlinks=False)]


def link_files(source: Path, target: Path, link: Link = os.link) -> tuple[int, int]:
    """The files of one tree into another, in place of those of the same name. How many, and their bytes."""
    count = size = 0
    for inside, files in walk(source):
        into = os.path.join(target, inside)
        os.makedirs(into, 0o700, exist_ok=True)
        for file in files:
            place = os.path.join(into, file.name)
            try:
                link(file.path, place)
            except FileExistsError:
                os.unlink(place)
                link(file.path, place)
            count, size = count + 1, size + file.stat(follow_symlinks=False).st_size
    return count, size


def link_compiled(old: Path, new: Path, wanted: Callable[[str, str], bool] = lambda source, compiled: True) -> None:
    """``__pycache__`` of one folder into another's, where the source is the same file in both."""
    compiled_in = os.path.join(old, COMPILED)
    if not os.path.isdir(compiled_in) or os.path.islink(compiled_in):
        return
    into, suffix = os.path.join(new, COMPILED), f".{sys.implementation.cache_tag}.pyc"
    with contextlib.suppress(OSError):
        there = set(os.listdir(into)) if os.path.isdir(into) else set()
        for compiled in list(os.scandir(compiled_in)):
            stem = compiled.name.removesuffix(suffix)
            if stem == compiled.name or compiled.name in there or not compiled.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                source = os.path.join(old, f"{stem}.py")
                if os.path.samefile(source, os.path.join(new, f"{stem}.py")) and wanted(source, compiled.path):
                    os.makedirs(into, 0o700, exist_ok=True)
                    os.link(compiled.path, os.path.join(into, compiled.name))


def link_all_compiled(layer: Path, old: Path, new: Path,
                      wanted: Callable[[str, str], bool] = lambda source, compiled: True) -> None:
    """``link_compiled`` for every folder of a layer."""
    for inside, files in walk(layer):
        if files:
            link_compiled(old / inside, new / inside, wanted)


def is_of(source: str, compiled: str) -> bool:
    """Whether compiled code is this Python's, whole in its head, and says that it is of this source."""
    about = os.stat(source)
    with open(compiled, "rb") as file:
        head = file.read(16)
    time_, size = int(about.st_mtime) & 0xFFFFFFFF, about.st_size & 0xFFFFFFFF
    return head == importlib.util.MAGIC_NUMBER + struct.pack("<LLL", 0, time_, size)


class SharedLayers:
    """Unpacked layers that other data folders of this user have, or had, too; with what Python compiled of them.

    Only environments and our own code: a model or a scoring file does not outlive its data folder here. A file that
    its owner changed under us is not noticed, as it is not in ``<data>/layers``; a tree with files missing or cut is.
    """

    def __init__(self, cache: Cache, link: Link = os.link) -> None:
        self._cache = cache
        self._link = link
        self._added = False

    def fetch(self, name: str, tree: Path) -> bool:
        """Makes ``tree`` of the cached layer. False when there is none, or it cannot be linked to here."""
        entry = self._cache.find(KIND, name)
        if entry is None:
            return False
        with contextlib.suppress(OSError, ValueError):
            extent = json.loads((entry / "extent.json").read_bytes())
            try:
                if list(link_files(entry / "tree", tree, self._link)) == extent:
                    link_all_compiled(tree, entry / "tree", tree)
                    return True
            except OSError as exc:
                if exc.errno not in (errno.ENOENT, errno.ENOTDIR):
                    shutil.rmtree(tree, ignore_errors=True)
                    return False
        shutil.rmtree(tree, ignore_errors=True)
        self._cache.drop(KIND, name)
        return False

    def keep(self, name: str, tree: Path) -> None:
        """Adds the layer, when it is one to be shared."""

        def make(beside: Path) -> None:
            beside.mkdir(mode=0o700)
            extent = link_files(tree, beside / "tree", self._link)
            (beside / "extent.json").write_text(json.dumps(extent))

        if _common(tree):
            self._cache.keep(KIND, name, make)
            self._added = True

    def harvest(self, name: str, root: Path) -> None:
        """What Python compiled in a root, for the next root that is made of the same layer, in whichever folder."""
        if (entry := self._cache.find(KIND, name)) is not None:
            with contextlib.suppress(OSError):
                link_all_compiled(entry / "tree", root, entry / "tree", is_of)

    def prune(self) -> None:
        """Once a day, and after something was added."""
        self._cache.prune(0.0 if self._added else DAY_S)
        self._added = False


def _common(tree: Path) -> bool:
    """Whether a layer holds an environment or our own code, and nothing of the user's."""
    with contextlib.suppress(OSError):
        top = set(os.listdir(tree / "opt"))
        home = set(os.listdir(tree / "opt/modelyard")) if "modelyard" in top else set()
        return bool(top) and top <= COMMON and home <= COMMON_HOME
    return False
