"""What a layout folder holds and nothing needs: blobs of builds that died, uploads that broke off, tags that are over.

Beside the port, for only a folder can be looked through; a registry collects its own garbage. It takes the same lock as
every writer, and leaves alone what a build has put or found (its pins), so builds may run meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from .folder import in_thread
from .images_layout import REF_NAME, STALE_S, LayoutImages
from .images_names import hex_of

BROKEN_OFF_S = 3600.0
"""An upload that nobody wrote to for so long is over."""
Found = tuple[str, str, int]
"""What it is (``tag``, ``blob``, ``upload``), its name, its bytes."""


class LayoutSweep:
    """The broom of one folder."""

    def __init__(self, images: LayoutImages) -> None:
        self._images = images

    async def tags(self) -> list[str]:
        """Every ``repo:tag`` in the folder."""
        listed = await in_thread(self._images._index)
        return [ref for entry in listed if (ref := _ref(entry))]

    async def has(self, digest: str) -> bool:
        """Whether the blob is there."""
        return bool(await in_thread((self._images._blobs / hex_of(digest)).exists))

    async def sweep(self, gone: Collection[str], older_s: float, dry: bool) -> list[Found]:
        """Takes away the tags ``gone``, and blobs that nothing names and nobody wrote to for ``older_s`` seconds.
        ``dry``: only finds them."""
        found: list[Found] = await in_thread(self._images._guarded, self._sweep, frozenset(gone), older_s, dry)
        return found

    def _sweep(self, gone: frozenset[str], older_s: float, dry: bool) -> list[Found]:
        with self._images._locked():
            before = self._images._index()
            after = [entry for entry in before if _ref(entry) not in gone]
            needed = frozenset[str]().union(*(self._images._needed_by(entry["digest"]) for entry in after))
            out = [("tag", _ref(entry), 0) for entry in before if _ref(entry) in gone]
            blobs = list(self._blobs(needed, time.time() - older_s))
            uploads = list(self._uploads(time.time() - max(older_s, BROKEN_OFF_S)))
            out += [("blob", path.name, _size(path)) for path in blobs]
            out += [("upload", path.name, _size(path)) for path in uploads]
            if not dry:
                if len(after) != len(before):
                    self._images._write_index(after)
                for path in (*blobs, *uploads):
                    path.unlink(missing_ok=True)
                    self._images._needs.pop(f"sha256:{path.name}", None)
        return out

    def _blobs(self, needed: frozenset[str], limit: float) -> Iterator[Path]:
        pinned = {path.name.partition(".")[0] for path in _of(self._images._pins)
                  if _written(path) >= time.time() - STALE_S}
        for path in _of(self._images._blobs):
            if path.name not in needed and path.name not in pinned and _written(path) < limit:
                yield path

    def _uploads(self, limit: float) -> Iterator[Path]:
        both = (*_of(self._images._tmp), *_of(self._images._up))
        return (path for path in both if _written(path) < limit)


def _of(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False))


def _ref(entry: dict[str, object]) -> str:
    marks = entry.get("annotations")
    return str(marks.get(REF_NAME, "")) if isinstance(marks, dict) else ""


def _written(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return time.time()


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
