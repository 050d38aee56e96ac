"""Waiting for a document to settle: long polls, patient through a short outage, bounded by a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ..core.errors import Unavailable
from .http import Http

POLL_S = 20.0
OUTAGE_S = 30.0


async def settle(
    http: Http, where: str, done: Callable[[dict[str, Any]], bool], timeout_s: float, what: str,
    seen: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The document once ``done`` says so; ``seen`` is shown every state on the way.

    Raises Unavailable with ``code="timeout"`` after ``timeout_s``, and what GET raises; a server that is away
    for less than 30 s is waited for.
    """
    deadline = time.monotonic() + timeout_s
    lost: float | None = None
    first = True
    while True:
        left = deadline - time.monotonic()
        try:
            wait = 0 if first else max(0.0, min(POLL_S, left))
            document: dict[str, Any] = await http.json("GET", where, params={"wait": f"{wait:.3f}"} if wait else None)
        except Unavailable:
            lost = lost or time.monotonic()
            if first or time.monotonic() - lost > OUTAGE_S or left <= 0:
                raise
            await asyncio.sleep(0.5)
            continue
        lost = None
        if seen:
            seen(document)
        if done(document):
            return document
        if left <= 0:
            raise Unavailable(
                f"{what} is still '{document.get('phase')}' after {timeout_s:g} s; it goes on, ask again",
                code="timeout", document=document)
        if not first and time.monotonic() - (deadline - left) < 0.05:
            await asyncio.sleep(0.1)  # a phase that is over answers at once: no busy loop while another term settles
        first = False


def reason_of(document: dict[str, Any]) -> str:
    """Why it is as it is: its own reason, else the message of the newest condition that says no."""
    if document.get("reason"):
        return str(document["reason"])
    bad = [c for c in document.get("conditions") or [] if c.get("status") == "False" and c.get("message")]
    newest = max(bad, key=lambda c: str(c.get("time")), default=None)
    return str(newest["message"]) if newest else "no reason was given"
