"""Waking: somebody has work for a loop, so it need not wait for its next look."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

Key = tuple[str, str, str]


class Changes:
    """Tells those who wait for a document of this process that it was committed. Another process's commits are not
    told: whoever waits looks again now and then."""

    def __init__(self) -> None:
        self._waiting: WeakValueDictionary[Key, asyncio.Event] = WeakValueDictionary()

    def tell(self, kind: str, workspace: str, id: str) -> None:
        """Call from the event loop's thread, after the commit."""
        if (event := self._waiting.pop((kind, workspace, id), None)) is not None:
            event.set()

    def listen(self, kind: str, workspace: str, id: str) -> asyncio.Event:
        """Set by the next commit of this document. Ask before reading it, so that no commit slips between. It is
        forgotten when nobody holds it any more."""
        return self._waiting.setdefault((kind, workspace, id), asyncio.Event())


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
