"""The stream worker's own small endpoint: live windows for the telemetry service, and whether the worker is well.

Faust's own web server is off: it would show every table to anybody who asks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..core.errors import Unavailable
from ..kernel.forward import Peers
from ..kernel.guard import Guard
from ..kernel.observe import metrics_text
from ..kernel.web import Call, application, forward_to, reply, web

NAME = "stream"
PATH = "/internal/v1/live"
SHARED_OUT = "the live windows are being shared out; ask again"


class Windows(Protocol):
    """What a worker holds: the windows of some deployments."""

    @property
    def ready(self) -> bool:
        """Its share is known and read."""

    def owner(self, workspace: str, deployment: str) -> str | None:
        """The URL of the worker that has them; None while nobody has."""

    def show(self, workspace: str, deployment: str) -> list[dict[str, Any]]:
        """The live windows of a deployment, in order of time."""


@dataclass
class Site:
    """Answers for one worker at ``url``; what another has is asked of it. ``trouble`` is what stands in the way."""

    token: str
    url: str = ""
    windows: Windows | None = None
    trouble: str = "Kafka was not reached yet"
    peers: Peers = field(init=False)

    def __post_init__(self) -> None:
        self.peers = Peers({}, self.token)

    def application(self, guard: Guard) -> web.Application:
        """Its routes, in the frame that every service has."""
        app = application(guard)
        for path, answer in ((PATH, self._live), ("/livez", self._alive), ("/readyz", self._ready),
                             ("/metrics", self._metrics)):
            forward_to(app, NAME, (path,), answer)
        return app

    def _here(self) -> Windows:
        if self.windows is None or not self.windows.ready:
            raise Unavailable("not ready: " + (self.trouble or "the changelog of live windows is being read"),
                              code="not-ready", retry_after=2)
        return self.windows

    async def _live(self, _: str, call: Call) -> web.StreamResponse:
        here, name = self._here(), call.request.path.removeprefix(PATH + "/")
        owner = here.owner(call.workspace, name)
        if owner == self.url:
            return reply({"windows": here.show(call.workspace, name)})
        if owner is None or "hop" in call.query:
            raise Unavailable(SHARED_OUT, retry_after=2)
        self.peers.urls[owner] = owner
        return reply(await self.peers.call(owner, "GET", f"{PATH}/{Peers.quote(name)}?hop=1", workspace=call.workspace))

    async def _alive(self, _: str, call: Call) -> web.StreamResponse:
        return reply({"status": "ok"})

    async def _ready(self, _: str, call: Call) -> web.StreamResponse:
        self._here()
        return reply({"status": "degraded" if self.trouble else "ok", "services": [NAME],
                      "checks": {"bus": self.trouble or "ok"}})

    async def _metrics(self, _: str, call: Call) -> web.StreamResponse:
        return web.Response(body=await asyncio.to_thread(metrics_text),
                            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
