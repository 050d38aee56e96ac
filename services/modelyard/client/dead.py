"""Dead letters: events that a service could not handle, and the way back."""

from __future__ import annotations

from typing import Any

from .http import Http, Params, path
from .models import pages


class AsyncDeadLetters:
    """What lies in ``/v1/dead``."""

    def __init__(self, http: Http) -> None:
        self._http = http

    async def list(self, *, service: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Dead letters, the newest first; all services', or one's.

        >>> yard.dead.list()
        []
        """
        params: Params = {"service": service}
        return [d async for d in pages(self._http, path("dead"), params, limit)]

    async def get(self, id: str) -> dict[str, Any]:
        """One dead letter: the event, where it lay, the error, how often it was tried. Raises NotFound."""
        found: dict[str, Any] = await self._http.json("GET", path("dead", id))
        return found

    async def replay(self, id: str) -> dict[str, Any]:
        """Handles it again; the answer's ``outcome`` is what came of it (``superseded``: newer events were seen)."""
        answer: dict[str, Any] = await self._http.json("POST", path("dead", id, "replay"))
        return answer

    async def drop(self, id: str) -> None:
        """Takes it away for good; one that is not there is fine."""
        await self._http.send("DELETE", path("dead", id))
