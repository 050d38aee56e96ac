"""Lines for whoever reads a deployment's log."""

from __future__ import annotations

import sys
import time

CALM_S = 5.0
"""What has not happened for so long is over. A disk that is full takes a little now and then."""


def say(line: str) -> None:
    """One line for the deployment's log."""
    sys.stderr.write(f"modelyard: {line}\n")
    sys.stderr.flush()


class Trouble:
    """What keeps calls from being recorded: it is told when it begins, and when it is over, not each time."""

    def __init__(self) -> None:
        self._last = ""
        self._at = 0.0

    def met(self, exc: Exception) -> None:
        """It happened, perhaps again."""
        if not self._last:
            say(f"calls cannot be recorded: {exc or repr(exc)}; this is tried again until it works")
        self._last, self._at = repr(exc), time.monotonic()

    def calm(self, now: float) -> None:
        """All seems well."""
        if self._last and now - self._at >= CALM_S:
            self._last = ""
            say("calls are recorded again")
