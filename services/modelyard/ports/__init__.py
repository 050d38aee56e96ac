"""DOORS: the outside things, each a small abstract class whose docstrings are its promises.

Every method is async. Every adapter is opened by ``adapters/urls.py`` from a URL and closed by ``close``.
``tests/contract`` holds one suite per port; every adapter passes all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod


class Port(ABC):
    """What all ports share: they are asked whether they work, and closed once."""

    @abstractmethod
    async def check(self) -> None:
        """Returns when the thing behind the port answers. Raises Unavailable with the line to fix it."""

    @abstractmethod
    async def close(self) -> None:
        """Releases everything; no task or thread is left. Closing twice is fine."""
