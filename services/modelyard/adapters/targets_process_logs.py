"""Reading what the children of a supervisor wrote: one file a child, each line with its time in front."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import os
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from .folder import in_thread

LOOK_S = 0.25
READ = 1 << 20


class LogReader:
    """The logs in one folder, as lines ``<child> <time> <text>`` in the order of their times."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, BinaryIO] = {}

    async def read(self, tail: int, follow: bool) -> AsyncIterator[bytes]:
        """The last ``tail`` lines of all together, then, with ``follow``, what comes until the folder is gone."""
        try:
            last = await in_thread(self._tail, max(0, tail), follow)
            if last:
                yield last
            while follow and await asyncio.to_thread(self._folder.is_dir):
                if fresh := await in_thread(self._fresh):
                    yield fresh
                else:
                    await asyncio.sleep(LOOK_S)
        finally:
            for file in self._open.values():
                file.close()

    def _tail(self, tail: int, follow: bool) -> bytes:
        ends: list[list[tuple[bytes, bytes]]] = []
        for name, path in self._files():
            lines: deque[bytes] = deque(maxlen=tail)
            for part in (path.with_name(f"{path.name}.1"), path):
                with contextlib.suppress(FileNotFoundError), open(part, "rb") as file:
                    file.seek(max(0, os.fstat(file.fileno()).st_size - 8 * READ))
                    lines.extend(file.read().splitlines())
            ends.append([(line, name) for line in lines])
            if follow:
                self._open[str(path)] = file = open(path, "rb")  # noqa: SIM115 - stays open while it is followed
                file.seek(0, os.SEEK_END)
        newest = deque(heapq.merge(*ends), maxlen=tail)
        return b"".join(name + b" " + line + b"\n" for line, name in newest)

    def _fresh(self) -> bytes:
        """What was written since the last look; a file that was turned is read to its end first."""
        lines: list[tuple[bytes, bytes]] = []
        for name, path in self._files():
            file = self._open.get(str(path))
            if file is not None:
                lines += [(line, name) for line in _whole_lines(file)]
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(file.fileno()).st_ino == os.stat(path).st_ino:
                        continue
                file.close()
            with contextlib.suppress(FileNotFoundError):
                self._open[str(path)] = file = open(path, "rb")  # noqa: SIM115 - as above
                lines += [(line, name) for line in _whole_lines(file)]
        return b"".join(name + b" " + line for line, name in sorted(lines))

    def _files(self) -> list[tuple[bytes, Path]]:
        return [(path.name.removesuffix(".log").encode(), path) for path in sorted(self._folder.glob("*.log"))]


def _whole_lines(file: BinaryIO) -> list[bytes]:
    """Lines that have their end; the file stays at the beginning of one that has not."""
    start = file.tell()
    data = file.read(READ)
    end = data.rfind(b"\n") + 1
    file.seek(start + end)
    return data[:end].splitlines(keepends=True)
