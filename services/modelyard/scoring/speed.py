"""What a call costs a lane while others wait behind it, so that the wait of a newcomer can be told."""

from __future__ import annotations

REMEMBERED = 32
HOPE = 0.7
"""A call is taken in when the wait before it is no more than this part of the time it has. A queue that may be as long
as the deadline answers nobody in time: whatever is begun then is as good as expired, and all the work is in vain."""


class Speed:
    """A moving mean over batches. ``call_s`` is 0 until calls have waited for each other: then nobody is refused."""

    __slots__ = ("_seen", "call_s")

    def __init__(self) -> None:
        self.call_s = 0.0
        self._seen = 0

    def took(self, seconds: float, calls: int, more: bool) -> None:
        """A batch of so many calls took so long. ``more``: others waited meanwhile. Where none did the batch might
        have been larger, so it says only how much a call costs at most."""
        each = seconds / calls
        if more or each < self.call_s:
            self._seen = min(self._seen + 1, REMEMBERED)
            self.call_s += (each - self.call_s) / self._seen

    def hopeless(self, waiting: int, left_s: float) -> float:
        """The seconds that a call would wait behind so many; 0.0: they are few enough for the time it has."""
        wait = waiting * self.call_s
        return wait if wait > HOPE * left_s else 0.0
