"""Loops: find what is due, claim it by a lease, act through ports, settle the outcome.

A lease is text, ``<token> <end>``, so that it holds until its end even when a caller moves ``due`` to ask for a
look while a step runs. The holder notices that wish and looks again after it has settled: no wish is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from ..core.documents import Document, Range, rfc3339
from ..core.errors import Conflict, ModelyardError, Unavailable
from ..core.events import Fact
from .observe import LOOP_LOST, LOOP_RUNNING, LOOP_SECONDS, Once, fields, in_service, trace_from
from .service import Change, Context, Loop
from .wakes import Wakes

log = logging.getLogger(__name__)
FIRST_BACKOFF_S = 0.5
RELEASE_S = 2.0
PAGE = 100


async def run_loop(ctx: Context, loop: Loop, wakes: Wakes) -> None:
    """Runs until cancelled; then its steps are cancelled and their leases given back. Outages are waited out."""
    in_service(ctx.service)
    runner = _Runner(ctx, loop, wakes)
    try:
        while True:
            await runner.look()
            await wakes.wait(loop.name, loop.every_s)
    finally:
        await runner.stop()


class _Runner:
    """One loop of one process: what it runs now, and what it has complained about."""

    def __init__(self, ctx: Context, loop: Loop, wakes: Wakes) -> None:
        self.ctx, self.loop, self.wakes = ctx, loop, wakes
        self.running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.said = Once()
        self.stopping = False

    async def look(self) -> None:
        """Starts a step for each document that is due, up to the limit; the end of a step wakes the loop again."""
        free = self.loop.parallel - len(self.running)
        try:
            for doc in await self._due() if free > 0 else ():
                if free and (claim := await _Claim.make(self.ctx, self.loop, doc)):
                    self._start(claim)
                    free -= 1
        except Unavailable as exc:
            if self.said.new("look", exc):
                log.warning("loop %s cannot look for work: %s", self.loop.name, exc)
            return
        self.said.clear("look")

    async def stop(self) -> None:
        """Cancels what runs and waits until it is over."""
        self.stopping = True
        await _end(*self.running.values())

    async def _due(self) -> list[Any]:
        """What is due and not leased, the longest waiting first."""
        now = self.ctx.now()
        where = {**self.loop.where, "due": Range(lt=now + timedelta(microseconds=1))}
        found: list[Any] = []
        after: tuple[str, str] | None = None
        while len(found) < self.loop.parallel:
            page = await self.ctx.store.find(self.loop.of, where, workspace=None, order="due", after=after, limit=PAGE)
            found += [d for d in page if (d.workspace, d.id) not in self.running and lease_end(d) <= rfc3339(now)
                      and self.loop.mine(self.ctx, d)]
            if len(page) < PAGE:
                break
            after = (rfc3339(page[-1].due or now), page[-1].id)
        return found

    def _start(self, claim: _Claim) -> None:
        task = asyncio.create_task(self._run(claim), name=f"{self.loop.name} {claim.key[1]}")
        self.running[claim.key] = task
        LOOP_RUNNING.labels(self.ctx.service, self.loop.name).set(len(self.running))

        def ended(done: asyncio.Task[None]) -> None:
            self.running.pop(claim.key, None)
            LOOP_RUNNING.labels(self.ctx.service, self.loop.name).set(len(self.running))
            self.wakes.wake(self.loop.name)
            if not done.cancelled() and (exc := done.exception()) is not None:
                log.error("loop %s: %s", self.loop.name, exc, exc_info=exc, extra=fields(id=claim.key[1]))

        task.add_done_callback(ended)

    async def _run(self, claim: _Claim) -> None:
        """One step under its lease: acts, settles; whatever goes wrong is a later attempt."""
        began, outcome = time.monotonic(), "ok"
        with trace_from(None):
            step = asyncio.ensure_future(self.loop.step(self.ctx, claim.doc))
            keeper = asyncio.create_task(claim.keep(step))
            try:
                await claim.settle(await step)
                self.said.clear(claim.key)
            except asyncio.CancelledError as exc:
                outcome = "lost" if claim.lost else "cancelled"
                if self.stopping:
                    await claim.release()
                    raise
                if not claim.lost:
                    await self._failed(claim, RuntimeError(f"the step cancelled itself: {exc!r}"))
            except _LeaseLost:
                outcome = "lost"
            except Exception as exc:  # noqa: BLE001 - a step's failure of any kind is tried again, never lost
                outcome = "error"
                await self._failed(claim, exc)
            finally:
                await _end(keeper, step)
                LOOP_SECONDS.labels(self.ctx.service, self.loop.name, outcome).observe(time.monotonic() - began)
                if outcome == "lost":
                    LOOP_LOST.labels(self.ctx.service, self.loop.name).inc()

    async def _failed(self, claim: _Claim, exc: Exception) -> None:
        if self.said.new(claim.key, f"{type(exc).__name__}: {exc}"):
            ours = isinstance(exc, ModelyardError)
            log.warning("loop %s will try '%s' again: %s", self.loop.name, claim.key[1], exc,
                        extra=fields(id=claim.key[1], attempt=claim.doc.attempts + 1), exc_info=None if ours else exc)
        with contextlib.suppress(_LeaseLost, Unavailable):  # not stored: the lease lapses by itself
            await claim.back_off()


class _LeaseLost(Exception):
    """Somebody else's token is on the document, or it is gone."""


class _Claim:
    """A lease on one document, from claim to settlement."""

    def __init__(self, ctx: Context, loop: Loop, doc: Document, token: str) -> None:
        self.ctx, self.loop, self.doc, self.token = ctx, loop, doc, token
        self.key = (doc.workspace, doc.id)
        self.asked: datetime | None = None
        self.lost = False

    @classmethod
    async def make(cls, ctx: Context, loop: Loop, doc: Document) -> _Claim | None:
        """None when somebody else was faster."""
        token = secrets.token_hex(8)
        end = ctx.now() + timedelta(seconds=loop.lease_s)
        try:
            held = await ctx.store.commit(doc.evolve(lease=f"{token} {rfc3339(end)}", due=end))
        except Conflict:
            return None
        return cls(ctx, loop, held, token)

    async def keep(self, step: asyncio.Task[Any]) -> None:
        """Renews the lease while the step runs; cancels the step when the lease is somebody else's."""
        said = False
        while True:
            await asyncio.sleep(self.loop.lease_s / 3)
            try:
                await self._commit(self._renewed)
            except _LeaseLost:
                self.lost = True
                log.warning("loop %s lost its lease on '%s'", self.loop.name, self.key[1])
                step.cancel()
                return
            except Unavailable as exc:  # nobody else can take the lease over while the store is away: hold on
                if not said:
                    log.warning("loop %s cannot renew its lease on '%s': %s", self.loop.name, self.key[1], exc)
                said = True

    def _renewed(self, newest: Document) -> tuple[Document, Sequence[Fact]]:
        end = self.ctx.now() + timedelta(seconds=self.loop.lease_s)
        return newest.evolve(lease=f"{self.token} {rfc3339(end)}", due=end), ()

    async def settle(self, change: Change[Any]) -> None:
        """Applies the step's Change to the newest document, with its facts; frees the lease."""

        def settled(newest: Document) -> tuple[Document, Sequence[Fact]]:
            doc, facts = change(newest) or (newest, ())
            wishes = [w for w in (doc.due if doc.due != newest.due else None, self.asked) if w is not None]
            return doc.evolve(lease=None, attempts=0, due=min(wishes, default=None)), facts

        await self._commit(settled, patient=True)

    async def back_off(self) -> None:
        """Frees the lease for a later attempt: the wait doubles with each failure in a row."""

        def later(newest: Document) -> tuple[Document, Sequence[Fact]]:
            wait = min(FIRST_BACKOFF_S * 2 ** min(newest.attempts, 30), self.loop.max_backoff_s)
            due = self.ctx.now() + timedelta(seconds=wait * random.uniform(0.8, 1.2))
            return newest.evolve(lease=None, attempts=newest.attempts + 1, due=self.asked or due), ()

        await self._commit(later)

    async def release(self) -> None:
        """Gives the lease back at a clean stop, so that whoever comes next need not wait for its end."""
        with contextlib.suppress(TimeoutError, ModelyardError, _LeaseLost):
            async with asyncio.timeout(RELEASE_S):
                await self._commit(lambda newest: (newest.evolve(lease=None, due=self.ctx.now()), ()))

    async def _commit(self, fn: Callable[[Document], tuple[Document, Sequence[Fact]]], patient: bool = False) -> None:
        """Commits ``fn(newest)`` while the lease is ours, reading again on Conflict; ``patient`` waits out outages.

        A ``due`` that is not the lease's end is somebody's wish for another look: remembered in ``asked``.
        """
        wait = 0.1
        while True:
            try:
                newest = await self.ctx.store.get(type(self.doc), self.key[1], workspace=self.key[0])
                if newest is None or (newest.lease or "").partition(" ")[0] != self.token:
                    raise _LeaseLost
                if newest.due is not None and rfc3339(newest.due) != lease_end(newest):
                    self.asked = newest.due
                doc, facts = fn(newest)
                await self.ctx.commit(doc, *facts)
                return
            except Conflict:
                await asyncio.sleep(random.uniform(0, 0.005))
            except Unavailable:
                if not patient:
                    raise
                await asyncio.sleep(wait)
                wait = min(wait * 2, 5.0)


def lease_end(doc: Document) -> str:
    """When the lease on this document ends, as RFC 3339 text; empty without one."""
    return (doc.lease or "").partition(" ")[2]


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels and awaits, so that nothing is left behind."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
