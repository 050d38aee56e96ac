"""The shipper: takes closed segments from the spool to the blob store. A process of its own, standard library only.

    launch.py ship --spool DIR --grant URL [--once]

It tries for ever, deletes a segment only after the store has it, and closes the segments of writers that died. A
name that is taken means that an earlier life stored it and died before the deletion: the content is the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ..core.errors import ModelyardError
from .pace import NICENESS, Pace
from .spool import GRANT, adopt_dead, closed_segments, read_segment

log = logging.getLogger("modelyard.shipper")
LOOK_S = 0.2
ADOPT_S = 1.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 30.0
LEFTOVER_S = 60.0


class Grant(Protocol):
    """A lent URL, opened."""

    async def put(self, name: str, data: bytes) -> bool: ...


class Shipper:
    """Ships one spool. ``open_grant`` turns a URL into a Grant; the URL in the spool's ``grant`` file, where there
    is one, is newer than the one given. ``waiting`` hears how many closed segments there are, at each look and each
    time one was shipped."""

    def __init__(self, spool: Path, url: str, open_grant: Callable[[str], Grant],
                 waiting: Callable[[int], None] = lambda segments: None) -> None:
        self.spool, self.given, self.open_grant = spool, url, open_grant
        self._waiting = waiting
        self.stopping = asyncio.Event()
        self._opened: tuple[str, Grant] | None = None
        self._wait = FIRST_WAIT_S
        self._said = ""

    async def run(self) -> None:
        """Until ``stopping`` is set; then ships what is closed, once, and returns."""
        adopted = 0.0
        while not self.stopping.is_set():
            if time.monotonic() - adopted >= ADOPT_S:
                adopted = time.monotonic()
                await self._adopt()
            await self._pause(LOOK_S if await self.drain() else self._longer())
        await self._adopt()
        await self.drain()

    async def once(self) -> bool:
        """Drains the spool, dead writers' tails included; False when something is left that could not be shipped."""
        await self._adopt()
        return await self.drain()

    async def drain(self) -> bool:
        """One pass over what is closed, in order; False at the first thing that the store did not take."""
        unread = 0
        closed = await asyncio.to_thread(closed_segments, self.spool)
        self._waiting(len(closed))
        for shipped, path in enumerate(closed, 1):
            try:
                data = await asyncio.to_thread(read_segment, path)
            except OSError as exc:  # this one file: the others go on
                unread += 1
                self._say(f"cannot read {path.name}: {exc}")
                continue
            try:
                await (await self._grant()).put(path.name, data)
            except (ModelyardError, OSError, ValueError) as exc:
                self._say(f"cannot ship: {exc}")
                return False
            await asyncio.to_thread(path.unlink, missing_ok=True)
            self._waiting(len(closed) - shipped)
            self._wait, self._said = FIRST_WAIT_S, ""
        return not unread

    async def _adopt(self) -> None:
        await asyncio.to_thread(adopt_dead, self.spool, time.time() - LEFTOVER_S)

    async def _grant(self) -> Grant:
        """Opened anew when the URL changed."""
        url = await asyncio.to_thread(self._url)
        if self._opened is None or self._opened[0] != url:
            self._opened = (url, self.open_grant(url))
        return self._opened[1]

    def _url(self) -> str:
        with contextlib.suppress(OSError):
            return (self.spool / GRANT).read_text().strip() or self.given
        return self.given

    def _longer(self) -> float:
        wait, self._wait = self._wait, min(self._wait * 2, LONGEST_WAIT_S)
        return wait

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    def _say(self, what: str) -> None:
        """Says a trouble once, not every time it is met again."""
        if what != self._said:
            self._said = what
            log.warning("%s", what)


async def _serve(spool: Path, url: str, once: bool) -> int:
    from ..adapters.grants_lent import open_grant

    if once:  # somebody waits for it
        return 0 if await Shipper(spool, url, open_grant).once() else 1
    pace = Pace()
    shipper = Shipper(spool, url, open_grant, pace.waiting)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shipper.stopping.set)
    try:
        await shipper.run()
    finally:
        pace.close()
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the shipper; 0, or with ``--once`` 1 when something could not be shipped."""
    parser = argparse.ArgumentParser(prog="ship", description="Takes closed capture segments to the blob store.")
    parser.add_argument("--spool", required=True, type=Path, help="the folder that the scoring server writes to")
    parser.add_argument("--grant", default="", help="the URL lent for writing; a file 'grant' in the spool renews it")
    parser.add_argument("--once", action="store_true", help="ship everything that is there and end")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    return asyncio.run(_serve(args.spool, args.grant, args.once))
