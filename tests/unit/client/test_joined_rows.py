"""Items whose rows travel together: the same results, and nobody pays for another's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard import AsyncScoringClient, ScoringClient
from modelyard.core.errors import Invalid, ModelyardError
from tests.unit.scoring.roots import Replica, launch, make_root

CODE = """
import numpy as np
def run(data: dict[str, np.ndarray]):
    if "whole" in data:
        return {"sum": data["whole"].sum(keepdims=True)}
    if (data["x"] < 0).any():
        raise ValueError("below zero")
    return {"double": data["x"] * 2, "calls": np.full(len(data["x"]), len(data["x"]))}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    root = make_root(tmp_path_factory.mktemp("joined"), CODE)
    with launch(root, deployment="double") as replica:
        yield replica


@pytest.fixture
def scorer(server: Replica) -> Iterator[ScoringClient]:
    with ScoringClient(server.grpc, model="double") as client:
        yield client


def items(count: int) -> list[dict[str, Any]]:
    """1 to 3 rows each; every tenth item of another type, every eleventh without rows."""
    made = []
    for n in range(count):
        shape = () if n % 11 == 10 else (1 + n % 3, 2)
        made.append({"x": np.full(shape, n, np.float64 if n % 10 == 9 else np.float32)})
    return made


def check(sent: list[dict[str, Any]], got: list[Any]) -> None:
    assert len(got) == len(sent)
    for item, result in zip(sent, got, strict=True):
        assert result["double"].dtype == item["x"].dtype and np.array_equal(result["double"], item["x"] * 2)


def rows_joined(got: list[Any]) -> int:
    """The rows of the largest call."""
    return max(int(result["calls"].max()) for result in got if result["calls"].size)


def test_each_item_gets_its_own_rows(scorer: ScoringClient) -> None:
    sent = [i for i in items(200) if i["x"].ndim]
    got = list(scorer.infer_many(sent, join_rows=16, in_flight=5, request_id="joined"))
    check(sent, got)
    assert 8 < rows_joined(got) <= 16
    assert rows_joined(list(scorer.infer_many(sent))) == 3


async def test_each_item_gets_its_own_rows_async(server: Replica) -> None:
    sent = [i for i in items(200) if i["x"].ndim]

    async def source() -> AsyncIterator[Any]:
        for item in sent:
            yield item

    async with AsyncScoringClient(server.grpc, model="double") as client:
        check(sent, [r async for r in client.infer_many(source(), join_rows=16)])
        check(sent, [r async for r in client.infer_many(sent, join_rows=1000, in_flight=1)])


@pytest.mark.parametrize("bad", [{"x": np.full((1, 2), -1, np.float32)}, {"x": np.array([1j])}, {}])
def test_only_the_bad_item_fails(scorer: ScoringClient, bad: dict[str, Any]) -> None:
    sent = [{"x": np.full((1, 2), n, np.float32)} for n in range(50)]
    sent[20] = bad
    got = list(scorer.infer_many(sent, join_rows=8, on_error="return"))
    error = got.pop(20)
    assert isinstance(error, ModelyardError) and error.detail["item"] == 20
    check(sent[:20] + sent[21:], got)
    seen = 0
    with pytest.raises(ModelyardError) as caught:
        for _ in scorer.infer_many(sent, join_rows=8):
            seen += 1
    assert (seen, caught.value.detail["item"]) == (20, 20)


def test_rows_that_do_not_stand_alone_are_noticed(scorer: ScoringClient) -> None:
    sent = [{"whole": np.ones(3, np.float32)} for _ in range(6)]
    got = list(scorer.infer_many(sent, join_rows=9, on_error="return"))
    assert [type(r) for r in got] == [ModelyardError] * 6
    assert "cannot be joined" in str(got[0]) and [r.detail["item"] for r in got] == list(range(6))  # type: ignore[union-attr]
    assert [float(r["sum"][0]) for r in scorer.infer_many(sent)] == [3.0] * 6  # type: ignore[index]


def test_what_a_source_raises_comes_behind_what_it_gave(scorer: ScoringClient, tmp_path: Path) -> None:
    def source() -> Iterator[Any]:
        yield from items(5)
        raise KeyError("source")

    seen = []
    with pytest.raises(KeyError):
        for result in scorer.infer_many(source(), join_rows=100):
            seen.append(result)
    check(items(5), seen)
    with pytest.raises(Invalid, match="join_rows"):
        scorer.infer_many([], join_rows=0)
