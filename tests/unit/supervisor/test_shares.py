"""How connections are shared out over replicas: real replicas' counts, and the relay's choice by them. Their programs
cannot be started here; nobody needs them for counting."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from modelyard.supervisor.desired import Desired
from modelyard.supervisor.relay import Relay
from modelyard.supervisor.replica import STUCK_S, Replica

TEMPLATE: dict[str, Any] = {"image": "scorer:1", "root": "/r", "python": "/nowhere/python", "image_env": {},
                            "capture": {}, "limits": {}, "resources": {}, "env": {}, "secrets": {}}


@pytest.fixture
async def replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Replica]]:
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    want = Desired("default", "iris", 1, 2, 60, TEMPLATE)
    made = [Replica(want, 1, n, tmp_path, lambda: None, {}) for n in range(3)]
    yield made
    for replica in made:
        await replica.stop()


def chosen(replicas: list[Replica], kind: str) -> Replica:
    """Whom the relay would take, and counts."""
    one = Relay(kind, lambda: replicas).choose(replicas)
    one.opened(kind)
    return one


async def test_connections_that_were_sent_on_come_back_to_all_alike(replicas: list[Replica]) -> None:
    """They come before the old ones are closed; counted with those, all would go to the others."""
    old, *others = replicas
    ends = [old.opened("grpc") for _ in range(6)]
    await old.spread()
    assert old.load("grpc") == 0 and old.connections == 6
    assert [chosen(replicas, "grpc") for _ in range(6)].count(old) == 2
    for end in ends:
        end()
    assert [replica.load("grpc") for replica in replicas] == [2, 2, 2]
    assert [replica.connections for replica in replicas] == [2, 2, 2] and others


async def test_each_kind_is_shared_out_by_itself(replicas: list[Replica]) -> None:
    first, second, _ = replicas
    for _ in range(5):
        first.opened("rest")
    assert {chosen([first, second], "grpc").ordinal for _ in range(2)} == {0, 1}
    await first.spread()
    assert first.load("rest") == 5, "nobody sent these on"
    assert chosen([first, second], "rest") is second


@pytest.mark.parametrize(("env", "limits", "seconds"), [
    ({}, {}, STUCK_S), ({"MODELYARD_STUCK_S": "7"}, {}, 7), ({"MODELYARD_STUCK_S": "7"}, {"timeout_ms": 10_000}, 20),
    ({"MODELYARD_STUCK_S": "soon"}, {}, STUCK_S)])
async def test_how_long_a_replica_may_be_silent(replicas: list[Replica], env: dict[str, str], limits: dict[str, int],
                                                seconds: float) -> None:
    replicas[0]._template = {**TEMPLATE, "env": env, "limits": limits}
    assert replicas[0]._stuck_s() == seconds
