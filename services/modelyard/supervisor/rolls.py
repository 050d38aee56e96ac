"""A roll: the replicas that were started from one template, under the newest generation that asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from .desired import Desired
from .replica import Replica

GIVE_UP_AFTER = 3
Start = Callable[[Desired, int, int], Replica]
"""(what is wanted, roll number, ordinal) → a replica on its way."""


class Roll:
    """``replicas`` are those that count; one that is scaled away drains by itself."""

    def __init__(self, want: Desired, number: int, start: Start) -> None:
        self.want = want
        self.number = number
        self.replicas: list[Replica] = []
        self.leaving: set[asyncio.Task[None]] = set()
        self.departing: list[Replica] = []
        self.since = asyncio.get_running_loop().time()
        self._start = start
        self.scale(want)

    @property
    def ready(self) -> bool:
        return all(r.ready for r in self.replicas)

    @property
    def hopeless(self) -> str:
        """Why this roll will never be ready, or nothing: a replica that failed at start again and again."""
        for r in self.replicas:
            if r.failed_starts >= GIVE_UP_AFTER:
                return f"replica {r.name} failed {r.failed_starts} times in a row: {r.reason}"
        return ""

    @property
    def late(self) -> str:
        """Why it is not ready after its deadline."""
        if asyncio.get_running_loop().time() - self.since < self.want.progress_deadline_s:
            return ""
        r = next((r for r in self.replicas if not r.ready), self.replicas[0])
        return f"not ready within {self.want.progress_deadline_s:g} s: replica {r.name} {r.reason}".rstrip()

    def scale(self, want: Desired) -> None:
        """As many replicas as wanted, under this generation; those that stay notice nothing."""
        if want.generation != self.want.generation:
            self.since = asyncio.get_running_loop().time()
        self.want = want
        while len(self.replicas) < want.replicas:
            self.replicas.append(self._start(want, self.number, self._free_ordinal()))
        for replica in self.replicas[want.replicas:]:
            self._leave(replica, replica.drain())
        del self.replicas[want.replicas:]

    def drain(self) -> None:
        for replica in self.replicas:
            self._leave(replica, replica.drain())
        self.replicas.clear()

    def abandon(self) -> None:
        """As drain, for one that was sent no calls."""
        for replica in self.replicas:
            self._leave(replica, replica.stop())
        self.replicas.clear()

    async def stop(self) -> None:
        """Ends all of it, those that drain included."""
        everyone = [*self.replicas, *self.departing]
        await asyncio.gather(*(r.stop() for r in everyone))
        await asyncio.gather(*self.leaving, return_exceptions=True)

    def report(self) -> list[dict[str, Any]]:
        return [r.report(self.want.generation) for r in [*self.replicas, *self.departing]]

    def _free_ordinal(self) -> int:
        taken = {r.ordinal for r in [*self.replicas, *self.departing]}
        return next(n for n in range(len(taken) + 1) if n not in taken)

    def _leave(self, replica: Replica, how: Any) -> None:
        self.departing.append(replica)
        task = asyncio.get_running_loop().create_task(how)
        self.leaving.add(task)

        def gone(task: asyncio.Task[None]) -> None:
            self.leaving.discard(task)
            self.departing.remove(replica)

        task.add_done_callback(gone)
