"""Many calls over a few ModelStreamInfer streams: bounded, each answered once, in any order of connections' fates.

    submit → waiting ─┬─ Lane: one stream at a time on one connection, which takes what it has room for
                      └─ …     (so the quicker connection takes more)

A server answers a stream in order, so an answer belongs to the oldest item that its lane has sent. When a stream ends,
what it left unanswered is sent again if it was certainly not run (it was never written; the server said that it goes
away, which ours says after answering all that it read) or if the caller allows it; else it has failed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from ..core.errors import ModelyardError, Unavailable
from .channels import Metadata
from .inputs import failure_in
from .lane import Lane, back_off
from .oip import RETRY, error_from

AWAY = "this replica goes away"
"""What our servers end a stream with when they leave: everything that they read is answered, the rest was not read."""
BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)
"""Statuses that tell of the connection, not of a message."""
HIDDEN = "Internal error from Core"
"""What grpc.aio says instead of the stream's status, where the stream ended in the middle of a write."""
CLOSED = "this client was closed"
FLUSH_S = 0.001
"""Results are told of in bunches, at most so much later: waking whoever waits costs more than a result."""
ATTEMPTS = int(str(RETRY["maxAttempts"]))


@dataclass(frozen=True)
class Plan:
    """``repeat``: items that may have been run are run again. ``outage_s``: so long nobody may answer at all. Seconds
    above 0, at least one in flight: whoever makes it has looked."""

    in_flight: int
    timeout_s: float
    repeat: bool
    outage_s: float
    metadata: Metadata = ()


class Slot:
    """One item and what became of it. ``fatal``: its error ends the run, whatever happens to errors of items."""

    __slots__ = ("alone", "answer", "body", "deadline", "done", "error", "fatal", "index", "refused", "tries")

    def __init__(self, index: int, body: bytes, error: ModelyardError | None = None) -> None:
        self.index, self.body = index, body
        self.error = error
        self.done = error is not None
        self.answer = b""
        self.fatal = self.alone = False
        self.deadline = 0.0
        self.tries, self.refused = 0, 0.0


class Pipeline:
    """One run. All of it happens in one event loop, but for ``submit_from_thread``. ``told`` is called whenever a slot
    is done, or soon after."""

    def __init__(self, methods: Sequence[tuple[Any, Any, str]], plan: Plan, told: Callable[[], None]) -> None:
        self.plan = plan
        self.on_close: Callable[[Pipeline], None] = lambda _: None
        self._told = told
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Slot] = deque()
        self._order: deque[Slot] = deque()
        self._inbox: deque[Slot] = deque()
        self._called = False
        self._timer: asyncio.TimerHandle | None = None
        self._later: set[asyncio.TimerHandle] = set()
        self._open, self._untold = 0, 0
        self._flush: asyncio.TimerHandle | None = None
        self._lost: ModelyardError | None = None
        share = -(-plan.in_flight // len(methods))
        self._lanes = [Lane(self, channel, method, address, share) for channel, method, address in methods]
        self._tasks = [asyncio.create_task(self._guarded(lane)) for lane in self._lanes]

    # In and out ---------------------------------------------------------------------------------------------------

    def submit(self, slot: Slot) -> None:
        """Takes an item in. The caller keeps the bound: this never refuses."""
        if slot.done:
            return
        if self._lost is not None:
            self._open += 1
            self._settle(slot, error=self._lost, fatal=True)
            return
        slot.deadline = self._loop.time() + self.plan.timeout_s
        while self._order and self._order[0].done:
            self._order.popleft()
        self._order.append(slot)
        self._open += 1
        if self._timer is None:
            self._timer = self._loop.call_at(slot.deadline, self._expire)
        self._waiting.append(slot)
        self.wake()

    def submit_from_thread(self, slot: Slot) -> None:
        """The same, from outside the event loop; one wake-up takes all that came meanwhile. Raises Unavailable when the
        client was closed."""
        self._inbox.append(slot)
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._collect)
            except RuntimeError as exc:
                raise Unavailable(CLOSED) from exc

    def _collect(self) -> None:
        self._called = False  # before looking: what is appended from now on calls again
        while self._inbox:
            self.submit(self._inbox.popleft())

    async def close(self, drained: bool = False) -> None:
        """Ends the streams; ``drained``: nothing is under way, so they may end by themselves. Repeating is fine."""
        for lane in self._lanes:
            lane.finish()
        if drained and self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for handle in (*self._later, self._timer, self._flush):
            if handle is not None:
                handle.cancel()
        self._later.clear()
        self._timer = None
        self.on_close(self)

    def lose(self, error: ModelyardError) -> None:
        """Nobody answers: what was not sent fails, and so does all that comes."""
        self._lost = error
        while self._waiting:
            self._settle(self._waiting.popleft(), error=error, fatal=True)

    def abandon(self, error: ModelyardError) -> None:
        """The client is closed under the run: all of it fails."""
        self.lose(error)
        for slot in self._order:
            self._settle(slot, error=error, fatal=True)

    # For the lanes ------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing waits to be sent."""
        while self._waiting and self._waiting[0].done:
            self._waiting.popleft()
        return not self._waiting

    def next(self, under_way: bool) -> Slot | None:
        """The next item for a lane; one that must go alone only for a lane with nothing under way."""
        if self.idle or (under_way and self._waiting[0].alone):
            return None
        return self._waiting.popleft()

    def wake(self) -> None:
        """There is something to look at."""
        for lane in self._lanes:
            lane.wake()

    def answered(self, slot: Slot, answer: bytes, address: str) -> None:
        """What a stream said. Refused before it was run (queue full, models not loaded yet): sent again in a while."""
        error = failure_in(answer, address)
        if isinstance(error, Unavailable) and error.detail["status"] in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            now = self._loop.time()
            slot.refused = slot.refused or now
            if now - slot.refused < self.plan.outage_s and not slot.done and self._lost is None:
                self._send_later(slot)
                return
        self._settle(slot, answer, error)

    def ended(self, left: list[Slot], code: grpc.StatusCode, details: str, address: str) -> None:
        """A stream ended and left these unanswered, the oldest first."""
        if code is grpc.StatusCode.UNAVAILABLE and details.startswith(AWAY):
            self._send_again(left)
            return
        if code is grpc.StatusCode.INTERNAL and details == HIDDEN:
            code, details = grpc.StatusCode.UNAVAILABLE, "the stream was cut off"
        if code in BROKEN:
            error = error_from(grpc.StatusCode.UNAVAILABLE, details or "the stream ended early", address)
        else:
            error = error_from(code, details, address)
        again = []
        for slot in left:
            slot.tries += 1
            certain = code not in BROKEN and len(left) == 1
            if self.plan.repeat and slot.tries < ATTEMPTS and not certain:
                slot.alone = code not in BROKEN or slot.tries > 1  # whichever of them it is that ends streams
                again.append(slot)
            else:
                self._settle(slot, error=error)
        self._send_again(again)

    def nobody(self, address: str) -> None:
        """A lane could not connect for ``outage_s``."""
        if not any(lane.up for lane in self._lanes):
            self.lose(error_from(grpc.StatusCode.UNAVAILABLE, f"no connection within {self.plan.outage_s:g} s",
                                 address))

    # ------------------------------------------------------------------------------------------------------------

    async def _guarded(self, lane: Lane) -> None:
        try:
            await lane.run()
        except BaseException as exc:
            self.abandon(ModelyardError(f"the stream to {lane.address} failed: {exc!r}"))  # nobody may wait for ever
            raise

    def _send_again(self, slots: Iterable[Slot]) -> None:
        waiting = [slot for slot in slots if not slot.done]
        if self._lost is not None:
            for slot in waiting:
                self._settle(slot, error=self._lost, fatal=True)
            return
        self._waiting.extendleft(reversed(waiting))
        self.wake()

    def _send_later(self, slot: Slot) -> None:
        slot.tries += 1

        def send() -> None:
            self._later.discard(handle)
            self._send_again((slot,))

        handle = self._loop.call_later(back_off(slot.tries), send)
        self._later.add(handle)

    def _settle(self, slot: Slot, answer: bytes = b"", error: ModelyardError | None = None,
                fatal: bool = False) -> None:
        if slot.done:
            return
        slot.answer, slot.error, slot.fatal = answer, error, fatal
        slot.body = b""
        slot.done = True
        self._open -= 1
        self._untold += 1
        if self._untold * 4 >= self._open:
            self._tell()
        elif self._flush is None:
            self._flush = self._loop.call_later(FLUSH_S, self._tell)

    def _tell(self) -> None:
        self._untold = 0
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        self._told()

    def _expire(self) -> None:
        """Deadlines come in the order of the items, since all have the same time."""
        now = self._loop.time()
        while self._order and (self._order[0].done or self._order[0].deadline <= now):
            slot = self._order.popleft()
            self._settle(slot, error=Unavailable(
                f"there was no answer within {self.plan.timeout_s:g} s", code="deadline-exceeded",
                status="DEADLINE_EXCEEDED"))
        self._timer = self._loop.call_at(self._order[0].deadline, self._expire) if self._order else None
