"""``/v1/dead``: dead letters of all services, read and brought back from any one of them.

Each service answers for its own under ``/internal/v1/dead/<service>``; the public routes ask them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from ..core.errors import Invalid, NotFound, Unavailable
from .call import Call, reply
from .dead import DeadLetter, dead_letter, dead_letters, drop, replay
from .forward import Peers
from .paging import limit_of, seal, unseal
from .service import Context, Service
from .web import Route

PARAMETERS = {"service": "Only of this service.", "limit": "How many at most.",
              "after": "The `next` of the page before."}


def view(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter as callers see it: with the service that could not handle it."""
    return {**letter.view(), "service": letter.group}


def internal_routes(service: Service) -> list[Route]:
    """A service's own dead letters, for the other services."""
    base = f"/internal/v1/dead/{service.name}"

    async def listed(ctx: Context, call: Call) -> web.StreamResponse:
        after = (call.query["created"], call.query["id"]) if "id" in call.query else None
        found = await dead_letters(ctx.store, workspace=call.workspace, after=after, limit=limit_of(call.query))
        return reply({"items": [view(letter) for letter in found]})

    async def show(ctx: Context, call: Call) -> web.StreamResponse:
        return reply(view(await dead_letter(ctx.store, call.params["id"], workspace=call.workspace)))

    async def again(ctx: Context, call: Call) -> web.StreamResponse:
        outcome = await replay(ctx, service, call.params["id"], workspace=call.workspace)
        return reply({"id": call.params["id"], "service": service.name, "outcome": outcome})

    async def away(ctx: Context, call: Call) -> web.StreamResponse:
        await drop(ctx, call.params["id"], workspace=call.workspace)
        return reply({"id": call.params["id"], "service": service.name, "outcome": "dropped"})

    return [
        Route("GET", base, listed, "Dead letters of this service"),
        Route("GET", base + "/{id}", show, "One dead letter"),
        Route("POST", base + "/{id}/replay", again, "Handle it again"),
        Route("DELETE", base + "/{id}", away, "Give it up"),
    ]


class _Letters:
    """The public routes: every service is asked, at once."""

    def __init__(self, names: Sequence[str], peers: Peers) -> None:
        self.names, self.peers = names, peers

    async def _ask(self, call: Call, names: Sequence[str], method: str,
                   tail: str) -> tuple[list[dict[str, Any]], list[Unavailable]]:
        """What the services answered (without those that know nothing), and who could not be asked."""
        answers = await asyncio.gather(*(
            self.peers.call(name, method, f"/internal/v1/dead/{name}{tail}", workspace=call.workspace)
            for name in names), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Unavailable):
                raise answer
        return ([a for a in answers if isinstance(a, dict)], [a for a in answers if isinstance(a, Unavailable)])

    async def listed(self, ctx: Context, call: Call) -> web.StreamResponse:
        """The newest first. The place behind a letter is the same in every service: (created, id)."""
        names = [call.query["service"]] if "service" in call.query else list(self.names)
        if unknown := set(names) - set(self.names):
            raise Invalid(f"no service is called '{', '.join(unknown)}'; there are: {', '.join(self.names)}",
                          field="service")
        limit = limit_of(call.query)
        place = dict(zip(("created", "id"), map(str, unseal(call.query["after"], 2)), strict=True)) \
            if "after" in call.query else {}
        answers, down = await self._ask(call, names, "GET", "?" + urlencode({"limit": limit, **place}))
        if down and len(names) == len(down):
            raise down[0]
        items = sorted((i for a in answers for i in a["items"]), key=lambda i: (i["created"], i["id"]), reverse=True)
        more = len(items) > limit or any(len(a["items"]) == limit for a in answers)
        items = items[:limit]
        return reply({"items": items, "next": seal([items[-1]["created"], items[-1]["id"]]) if items and more else None,
                      "unreachable": [{"service": d.detail.get("service"), "detail": d.message} for d in down]})

    async def _one(self, call: Call, method: str, tail: str = "") -> dict[str, Any] | None:
        answers, down = await self._ask(call, self.names, method, f"/{Peers.quote(call.params['id'])}{tail}")
        if not answers and down:
            raise down[0]
        return answers[0] if answers else None

    async def show(self, ctx: Context, call: Call) -> web.StreamResponse:
        return reply(_found(await self._one(call, "GET"), call))

    async def replay(self, ctx: Context, call: Call) -> web.StreamResponse:
        return reply(_found(await self._one(call, "POST", "/replay"), call))

    async def drop(self, ctx: Context, call: Call) -> web.StreamResponse:
        return reply(await self._one(call, "DELETE"))


def _found(answer: dict[str, Any] | None, call: Call) -> dict[str, Any]:
    if answer is None:
        raise NotFound(f"there is no dead letter '{call.params['id']}'", kind=DeadLetter.kind, id=call.params["id"])
    return answer


def routes(names: Sequence[str], peers: Peers) -> list[Route]:
    """The public routes over the dead letters of these services."""
    letters = _Letters(names, peers)
    return [
        Route("GET", "/v1/dead", letters.listed, "Events that a service could not handle, newest first",
              query=PARAMETERS),
        Route("GET", "/v1/dead/{id}", letters.show, "One of them: the event, the error, the attempts"),
        Route("POST", "/v1/dead/{id}/replay", letters.replay, "Hand it to its handler again"),
        Route("DELETE", "/v1/dead/{id}", letters.drop, "Give it up for good"),
    ]
