"""AsyncClient: one yard, by its URL."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .capture import AsyncCapture, Moment, telemetry
from .dead import AsyncDeadLetters
from .deployments import AsyncDeployments
from .fields import Reference, reference
from .http import Http
from .images import AsyncImages
from .models import AsyncModels
from .uploads import OnProgress

if TYPE_CHECKING:
    from .apply import Change
    from .events import Event

DEFAULT_URL = "http://127.0.0.1:8700"


class AsyncClient:
    """The whole yard behind one URL; any of its services will do.

    ``url``: absent, ``MODELYARD_URL``, else http://127.0.0.1:8700. ``token``: absent, ``MODELYARD_TOKEN``.
    ``timeout_s`` bounds one silence of the server, not a whole upload. Nothing is sent before the first call.
    Use it as a context manager, or ``close`` it. Errors are those of ``modelyard.core.errors``.

        async with AsyncClient() as yard:
            model = await yard.models.register("iris", "model.onnx")
            image = await (await yard.images.build("iris-scorer", models=[model])).wait()
            service = await (await yard.deployments.create("iris", image=image)).wait()
            await service.score([[5.1, 3.5, 1.4, 0.2]])
    """

    def __init__(self, url: str | None = None, token: str | None = None, *, timeout_s: float = 90.0) -> None:
        address = url or os.environ.get("MODELYARD_URL") or DEFAULT_URL
        self._http = Http(address, token or os.environ.get("MODELYARD_TOKEN") or None, timeout_s)
        self.models = AsyncModels(self._http)
        self.images = AsyncImages(self._http)
        self.deployments = AsyncDeployments(self._http)
        self.dead = AsyncDeadLetters(self._http)

    @property
    def url(self) -> str:
        """Where this client calls."""
        return str(self._http.base)

    def capture(self, deployment: Reference) -> AsyncCapture:
        """What was captured of a deployment: ``read``, ``raw``, ``verify``."""
        return AsyncCapture(self._http, reference(deployment))

    async def telemetry(
        self, deployment: Reference, *, window: str | None = None, start: Moment = None, end: Moment = None,
    ) -> list[dict[str, Any]]:
        """Windows of one length (``1m``, ``5m``, ``1h`` …): requests, errors by status, latency percentiles in
        milliseconds, for each image and model.

        >>> sum(w["requests"] for w in yard.telemetry("iris")) >= 1
        True
        """
        return await telemetry(self._http, deployment, window, start, end)

    def events(
        self, types: Sequence[str] | None = None, *, subject: str | None = None, after: str = "end",
        follow: bool = True,
    ) -> AsyncIterator[Event]:
        """Events as they happen; ``after`` is ``beginning``, ``end`` or a cursor. ``types`` are topics, ``*`` at
        the end matches any rest: ``deployment.*``. A lost connection is taken up again behind the last event.
        Never ends by itself, unless ``follow`` is False: then what there is up to now.

        >>> [e.topic for e in yard.events(["model.*"], after="beginning", follow=False)][:2]
        ['model.registered', 'model.updated']
        """
        from .events import stream

        return stream(self._http, types, subject, after, follow)

    async def apply(
        self, documents: Sequence[Mapping[str, Any]], *, root: str | Path = ".", dry_run: bool = False,
        on_progress: OnProgress | None = None,
    ) -> list[Change]:
        """Makes the yard hold these documents (``kind: Model``, ``Image``, ``Deployment``), in order. One that
        equals the newest version changes nothing; relative paths start at ``root``; ``dry_run`` only tells."""
        from .apply import apply

        return await apply(self, documents, Path(root), dry_run, on_progress)

    async def ready(self) -> dict[str, Any]:
        """What ``/readyz`` says. Raises Unavailable with what is missing."""
        return dict(await self._http.json("GET", "/readyz", repeat=False) or {})

    async def ask(self, route: str) -> str:
        """The text of a GET, for routes that have no method here: ``/v1/openapi.json``."""
        return (await self._http.send("GET", route)).body.decode(errors="replace")

    async def close(self) -> None:
        """Closes every connection."""
        await self.deployments.close()
        await self._http.close()

    @property
    def http(self) -> Http:
        """The session below, for routes that have no method here."""
        return self._http

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None,
    ) -> None:
        await self.close()
