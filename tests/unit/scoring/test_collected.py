"""A trusted pickle may be user code that collects: what it collects of joined calls is each call's own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from modelyard.capture import Collector
from modelyard.core.segments import COLLECT, RECORD, Reader
from modelyard.core.tensors import Tensor
from modelyard.scoring import collect
from modelyard.scoring.capture import CaptureLog
from tests.unit.scoring.planes import grpc_call, open_plane

seen = Collector("seen", columns=["width", "height"])


class Collecting:
    """An estimator."""

    n_features_in_ = 2

    def predict(self, rows: Any) -> Any:
        seen.collect(rows)
        return rows.sum(axis=1)


async def test_what_a_pickled_estimator_collects_is_each_calls_own(tmp_path: Path) -> None:
    """Also when whether calls may be joined is tried with rows that nobody sent: these are not kept."""
    joblib.dump(Collecting(), tmp_path / "m.joblib")
    model = {"name": "m", "version": 1, "file": tmp_path / "m.joblib", "framework": "scikit-learn", "trusted": True}
    log = await asyncio.to_thread(CaptureLog.open, tmp_path / "spool", "0-0a1b2c3d", {}, {"enabled": True})
    collect.bind(log)
    sent: dict[str, list[list[float]]] = {}
    try:
        async with open_plane(tmp_path, models=[model], log=log) as plane:
            for turn in range(6):  # by the lane's thread at first, and by the event loop once they are known as short
                given = [np.arange(2.0 * rows).reshape(rows, 2) + 10 * rows + 100 * turn for rows in (1, 2, 1, 3)]
                answers = await plane.handle([grpc_call("m", Tensor("x", rows)) for rows in given])
                assert [answer.status for answer in answers] == ["OK"] * 4
                sent |= {a.prediction_id: rows.tolist() for a, rows in zip(answers, given, strict=True)}
            predictions = sum(next(iter(plane.metrics._sizes._models.values()))[:-1])
    finally:
        collect.bind(None)
        await asyncio.to_thread(log.close)
    assert predictions < len(sent), "calls were joined"
    frames = [f for path in sorted((tmp_path / "spool").iterdir()) for f in Reader(path.read_bytes())]
    kept = [(f.text()[0], f.body()["rows"]) for f in frames if f.kind == COLLECT]
    assert len(kept) == len(sent) and dict(kept) == sent
    assert {f.text()[0] for f in frames if f.kind == RECORD} == set(sent)
