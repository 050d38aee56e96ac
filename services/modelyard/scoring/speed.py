"""What a call costs a lane while others wait behind it, so that the wait of a newcomer can be told."""

from __future__ import annotations

import time

REMEMBERED = 32
HOPE = 0.7
"""A call is taken in when the wait before it is no more than this part of the time it has. A queue that may be as long
as the deadline answers nobody in time: whatever is begun then is as good as expired, and all the work is in vain."""


class Speed:
    """A moving mean over batches. ``call_s`` is 0 until calls were too many to be taken together: nobody is refused
    till then. ``overlapping``: several batches run at once. ``running``: how many calls do."""

    __slots__ = ("_pressed", "_seen", "_since", "call_s", "overlapping", "running")

    def __init__(self) -> None:
        self.call_s, self.overlapping = 0.0, False
        self.running, self._since = 0, 0.0
        self._seen, self._pressed = 0, False

    def begun(self, calls: int, now: float) -> None:
        """A batch of so many is, at this ``time.monotonic()``."""
        self.running += calls
        self._since = now

    def ended(self, calls: int) -> None:
        """A batch of so many has."""
        self.running -= calls

    def took(self, seconds: float, calls: int, more: bool) -> None:
        """So many calls, one batch or several at once, took so long. ``more``: others could not be with them. Where all
        were there might have been more of them in the same time, so it says only what a call costs at most."""
        each = seconds / calls
        if more or self._pressed or each < self.call_s:
            self._seen, self._pressed = min(self._seen + 1, REMEMBERED), False
            self.call_s += (each - self.call_s) / self._seen

    def hopeless(self, left_s: float, waiting: int) -> float:
        """The seconds that a call would wait behind so many and what runs; 0.0: they are few enough for the time it
        has. Asked for each call."""
        wait = (waiting + self.running) * self.call_s
        if wait <= HOPE * left_s:
            return 0.0
        if self.running and not self.overlapping:
            wait -= min(self.running * self.call_s, time.monotonic() - self._since)
            if wait <= HOPE * left_s:
                return 0.0
        self._pressed = True
        return wait

    def together(self, deadline: float, most: int) -> int:
        """How many calls may be one batch so that the first of them, with this deadline, is answered in time."""
        if not self.call_s:
            return most
        return min(most, max(1, int(HOPE * (deadline - time.monotonic()) / self.call_s)))
