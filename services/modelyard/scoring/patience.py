"""How long a lane lets calls come in before it begins: turns of the event loop, never time.

h2corn hands over in one turn all that has arrived, so nothing is waited for: it would only cost calls (record 0029).
grpcio takes several turns for each call, so that of sixty calls that are there a lane sees one, and would run sixty
predictions where one would do. Whether waiting brings anything is found out by waiting: where it does not, a call is
begun at once, and only one in ``PROBE`` tries again.
"""

from __future__ import annotations

TURNS = 12
"""Nothing came for so many turns: nothing more is on its way. grpcio takes six or seven."""
MISSES, PROBE = 3, 32


class Patience:
    """Of one lane, in the event loop: ``begin`` with a queue that was empty, then ``enough`` once a turn."""

    def __init__(self) -> None:
        self._left = MISSES
        """Below 1 nothing is waited for; how far below says since when."""
        self._first = self._seen = self._quiet = 0
        self._waits = False

    def begin(self, queued: int) -> None:
        """The lane has something to do; from here on it asks whether it should."""
        self._first = self._seen = queued
        self._quiet = 0
        if self._left <= -PROBE:
            self._left = 1
        self._waits = self._left > 0

    def enough(self, queued: int, most: int) -> bool:
        """Whether to begin now, with so many calls queued of ``most`` that one prediction takes."""
        if self._waits and queued < most:
            self._quiet = self._quiet + 1 if queued == self._seen else 0
            self._seen = queued
            if self._quiet < TURNS:
                return False
        if not self._waits:
            self._left -= 1
        elif queued > self._first:
            self._left = MISSES
        else:
            self._left -= 1
        return True
