"""One container where a child process would be: started, its output read, its end noticed, and then removed.

An engine that is away is waited for: containers that it left running go on serving meanwhile, and those that ended with
it are started again when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ..adapters.targets_docker_engine import Engine, Plan, State
from ..core.errors import ModelyardError, Unavailable
from .logfile import LogFile

T = TypeVar("T")
AGAIN_S, TELL_S, LEAVING_S, GONE_S = 0.5, 1.5, 5.0, 5.0
CANNOT = 125
"""Docker's own exit code for a container that could not be started."""


class Container:
    """As ``Child``. ``tell`` is given what it waits for, when it waits."""

    def __init__(self, engine: Engine, plan: Plan, log: LogFile, tell: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine, self._plan, self._log, self._tell = engine, plan, log, tell
        self._id = ""
        self._ending = False
        self.pid: int | None = None
        self.taken_away = False
        self.how = ""
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._task = self._loop.create_task(self._live())
        self._signals: set[asyncio.Task[None]] = set()

    def kill(self) -> None:
        """At once; ``exited`` tells when it is done."""
        self._signal("SIGKILL")

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, and SIGKILL when it is still there after ``grace_s``. An engine that does not answer is not waited
        for much longer: what it leaves behind is ended when a deployer comes by."""
        self._ending = True
        until = self._loop.time() + grace_s
        while not self.exited.done() and self._loop.time() < until:
            self._signal("SIGTERM")  # again and again: the first program of a container hears none before it is set up
            await asyncio.wait([self.exited], timeout=TELL_S)
        for then in (self.kill, self._task.cancel):
            if not self.exited.done():
                then()
                await asyncio.wait([self.exited], timeout=grace_s)
        await asyncio.wait([self._task], timeout=GONE_S)
        self._task.cancel()
        return await asyncio.shield(self.exited)

    def _signal(self, name: str) -> None:
        if self._id and not self.exited.done():
            task = self._loop.create_task(self._send(name))
            self._signals.add(task)
            task.add_done_callback(self._signals.discard)

    async def _send(self, name: str) -> None:
        with contextlib.suppress(ModelyardError):
            await asyncio.to_thread(self._engine.signal, self._id, name)

    async def _live(self) -> None:
        code = CANNOT
        try:
            self._id = await self._asked(self._engine.start, self._plan) or ""
            code = await self._until_ended() if self._id else 0
        except ModelyardError as exc:
            self.how = "the container cannot be started"
            self._log.say(f"[modelyard] {_plain(exc.message)}")
        finally:
            self._log.flush()
            self.pid = None
            self.exited.set_result(code)
        with contextlib.suppress(ModelyardError):
            if self._id and not self.taken_away:
                await self._asked(self._engine.remove, self._id)

    async def _until_ended(self) -> int:
        """Reads its output and looks how it is, for as long as it runs."""
        since, leaving = 0, 0.0
        while True:
            state = await self._asked(self._engine.state, self._id)
            if state is None:
                self.taken_away, self.how = True, "the container was removed"
                return 0
            if state.leaving and leaving < LEAVING_S:
                leaving += AGAIN_S / 10
                await asyncio.sleep(AGAIN_S / 10)
                continue
            if not state.running:
                self._say_how(state)
                return state.code
            self.pid = state.pid
            ended, since = self._read(since), int(time.time())
            await ended

    def _say_how(self, state: State) -> None:
        self.how = f"was ended by signal {state.code - 128}" if state.code > 128 else f"exited with code {state.code}"
        if state.out_of_memory:
            self.how = f"killed: it used more than its limit of {(self._plan.memory or 0) >> 20} MiB"

    def _read(self, since: int) -> asyncio.Future[None]:
        """Done when there is no more output: a thread of its own, for this takes as long as the container lives."""
        ended: asyncio.Future[None] = self._loop.create_future()

        def done() -> None:
            if not ended.done():
                ended.set_result(None)

        def read() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                for data in self._engine.follow(self._id, since):
                    self._loop.call_soon_threadsafe(self._log.feed, data)
                self._loop.call_soon_threadsafe(done)

        threading.Thread(target=read, name=f"log of {self._plan.name}", daemon=True).start()
        return ended

    async def _asked(self, what: Callable[..., T], argument: object) -> T | None:
        """Asks until the engine answers; None when it need not any more, for nothing was started yet."""
        while True:
            try:
                answer = await asyncio.to_thread(what, argument)
                self._tell("")
                return answer
            except Unavailable as exc:
                if self._ending and not self._id:
                    return None
                self._tell(exc.message)
                await asyncio.sleep(AGAIN_S)


def _plain(why: str) -> str:
    if "executable file not found" in why or "no such file or directory" in why:
        return f"the image holds no Python: build it with a base (base: … in the image's file) [{why}]"
    return why
