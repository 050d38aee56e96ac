"""How far a member is in one partition: what may be committed is everything below the lowest unfinished record."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass
class Lane:
    """Offsets of one partition while this member holds it. ``open`` is what was taken and is not finished, or lies
    behind such; offsets may have gaps."""

    topic: str
    partition: int
    next: int | None = None
    stored: int | None = None
    open: deque[int] = field(default_factory=deque)
    finished: set[int] = field(default_factory=set)
    handed: set[int] = field(default_factory=set)
    closing: bool = False
    """Nothing more is taken or handed out; what is in hand may still be finished."""
    gone: bool = False

    def take(self, offset: int) -> bool:
        """A record was fetched; False for one that was taken before."""
        if self.next is None:
            self.stored = offset
        elif offset < self.next:
            return False
        self.next = offset + 1
        self.open.append(offset)
        return True

    def hand(self, offset: int) -> None:
        self.handed.add(offset)

    def finish(self, offset: int) -> bool:
        """A record is done with. False when it is not this lane's to finish (any more)."""
        if self.gone or offset not in self.handed:
            return False
        self.handed.discard(offset)
        self.finished.add(offset)
        while self.open and self.open[0] in self.finished:
            self.finished.discard(self.open.popleft())
        return True

    def due(self) -> int | None:
        """What to commit (the offset to go on from), None when that is stored already."""
        if self.next is None:
            return None
        done = self.open[0] if self.open else self.next
        return done if done != self.stored else None

    def waiting(self) -> int:
        """Records that were taken and are not finished."""
        return len(self.open) - len(self.finished)

    def drop(self) -> None:
        """No longer this member's: what is finished from now on counts no more."""
        self.gone = True
        self.handed.clear()
