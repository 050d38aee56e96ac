"""Servers that die, and servers that go away in order, while a stream of items is scored."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard import ScoringClient
from modelyard.core.errors import ModelyardError, Unavailable
from tests.unit.client.servers import ran, serving
from tests.unit.scoring.roots import free_ports

TRANSPORTS = pytest.mark.parametrize("transport", ["h2", "grpc"])


class Restarts:
    """A source of items in whose middle the server is replaced by another one at the same address."""

    def __init__(self, folder: Path, transport: str, at: int, count: int, kill: bool, pause_s: float = 0.005) -> None:
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self._folder, self._transport, self._at, self._count, self._kill = folder, transport, at, count, kill
        self._pause = np.array([pause_s])
        self._stack = contextlib.ExitStack()

    def start(self, wait: bool = True) -> Any:
        return self._stack.enter_context(serving(self._folder, self._transport, address=self.address, wait=wait))

    def client(self) -> ScoringClient:
        return ScoringClient(self.address, model="echo")

    def items(self) -> Iterator[dict[str, Any]]:
        for n in range(self._count):
            if n == self._at:
                if self._kill:
                    self.server.process.kill()
                    self.server.process.wait()
                else:
                    assert self.server.stop()[0] == 0
                self.start(wait=False)
            yield {"n": np.array([n]), "sleep": self._pause}

    def __enter__(self) -> Restarts:
        self.server = self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def split(results: list[Any]) -> tuple[list[int], list[int]]:
    """(places of results, places of errors). Every result is of the item in whose place it is."""
    good, bad = [], []
    for place, result in enumerate(results):
        if isinstance(result, ModelyardError):
            assert isinstance(result, Unavailable) and result.detail["item"] == place
            bad.append(place)
        else:
            assert int(result["n"][0]) == place
            good.append(place)
    return good, bad


@TRANSPORTS
@pytest.mark.slow
def test_killed_and_allowed_to_repeat(tmp_path: Path, transport: str) -> None:
    with Restarts(tmp_path, transport, 60, 150, kill=True) as server, server.client() as client:
        good, bad = split(list(client.infer_many(server.items(), repeat=True, in_flight=32, outage_s=60)))
    assert (good, bad) == (list(range(150)), [])
    assert set(ran(tmp_path)) == set(range(150))


@TRANSPORTS
@pytest.mark.slow
def test_killed_and_not_allowed_to_repeat(tmp_path: Path, transport: str) -> None:
    """Nothing runs twice: what was under way has failed, and what was sent before the loss was known; the new server
    scores the rest."""
    with Restarts(tmp_path, transport, 60, 150, kill=True) as server, server.client() as client:
        results = list(client.infer_many(server.items(), on_error="return", in_flight=32, outage_s=60))
    good, bad = split(results)
    assert len(results) == 150 and bad and all(60 - 32 <= n < 60 + 32 for n in bad)
    counts = Counter(ran(tmp_path))
    assert max(counts.values()) == 1 and set(good) <= set(counts)


@TRANSPORTS
@pytest.mark.slow
def test_a_server_that_goes_away_in_order_loses_nothing(tmp_path: Path, transport: str) -> None:
    with Restarts(tmp_path, transport, 60, 150, kill=False) as server, server.client() as client:
        good, bad = split(list(client.infer_many(server.items(), on_error="return", in_flight=32, outage_s=60)))
    assert (good, bad) == (list(range(150)), [])
    assert sorted(ran(tmp_path)) == list(range(150))


@TRANSPORTS
@pytest.mark.slow
@pytest.mark.parametrize("repeat", [True, False])
def test_an_upgrade_under_load(tmp_path: Path, transport: str, repeat: bool) -> None:
    """Two servers; one drains and goes while items flow, the other takes over. Without leave to repeat, items may fail
    that were written at the moment when the stream was cut; none is lost, and none is run twice."""
    last = 0
    with serving(tmp_path / "a", transport) as one, serving(tmp_path / "b", transport) as two:
        def items() -> Iterator[dict[str, Any]]:
            nonlocal last
            for n in range(1_000_000):
                if n == 100:
                    one.process.terminate()
                if one.process.poll() is None:
                    last = n + 100
                yield {"n": np.array([n]), "sleep": np.array([0.002])}
                if n == last:
                    return

        with ScoringClient([one.grpc, two.grpc], model="echo") as client:
            good, bad = split(list(client.infer_many(items(), on_error="return", in_flight=16, repeat=repeat)))
    done = ran(tmp_path / "a") + ran(tmp_path / "b")
    assert len(good) + len(bad) == last + 1 and set(good) <= set(done)
    if repeat:
        assert bad == []
    else:
        assert len(bad) <= 16 and len(set(done)) == len(done)


@pytest.mark.slow
def test_an_item_that_ends_the_server_fails_alone(tmp_path: Path) -> None:
    """It is tried, first among others and then alone, and given up; the others are scored."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with serving(tmp_path, "h2", address=address), ScoringClient(address, model="echo") as client:
        items: list[dict[str, Any]] = [{"n": np.array([n])} for n in range(30)]
        items[10] = {"x": np.zeros(70_000_000, np.uint8)}  # over the server's limit: it ends the stream
        results = list(client.infer_many(items, repeat=True, on_error="return", in_flight=8))
    bad = [n for n, r in enumerate(results) if isinstance(r, ModelyardError)]
    assert bad == [10] and results[10].detail["status"] == "RESOURCE_EXHAUSTED"  # type: ignore[union-attr]
