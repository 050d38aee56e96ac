"""``/livez``, ``/readyz`` and ``/metrics`` of one server.

Alive: the event loop answers. Ready: every store answers. A bus that is away only degrades: what is committed waits in
the outboxes, so requests are still accepted. So do blobs and images on a server: what does not need them goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from aiohttp import web

from ..core.errors import ModelyardError, Unavailable
from ..ports import Port
from .call import Call, reply
from .observe import Once, metrics_text
from .service import Context
from .web import Route

log = logging.getLogger(__name__)
PATIENCE_S = 3.0


async def _ask(name: str, port: Port, said: Once) -> str:
    """``ok``, or why not; the log is told once of either."""
    told = "ok"
    try:
        async with asyncio.timeout(PATIENCE_S):
            await port.check()
    except ModelyardError as exc:
        told = exc.message
    except TimeoutError:
        told = f"no answer within {PATIENCE_S:g} s"
    if told == "ok" and said.clear(name):
        log.info("%s: works again", name)
    elif told != "ok" and said.new(name, told):
        log.warning("%s: %s", name, told)
    return told


def routes(needed: Mapping[str, Port], wanted: Mapping[str, Port], services: Sequence[str]) -> list[Route]:
    """``needed`` ports decide readiness; ``wanted`` ones only degrade. Both: name → port."""
    said = Once()

    async def livez(ctx: Context, call: Call) -> web.StreamResponse:
        return reply({"status": "ok"})

    async def readyz(ctx: Context, call: Call) -> web.StreamResponse:
        if call.closing.is_set():
            raise Unavailable("this server is stopping", code="not-ready")
        asked = {**needed, **wanted}
        answers = await asyncio.gather(*(_ask(name, port, said) for name, port in asked.items()))
        checks = dict(zip(asked, answers, strict=True))
        lost = [name for name in needed if checks[name] != "ok"]
        if lost:
            raise Unavailable("not ready: " + "; ".join(f"{name}: {checks[name]}" for name in lost),
                              code="not-ready", checks=checks, retry_after=2)
        status = "ok" if all(told == "ok" for told in answers) else "degraded"
        return reply({"status": status, "services": list(services), "checks": checks})

    async def metrics(ctx: Context, call: Call) -> web.StreamResponse:
        body = await asyncio.to_thread(metrics_text)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    return [
        Route("GET", "/livez", livez, "Is the process alive?"),
        Route("GET", "/readyz", readyz, "Does it accept requests? 503 when a store does not answer"),
        Route("GET", "/metrics", metrics, "Metrics in Prometheus' text format"),
    ]
