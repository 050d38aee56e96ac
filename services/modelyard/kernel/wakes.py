"""Waking: somebody has work for a loop, so it need not wait for its next look."""

from __future__ import annotations

import asyncio


class Wakes:
    """Named alarms of one service. ``Context.wake`` is ``wakes.wake``; each name has one sleeper.

    A wake that comes while nobody sleeps is kept, so work found between two looks is never missed.
    """

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def wake(self, name: str) -> None:
        """Call from the event loop's thread."""
        self._events.setdefault(name, asyncio.Event()).set()

    async def wait(self, name: str, timeout_s: float) -> bool:
        """Sleeps until woken (True) or until ``timeout_s`` is over (False)."""
        event = self._events.setdefault(name, asyncio.Event())
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            event.clear()
        return True
