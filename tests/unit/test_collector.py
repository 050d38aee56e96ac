"""What a scoring file collects beside request and response."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.capture import Collector
from modelyard.core.segments import COLLECT
from modelyard.scoring import collect
from modelyard.scoring.capture import CaptureLog
from modelyard.scoring.context import CURRENT, Current
from tests.unit.test_capture_log import ABOUT, REPLICA, frames


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Path]:
    """In a call of a scoring server."""
    log = CaptureLog.open(tmp_path, REPLICA, ABOUT, {"enabled": True})
    collect.bind(log)
    token = CURRENT.set(Current("p1", "r1", "iris:4"))
    try:
        yield tmp_path
    finally:
        CURRENT.reset(token)
        collect.bind(None)
        log.close()


def collected(spool: Path) -> list[dict[str, Any]]:
    found = [f for f in frames(spool) if f.kind == COLLECT]
    assert all(f.text() == ["p1", "features"] for f in found)
    return [f.body() for f in found]


@pytest.mark.parametrize(("x", "columns", "rows"), [
    (np.array([[1.5, 2.0], [3.0, 4.0]]), ["c0", "c1"], [[1.5, 2.0], [3.0, 4.0]]),
    (np.array([1, 2, 3]), ["c0", "c1", "c2"], [[1, 2, 3]]),
    (np.float32(2.5), ["c0"], [[2.5]]),
    (np.zeros((2, 1, 2)), ["c0"], [[[0.0, 0.0]], [[0.0, 0.0]]]),
    ([[1, "a"], [2, "b"]], ["c0", "c1"], [[1, "a"], [2, "b"]]),
    ([np.array([1, 2]), np.array([3, 4])], ["c0", "c1"], [[1, 2], [3, 4]]),
    ([1, None], ["c0", "c1"], [[1, None]]),
    ({"a": [1, 2], "b": np.array([3, 4])}, ["a", "b"], [[1, 3], [2, 4]]),
    ({"a": 1}, ["a"], [[1]]),
])
def test_anything_that_has_rows(spool: Path, x: Any, columns: list[str], rows: list[list[Any]]) -> None:
    assert Collector("features").collect(x)
    assert collected(spool) == [{"columns": columns, "rows": rows}]


def test_a_frame_and_a_series_have_rows(spool: Path) -> None:
    import pandas as pd

    features = Collector("features")
    assert features.collect(pd.DataFrame({"a": [1, 2], "b": ["x", None]})) and features.collect(pd.Series([1, 2]))
    assert collected(spool) == [{"columns": ["a", "b"], "rows": [[1, "x"], [2, None]]},
                                {"columns": ["c0", "c1"], "rows": [[1, 2]]}]


def test_columns_are_named(spool: Path) -> None:
    features = Collector("features", columns=["area", "ratio"])
    assert features.collect([[1, 2]]) and features.collect(np.zeros((2, 2))) and features.collect([])
    assert [len(body["rows"]) for body in collected(spool)] == [1, 2]
    with pytest.raises(ValueError, match="2 columns"):
        features.collect([[1, 2, 3]])


@pytest.mark.parametrize(("name", "columns"), [("", None), ("a/b", None), ("..", None), ("x" * 65, None), (3, None),
                                               ("ok", ["a", "a"]), ("ok", ["time"])])
def test_what_cannot_be_kept_is_refused_when_the_file_is_loaded(name: Any, columns: list[str] | None) -> None:
    with pytest.raises(ValueError):
        Collector(name, columns)


def test_outside_of_a_scoring_server_it_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    features = Collector("features")
    with caplog.at_level(logging.WARNING):
        assert not features.collect([1]) and not features.collect([2])
    assert len(caplog.records) == 1 and "not kept" in caplog.text
