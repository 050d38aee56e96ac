"""Questions that gather: what is asked while an answer is on its way goes out with the next question, all in one.

A store that has time answers each at once; a busy one is asked less often, and for more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Generic, TypeVar

from ..core.errors import Unavailable

A = TypeVar("A")
R = TypeVar("R")
MOST = 200
SLOW_S = 0.25
"""So long is waited for an answer; then the next question goes out beside it."""


class Gather(Generic[A, R]):
    """``ask`` gets some and gives as many answers, in their order. A question goes out after it was asked, never
    before: nobody gets an answer that is older than his question."""

    def __init__(self, ask: Callable[[Sequence[A]], Awaitable[Sequence[R]]]) -> None:
        self._ask = ask
        self._waiting: list[tuple[A, asyncio.Future[R]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy = self._closed = False

    async def __call__(self, what: A) -> R:
        if self._closed:
            raise Unavailable("the store is closed")
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((what, answer))
        if not self._busy:
            self._busy = True
            self._start(self._run(), ())
        return await answer

    async def close(self) -> None:
        """Leaves no task; whoever still waits is told."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        _refuse(self._waiting)

    def _start(self, work: Coroutine[None, None, None],
               some: Sequence[tuple[A, asyncio.Future[R]]]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="questions to MongoDB")
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            _refuse(some)

        task.add_done_callback(ended)
        return task

    async def _run(self) -> None:
        try:
            while self._waiting:
                some, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                await asyncio.wait({self._start(self._answer(some), some)}, timeout=SLOW_S)
        finally:
            self._busy = False

    async def _answer(self, some: Sequence[tuple[A, asyncio.Future[R]]]) -> None:
        some = [(what, answer) for what, answer in some if not answer.done()]  # who was cancelled asks no more
        if not some:
            return
        try:
            answers = await self._ask([what for what, _ in some])
        except Exception as exc:  # noqa: BLE001 - told to whoever asked
            if len(some) > 1 and not isinstance(exc, Unavailable):  # one of them is bad: the others need not suffer
                for one in some:
                    await self._answer([one])
            else:
                _refuse(some, exc)
            return
        for (_, answer), found in zip(some, answers, strict=True):
            if not answer.done():
                answer.set_result(found)


def _refuse(some: Sequence[tuple[A, asyncio.Future[R]]], exc: Exception | None = None) -> None:
    for _, answer in some:
        if not answer.done():
            answer.set_exception(exc or Unavailable("the store is closed"))
