"""The control socket: one JSON line in, one JSON line out. It lies in the run folder, which is its owner's alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from .desired import Desired, read_json
from .supervise import Supervisor

LINE = 1 << 20


class Control:
    """``{"op": "observe"}`` · ``{"op": "apply", "environ": {…}}`` (read the desired file again; the values are of
    environment variables that secrets name, kept in memory only) · ``{"op": "stop"}`` (answered when all is ended).
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.ended = asyncio.Event()
        self._supervisor = supervisor
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop: asyncio.Task[None] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one connection until its caller leaves."""
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(json.loads(line))).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # the caller left, or it is not one of ours
        finally:
            writer.close()

    async def _answer(self, ask: dict[str, Any]) -> dict[str, Any]:
        op = ask.get("op")
        if op == "apply" and not self._supervisor.stopping:
            body = read_json("desired.json")
            if body is None:
                return {"error": "there is no desired state to read"}
            self._supervisor.environ.update(ask.get("environ", {}))
            self._supervisor.apply(Desired.of(body))
        elif op == "stop":
            await asyncio.shield(self.stop())
        elif op != "observe":
            return {"error": f"cannot {op} now"}
        return self._supervisor.report()

    def stop(self) -> asyncio.Task[None]:
        """Begins the end, once; the task is done when everything has ended."""
        if self._stop is None:
            self._stop = asyncio.get_running_loop().create_task(self._end())
        return self._stop

    async def _end(self) -> None:
        await self._supervisor.stop()
        asyncio.get_running_loop().call_later(0.2, self.ended.set)  # so that who asked gets the answer
