"""What loading left behind is put aside, and taken away once nobody calls."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from modelyard.scoring import garbage


class Circle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


async def test_what_loading_left_goes_when_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "QUIET_S", 0.01)
    asked = []

    def quiet() -> bool:
        asked.append(left() is not None)
        return len(asked) > 2

    garbage.loading()
    assert gc.get_threshold()[0] == garbage.LOADING
    left = weakref.ref(Circle())
    garbage.loaded(quiet)
    assert gc.get_threshold()[0] == garbage.SERVING
    kept = gc.get_freeze_count()
    gc.collect()
    assert left() is not None and kept > 1_000, "what there was is not looked through while somebody may call"
    async with asyncio.timeout(20):
        while left() is not None:
            await asyncio.sleep(0.005)
    assert asked == [True] * 3 and gc.get_freeze_count() > 1_000
