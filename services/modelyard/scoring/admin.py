"""The admin socket: ``/livez``, ``/readyz``, ``/metrics``, ``POST /drain``, ``POST /spread``. For whoever runs the
replica, not for callers; it answers while models load, while calls queue and while the server drains."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from .dataplane import DataPlane
from .rest import Found, Reply, Site, exposition, told


class Admin(Site):
    """``drain`` is called when somebody posts ``/drain``, ``spread`` when ``/spread``; the answer says that it is
    done."""

    def __init__(self, plane: DataPlane, drain: Callable[[], Awaitable[None]],
                 spread: Callable[[], Awaitable[None]]) -> None:
        super().__init__(plane)
        self._plain = {
            "/livez": Found(lambda found, query: self._state(503 if plane.stuck else 200)),
            "/readyz": Found(lambda found, query: self._state(200 if plane.ready else 503)),
            "/metrics": Found(lambda found, query: exposition(plane)),
            "/drain": Found(work=partial(self._after, drain)), "/spread": Found(work=partial(self._after, spread))}
        self._of_models = {}

    async def _after(self, done: Callable[[], Awaitable[None]]) -> Reply:
        await done()
        return self._state(202)

    def _state(self, status: int) -> Reply:
        plane = self._plane
        return told({"ready": plane.ready, "draining": plane.draining, "in_flight": plane.metrics.in_flight,
                     "stuck": plane.stuck}, status)
