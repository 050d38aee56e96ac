"""Flavours answer several calls by one prediction where their rows stand alone, and notice where they do not."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.inference import read_response
from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Answer, Call
from modelyard.scoring.dataplane import DataPlane
from tests.unit.scoring.planes import grpc_call, open_plane

IRIS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3], [5.9, 3.0, 4.2, 1.5]])


def graph(path: Path, nodes: list[Any], inputs: dict[str, list[Any]], output: list[Any]) -> dict[str, Any]:
    """An ONNX model: nodes as (operation, inputs, attributes), each feeding the next; the last one's output is y."""
    from onnx import helper, save_model

    made = []
    for n, (operation, given, attributes) in enumerate(nodes):
        made.append(helper.make_node(operation, given, ["y" if n == len(nodes) - 1 else f"t{n}"], **attributes))
    model = helper.make_model(
        helper.make_graph(made, "g", [helper.make_tensor_value_info(k, 1, v) for k, v in inputs.items()],
                          [helper.make_tensor_value_info("y", 1, output)]),
        opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save_model(model, path)
    return {"name": "m", "version": 1, "file": path}


def calls(*arrays: Any, outputs: tuple[str, ...] = ()) -> list[Call]:
    return [grpc_call("flower", Tensor("x", np.asarray(a)), outputs=outputs) for a in arrays]


def values(answers: list[Answer]) -> list[Any]:
    for answer in answers:
        assert answer.error is None, answer.error
    return [read_response(a.body).tensors[0].array.tolist() for a in answers]


def sizes(plane: DataPlane) -> list[int]:
    """How many predictions answered 1, 2, up to 4, 8, 16 … calls."""
    return next(counts[:-1] for counts in plane.metrics._sizes._models.values())


async def asked_alone(plane: DataPlane, all_: list[Call]) -> list[Any]:
    return [values(await plane.handle([call]))[0] for call in all_]


async def test_rows_of_a_graph_are_joined(tmp_path: Path) -> None:
    model = graph(tmp_path / "m.onnx", [("Relu", ["x"], {})], {"x": ["n", 2]}, ["n", 2])
    async with open_plane(tmp_path, models=[model]) as plane:
        arrays = [np.array([[n, -n]] * (n + 1), np.float32) for n in range(8)]
        assert values(await plane.handle(calls(*arrays))) == [np.maximum(a, 0).tolist() for a in arrays]
        assert sizes(plane)[3:] == [1, *[0] * 7] and plane._lanes[0].runner.batched


@pytest.mark.parametrize(
    ("nodes", "output", "expected"),
    [
        ([("ReduceMean", ["x"], {"axes": [0], "keepdims": 1})], ["m", 2], lambda a: a.mean(0, keepdims=True)),
        ([("ReduceSum", ["x"], {"keepdims": 0})], [], lambda a: a.sum()),
        ([("Softmax", ["x"], {"axis": 0})], ["n", 2], lambda a: np.exp(a) / np.exp(a).sum(0)),
        ([("Transpose", ["x"], {"perm": [1, 0]})], ["k", "n"], lambda a: a.T),
        ([("ReduceMax", ["x"], {"axes": [0], "keepdims": 1}), ("Sub", ["x", "t0"], {})], ["n", 2],
         lambda a: a - a.max(0)),
    ],
)
async def test_rows_that_depend_on_each_other_are_noticed(
    tmp_path: Path, nodes: Any, output: Any, expected: Any
) -> None:
    model = graph(tmp_path / "m.onnx", nodes, {"x": ["n", 2]}, output)
    async with open_plane(tmp_path, models=[model]) as plane:
        arrays = [np.array([[1.5, 2.5]], np.float32)] * 3 + [np.array([[1, 2], [3, 5]], np.float32)]
        for _ in range(2):
            got = values(await plane.handle(calls(*arrays)))
            for value, array in zip(got, arrays, strict=True):
                np.testing.assert_allclose(value, expected(array), rtol=1e-5)
        assert not plane._lanes[0].runner.batched
        assert sum(sizes(plane)[1:]) == 0, "no prediction answered two calls, also at first sight"


async def test_a_graph_of_fixed_rows_takes_them_one_call_at_a_time(tmp_path: Path) -> None:
    model = graph(tmp_path / "m.onnx", [("Relu", ["x"], {})], {"x": [1, 2]}, [1, 2])
    async with open_plane(tmp_path, models=[model]) as plane:
        assert values(await plane.handle(calls(*[np.array([[n, -1]], np.float32) for n in range(3)]))) == [
            [[n, 0]] for n in range(3)]
        assert sizes(plane)[0] == 3


async def test_two_inputs_and_unequal_rows(tmp_path: Path) -> None:
    model = graph(tmp_path / "m.onnx", [("Add", ["x", "z"], {})], {"x": ["n", 2], "z": ["m", 2]}, ["n", 2])
    async with open_plane(tmp_path, models=[model]) as plane:
        def call(a: Any, b: Any) -> Call:
            return grpc_call("flower", Tensor("x", np.array(a, "f4")), Tensor("z", np.array(b, "f4")))

        answers = await plane.handle([call([[1, 2]], [[3, 4]]), call([[1, 2], [3, 4]], [[1, 1]]),
                                      call([[5, 6], [7, 8]], [[1, 1], [2, 2]]), call([[1, 2], [3, 4]], [[1, 1]] * 3)])
        assert values(answers[:3]) == [[[4, 6]], [[2, 3], [4, 5]], [[6, 7], [9, 10]]]
        assert answers[3].status in ("INVALID_ARGUMENT", "INTERNAL")
        assert sizes(plane)[1] == 1, "the two whose inputs have equally many rows"


async def test_an_estimator_is_joined_by_dtype_and_outputs(tmp_path: Path, two_models: list[dict[str, Any]]) -> None:
    async with open_plane(tmp_path, models=two_models[:1]) as plane:
        many = [*calls(*(IRIS[n : n + 1] for n in range(3))), *calls(IRIS, outputs=("predict_proba",)),
                *calls(IRIS[:2].astype("f4")), *calls(IRIS[:1], outputs=("predict_proba",))]
        together = values(await plane.handle(many))
        assert sizes(plane)[:3] == [1, 1, 1], "f4 alone, two of probabilities, three of labels"
        for got, alone in zip(together, await asked_alone(plane, many), strict=True):
            np.testing.assert_allclose(got, alone)


async def test_a_row_that_the_model_refuses_fails_alone(tmp_path: Path, two_models: list[dict[str, Any]]) -> None:
    async with open_plane(tmp_path, models=two_models[:1]) as plane:
        answers = await plane.handle(calls(IRIS[:1], IRIS[:1] * np.nan, IRIS[:1, :3], IRIS[1:2], IRIS[:0]))
        assert [a.status for a in answers] == ["OK", *["INVALID_ARGUMENT"] * 2, "OK", "INVALID_ARGUMENT"]
        assert values([answers[0], answers[3]]) == [[0], [2]]
        answers = await plane.handle(calls(IRIS[:1], IRIS[1:2]))
        assert values(answers) == [[0], [2]] and plane._lanes[0].runner.batched, "it was the row, not the model"


async def test_text_is_joined(tmp_path: Path) -> None:
    import skops.io
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    words = np.array([["red", "s"], ["blue", "large"], ["red", "large"]], object)
    skops.io.dump(make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(
        words, ["a", "b", "a"]), tmp_path / "m.skops")
    model = {"name": "m", "version": 1, "file": tmp_path / "m.skops"}
    async with open_plane(tmp_path, models=[model]) as plane:
        assert values(await plane.handle(calls(words[:1], words[1:], words[:1]))) == [[b"a"], [b"b", b"a"], [b"a"]]
        assert sum(sizes(plane)) == sizes(plane)[2] == 1


async def test_calls_of_one_turn_are_one_batch_on_the_event_loop(
    tmp_path: Path, two_models: list[dict[str, Any]]
) -> None:
    async with open_plane(tmp_path, models=two_models[1:]) as plane:
        lane, threads = plane._lanes[0], set()
        predict = lane.runner.predict
        lane.runner.predict = lambda *a: (threads.add(threading.get_ident()), predict(*a))[1]
        for _ in range(500):  # how short a prediction is is measured: on a busy machine it takes more to show
            threads.clear()
            got: list[Answer] = []
            for call in calls(*[IRIS.astype("f4")] * 10):
                plane.submit(call, got.append)
            async with asyncio.timeout(20):
                while len(got) < 10:
                    await asyncio.sleep(0)
            assert {a.status for a in got} == {"OK"}
            if threads == {threading.get_ident()}:
                break
        assert threads == {threading.get_ident()}
        assert sum(sizes(plane)) == sizes(plane)[4], "ten by ten"


async def test_a_burst_of_short_calls_is_no_overload(tmp_path: Path, two_models: list[dict[str, Any]]) -> None:
    async with open_plane(tmp_path, models=two_models[1:], max_queue=8, max_batch_rows=4) as plane:
        many = calls(*[IRIS[:1].astype("f4")] * 100)
        for _ in range(500):  # until it shows how short they are
            answers = await plane.handle(many)
            assert {a.status for a in answers} <= {"OK", "RESOURCE_EXHAUSTED"}
            if {a.status for a in answers} == {"OK"}:
                break
        assert {a.status for a in answers} == {"OK"}
        assert len({a.prediction_id for a in answers}) == 100 and plane.metrics.in_flight == 0


class Slow:
    """An estimator whose prediction takes until it is told, and knows who asked."""

    gate = threading.Event()

    def predict(self, rows: np.ndarray) -> np.ndarray:
        if (rows == -1).any():
            self.gate.wait(20)
        return rows[:, 0]


@pytest.fixture
def slow_file(tmp_path: Path) -> Path:
    import joblib

    joblib.dump(Slow(), tmp_path / "slow.joblib")
    Slow.gate.clear()
    return tmp_path / "slow.joblib"


async def test_a_model_that_hangs_is_its_own_affair_until_it_is_the_replicas(
    tmp_path: Path, slow_file: Path, two_models: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELYARD_STUCK_S", "0.3")
    slow = {"name": "slow", "version": 1, "file": slow_file, "trusted": True}
    async with open_plane(tmp_path, models=[two_models[0], slow], timeout_ms=100) as plane:
        hanging = [grpc_call("slow", Tensor("x", np.array([[value]]))) for value in (-1.0, 1.0)]
        task = asyncio.ensure_future(plane.handle(hanging))
        async with asyncio.timeout(20):
            while not task.done():
                assert plane.ready and not plane.stuck
                answers = await plane.handle([grpc_call("iris", Tensor("x", IRIS))])
                assert values(answers) == [[0, 2, 1]], "other models go on"
            assert [a.status for a in task.result()] == ["DEADLINE_EXCEEDED"] * 2
            while not plane.stuck:
                await asyncio.sleep(0.01)
        assert "slow" in plane.stuck and not plane.ready
        for _ in range(5):
            late = await plane.handle(hanging * 40)
            assert {a.status for a in late} == {"DEADLINE_EXCEEDED"}
        assert len(plane._lanes[1]._queue) < 200, "what nobody waits for any more does not pile up"
        Slow.gate.set()
        async with asyncio.timeout(20):
            while plane.stuck:
                await asyncio.sleep(0.01)
        assert plane.ready, "what came back does not hang"


def test_row_check_is_not_fooled_by_equal_rows() -> None:
    from modelyard.scoring.parts import row_wise

    row = {"x": np.array([[1.0, 2.0]])}
    assert row_wise(lambda a: {"y": a["x"] * 2}, row, row)
    assert not row_wise(lambda a: {"y": np.broadcast_to(a["x"].mean(0), a["x"].shape)}, row, row)
    codes = {"x": np.array([[1, 2]])}
    assert not row_wise(lambda a: {"y": a["x"] - a["x"].max(0)}, codes, codes)


def test_cores_are_those_that_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelyard.scoring import cores

    for name in ("MODELYARD_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cores.cores() == 8
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cores.cores() == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores.cores() == 8
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cores.cores() == 3
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert cores.cores() == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert cores.cores() == 5
    monkeypatch.setenv("MODELYARD_THREADS", "1")
    assert cores.cores() == 1
