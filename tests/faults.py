"""Faults on order: any port, failing at the n-th call of a method, before or after it has done its work.

    faults = Faults()
    store = faults.around(store)
    faults.plan("commit", at=2, error=Unavailable("the power went"), after=True)    # done, but nobody is told
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

P = TypeVar("P")


@dataclass
class Fault:
    """Fails calls ``at`` … ``at + times - 1`` of ``method``, counted from when it was planned."""

    method: str
    at: int
    error: BaseException
    times: int
    after: bool
    calls: int = 0

    def due(self) -> bool:
        self.calls += 1
        return self.at <= self.calls < self.at + self.times


@dataclass
class Faults:
    """The plan, and how often each method was called."""

    planned: list[Fault] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)

    def plan(self, method: str, error: BaseException, *, at: int = 1, times: int = 1, after: bool = False) -> Fault:
        """``times`` large: an outage, until ``clear``. ``after``: the call does its work and then fails."""
        fault = Fault(method, at, error, times, after)
        self.planned.append(fault)
        return fault

    def clear(self) -> None:
        self.planned.clear()

    def around(self, port: P) -> P:
        """The port with this plan in front of it."""
        return cast(P, _Faulty(port, self))

    def strike(self, method: str) -> tuple[BaseException | None, BaseException | None]:
        """(error before, error after) of this call."""
        self.calls[method] = self.calls.get(method, 0) + 1
        due = [fault for fault in self.planned if fault.method == method and fault.due()]
        return (next((f.error for f in due if not f.after), None), next((f.error for f in due if f.after), None))


class _Faulty:
    def __init__(self, port: Any, faults: Faults) -> None:
        self._port, self._faults = port, faults

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        if not callable(method):
            return method
        if not inspect.iscoroutinefunction(method):
            return self._plain(name, method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            before, after = self._faults.strike(name)
            if before is not None:
                raise before
            result = await method(*args, **kwargs)
            if after is not None:
                raise after
            return result

        return call

    def _plain(self, name: str, method: Any) -> Any:
        """``subscribe``, ``get`` of blobs: what gives back a context or an iterator fails when it is called."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, _ = self._faults.strike(name)
            if before is not None:
                raise before
            return method(*args, **kwargs)

        return call
