"""The output of one child, line by line with its time, in a file that never outgrows its cap."""

from __future__ import annotations

import os
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

LIMIT = 4 * 2**20
LINE = 16 * 2**10


class LogFile:
    """Appends ``<RFC 3339 time> <line>``. At ``LIMIT`` bytes the file becomes ``<name>.1`` and a new one begins, so
    that one child's log takes at most twice that. A line longer than ``LINE`` bytes is cut into several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: deque[str] = deque(maxlen=20)
        self._part = b""
        self._fd = -1
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Takes output as it comes; what follows the last newline waits for its end."""
        *lines, self._part = (self._part + data).split(b"\n")
        while len(self._part) > LINE:
            lines.append(self._part[:LINE])
            self._part = self._part[LINE:]
        self._write([line[i:i + LINE] for line in lines for i in range(0, max(1, len(line)), LINE)])

    def say(self, text: str) -> None:
        """One line of ours."""
        self.flush()
        self._write([text.encode()])

    def flush(self) -> None:
        """Writes the unfinished line, when its writer is gone."""
        part, self._part = self._part, b""
        if part:
            self._write([part])

    def reason(self) -> str:
        """The last line that says something, for a person who asks why it failed."""
        return next((line.strip() for line in reversed(self.last) if line.strip()), "")[:500]

    def close(self) -> None:
        self.flush()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, lines: list[bytes]) -> None:
        if not lines:
            return
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ ").encode()
        data = b"".join(stamp + line.rstrip(b"\r") + b"\n" for line in lines)
        self.last.extend(line.decode(errors="replace") for line in lines[-20:])
        try:
            if self._fd < 0 or self._size + len(data) > LIMIT:
                self._turn()
            self._size += os.write(self._fd, data)
        except OSError:  # a full disk must not stop replicas from answering; ``last`` still has the lines
            return

    def _turn(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            os.replace(self.path, f"{self.path}.1")
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size
