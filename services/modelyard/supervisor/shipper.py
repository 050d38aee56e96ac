"""The child that takes closed capture segments to the blob store."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .child import Child
from .logfile import LogFile
from .plan import PASSED_ON, program

GRANT = Path("spool/grant")
"""The shipper reads it itself, so what may be written with it is on no command line."""
MAX_DELAY_S = 30.0
GRACE_S = 5.0


class Shipper:
    """Runs whenever there is a grant, from the image that was named last; started again when it dies.

    ``root`` is what the running child was started from: that folder is in use.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.root = ""
        self._environ = {k: environ[k] for k in PASSED_ON if k in environ}
        self._log = LogFile(Path("logs/shipper.log"))
        self._template: Mapping[str, Any] | None = None
        self._changed = asyncio.Event()
        self._child: Child | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._child is None or self._child.exited.done() else self._child.pid

    def use(self, template: Mapping[str, Any]) -> None:
        """Ships with this image's program from now on."""
        if self._template is None or self._template["root"] != template["root"]:
            self._template = template
            self._changed.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._end_child()
        self._log.close()

    async def _run(self) -> None:
        delay = 1.0
        while True:
            self._changed.clear()
            began = asyncio.get_running_loop().time()
            if self._start():
                await self._until_ended_or_changed()
                lasted = asyncio.get_running_loop().time() - began
                delay = 1.0 if lasted > MAX_DELAY_S else min(MAX_DELAY_S, delay * 2)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._changed.wait()

    def _start(self) -> bool:
        """False when there is no grant yet, or the program cannot be started."""
        template = self._template
        if template is None or not GRANT.exists():
            return False
        argv = [*program(template), "ship", "--spool", os.path.abspath("spool")]
        try:
            self._child = Child(argv, self._environ, template["root"], self._log)
        except OSError as exc:
            self._log.say(f"[modelyard] the shipper cannot be started: {exc}")
            return False
        self.root = template["root"]
        return True

    async def _until_ended_or_changed(self) -> None:
        assert self._child is not None
        changed = asyncio.ensure_future(self._changed.wait())
        either: list[asyncio.Future[Any]] = [self._child.exited, changed]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        if self._child.exited.done():
            self._log.say(f"[modelyard] the shipper ended with {self._child.exited.result()}")
        await self._end_child()

    async def _end_child(self) -> None:
        if self._child is not None:
            await self._child.stop(GRACE_S)
            self._child, self.root = None, ""
