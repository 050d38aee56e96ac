"""Time and chance for one seed: an event loop whose clock jumps to the next thing due, and every source of chance that
our code has, drawn from the seed. No threads: what goes to one runs at once, in place."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import selectors
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

from modelyard.core import documents, events
from modelyard.image_builder import sources
from modelyard.kernel import loop as loops

EPOCH = datetime(2026, 11, 23, 12, tzinfo=UTC)


class Stuck(Exception):
    """Nothing is ready and nothing is due: the simulation would wait for ever."""


class _Jump(selectors.SelectSelector):
    """Never waits: the clock goes forward by what would have been waited."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck
        self.now += max(0.0, timeout)
        return []


class _Task(asyncio.Task):  # type: ignore[type-arg]
    """Sets of tasks are walked in the order of creation, not of addresses in memory."""

    numbers = itertools.count()

    def __new__(cls, *args: Any, **kwargs: Any) -> _Task:
        task = super().__new__(cls)
        task.number = next(cls.numbers)
        return task

    def __hash__(self) -> int:
        return int(self.number)


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time`` is virtual; threads are not: ``run_in_executor`` has done the work when it returns."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)
        self.set_task_factory(lambda loop, coro, **how: _Task(coro, loop=loop, **how))

    def time(self) -> float:
        return self._jump.now

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self.time())

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:  # noqa: BLE001 - as a thread's would, it belongs to who awaits the future
            future.set_exception(exc)
        return future


@contextlib.contextmanager
def drawn_from(seed: int, loop: VirtualLoop) -> Iterator[None]:
    """Ids, tokens, jitter and the few clocks that are not ``Context.now``, from the seed and the virtual clock."""
    dice = random.Random(f"house {seed}")
    clock = SimpleNamespace(time_ns=lambda: int(loop.now().timestamp() * 1e6) * 1000)
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (events, "_random", dice), (events, "time", clock),
            (documents, "datetime", SimpleNamespace(now=lambda tz: loop.now())),
            (loops, "random", dice),
            (loops, "secrets", SimpleNamespace(token_hex=lambda n: f"{dice.getrandbits(8 * n):x}")),
            (sources, "_PLACED", {}),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def run(seed: int, main: Callable[[VirtualLoop], Coroutine[Any, Any, Any]]) -> Any:
    """Runs a coroutine on a virtual loop of its own."""
    _Task.numbers = itertools.count()
    loop = VirtualLoop()
    try:
        with drawn_from(seed, loop):
            asyncio.set_event_loop(loop)
            return loop.run_until_complete(main(loop))
    finally:
        asyncio.set_event_loop(None)
        loop.close()
