"""Faults put into the house on purpose: each is one that somebody could write, and the simulator must find it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from modelyard.core.errors import Unavailable
from modelyard.kernel import consume, loop, relay
from modelyard.kernel.service import Context
from modelyard.registry import holds


async def _sent_first(ctx: Any, bus: Any, pending: Any) -> None:
    await ctx.store.sent(pending)
    for event in pending.events:
        await bus.publish(event)


async def _backwards(ctx: Any, bus: Any, pending: Any) -> None:
    for event in reversed(pending.events):
        await bus.publish(event)
    await ctx.store.sent(pending)


async def _acked_first(self: Any, delivery: Any) -> None:
    with contextlib.suppress(Unavailable):
        await delivery.ack()
    await self._take(delivery)


_commit, _is_parked = Context.commit, consume.is_parked


async def _without_cause(self: Any, doc: Any, *facts: Any, cause: str | None = None) -> Any:
    return await _commit(self, doc, *facts)


async def _never_parked(ctx: Any, delivery: Any) -> bool:
    return False


async def _unheld(ctx: Any, workspace: str, id: str, kind: str, holder: str, cause: str | None = None) -> Any:
    return await ctx.store.get(holds.Model, id, workspace=workspace)


async def _any_token(self: Any, fn: Any, patient: bool = False) -> None:
    newest = await self.ctx.store.get(type(self.doc), self.key[1], workspace=self.key[0])
    doc, facts = fn(newest)
    await self.ctx.commit(doc, *facts)


MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "the relay marks events as sent before it publishes": lambda: mock.patch.object(relay, "_drain", _sent_first),
    "the relay publishes backwards": lambda: mock.patch.object(relay, "_drain", _backwards),
    "the consumer acknowledges before it handles":
        lambda: mock.patch.object(consume._Consumer, "take", _acked_first),
    "handlers commit without a cause": lambda: mock.patch.object(Context, "commit", _without_cause),
    "nothing waits behind a parked key": lambda: mock.patch.object(consume, "is_parked", _never_parked),
    "leases are not looked at":
        lambda: mock.patch.multiple(loop, lease_end=lambda doc: "", _Claim=_careless()),
    "holds of images are never given back": lambda: mock.patch.object(holds, "release", _unheld),
}


def _careless() -> Any:
    return type("Careless", (loop._Claim,), {"_commit": _any_token})
