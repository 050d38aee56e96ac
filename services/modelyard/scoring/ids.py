"""Prediction ids: 32 hexadecimal digits, of which twelve are the millisecond and twenty are drawn by lot."""

from __future__ import annotations

import random

DRAWN = 256
_dice = random.Random()  # ours alone: scoring code may seed the module's


class _Ids:
    """Draws for many ids at once. Of the event loop."""

    def __init__(self) -> None:
        self._lots = ""
        self._at = 0
        self._millisecond = -1
        self._begins = ""

    def __call__(self, now_ns: int) -> str:
        """An id that no other call has; ids sort by time. ``now_ns`` is ``time.time_ns()``."""
        millisecond = now_ns // 1_000_000
        if millisecond != self._millisecond:
            self._millisecond, self._begins = millisecond, f"{millisecond:012x}"
        at = self._at
        if at == len(self._lots):
            self._lots, at = f"{_dice.getrandbits(80 * DRAWN):0{20 * DRAWN}x}", 0
        self._at = at + 20
        return self._begins + self._lots[at:at + 20]


new_id = _Ids()
