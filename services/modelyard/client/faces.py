"""The blocking side of async objects: one event loop on one thread, and no method written twice."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")
P = ParamSpec("P")
F = TypeVar("F", bound="Face[Any]")
M = TypeVar("M", bound=Callable[..., Any])


INTERRUPTED = threading.Event()
"""Set by a program's handler of Ctrl-C that also raises KeyboardInterrupt: Python swallows that where it falls into a
weak reference's callback or a ``__del__``, and whoever waits here would wait for ever."""
LOOK_S = 0.5


class Portal:
    """A thread with an event loop that others hand coroutines to. The thread is a daemon: it ends with the
    program; ``close`` ends it sooner."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="modelyard-client", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        """Whether ``close`` was not called yet."""
        return not self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Runs ``work`` over there and waits for it here. An interrupt here cancels it there."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this client was closed")
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("the blocking client cannot be called from its own callbacks; use AsyncClient")
        future: Future[R] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not wait((future,), LOOK_S).done:
                if INTERRUPTED.is_set():
                    raise KeyboardInterrupt
            return future.result()
        except BaseException as exc:
            if isinstance(exc, KeyboardInterrupt):
                INTERRUPTED.clear()
            future.cancel()
            raise

    def iterate(self, source: AsyncIterator[R]) -> Iterator[R]:
        """The items of an async iterator, one at a time; leaving early closes it."""
        end = object()

        over = asyncio.Event()
        running: asyncio.Task[Any] | None = None

        async def step() -> Any:
            nonlocal running
            running = asyncio.current_task()
            over.clear()
            try:
                return await anext(source, end)
            finally:
                running = None
                over.set()

        async def close() -> None:
            if running is not None and not running.cancelling():
                running.cancel()  # an interrupt came before anybody here could cancel it
            await over.wait()  # an interrupted step is being cancelled over there: it ends first
            if (aclose := getattr(source, "aclose", None)) is not None:
                await aclose()

        over.set()

        try:
            while (item := self.run(step())) is not end:
                yield item
        finally:
            if not self._loop.is_closed():
                self.run(close())

    def close(self) -> None:
        """Stops the loop and joins the thread. Closing twice is fine."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Face(Generic[A]):
    """Something blocking in front of the async object ``inner``."""

    def __init__(self, inner: A, portal: Portal) -> None:
        self._inner = inner
        self._portal = portal


def blocks(method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Face[A], P], R]:
    """The method, waited for."""

    @functools.wraps(method)
    def call(self: Face[A], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._portal.run(method(self._inner, *args, **kwargs))

    return call


def gives(face: type[F], method: Callable[Concatenate[A, P], Coroutine[Any, Any, Any]]) -> Callable[
        Concatenate[Face[A], P], F]:
    """The method, waited for; what it gives back shown by its blocking side ``face``."""

    @functools.wraps(method)
    def call(self: Face[A], /, *args: P.args, **kwargs: P.kwargs) -> F:
        return face(self._portal.run(method(self._inner, *args, **kwargs)), self._portal)

    return call


def again(method: Callable[Concatenate[A, P], Coroutine[Any, Any, A]]) -> Callable[Concatenate[F, P], F]:
    """The method, waited for, of an object that shows its new state itself: gives back the same face."""

    @functools.wraps(method)
    def call(self: F, /, *args: P.args, **kwargs: P.kwargs) -> F:
        self._portal.run(method(self._inner, *args, **kwargs))
        return self

    return call


def lists(face: type[F], method: Callable[Concatenate[A, P], Coroutine[Any, Any, list[Any]]]) -> Callable[
        Concatenate[Face[A], P], list[F]]:
    """The method, waited for; each item shown by its blocking side ``face``."""

    @functools.wraps(method)
    def call(self: Face[A], /, *args: P.args, **kwargs: P.kwargs) -> list[F]:
        return [face(item, self._portal) for item in self._portal.run(method(self._inner, *args, **kwargs))]

    return call


def yields(method: Callable[Concatenate[A, P], AsyncIterator[R]]) -> Callable[Concatenate[Face[A], P], Iterator[R]]:
    """The async iterator, as a plain one."""

    @functools.wraps(method)
    def call(self: Face[A], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        return self._portal.iterate(method(self._inner, *args, **kwargs))

    return call


def told_as(method: Callable[..., Any]) -> Callable[[M], M]:
    """For a blocking side that is written by hand: the documentation of its async one."""

    def tell(own: M) -> M:
        own.__doc__ = method.__doc__
        return own

    return tell
