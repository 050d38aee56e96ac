"""Calls that queue are answered together: what is joined, what is not, and that nobody's call pays for another's."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.inference import read_response
from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Answer, Call
from modelyard.scoring.capture import CaptureLog, Finished
from modelyard.scoring.dataplane import DataPlane
from modelyard.scoring.runners import CannotStart
from tests.unit.scoring.planes import grpc_call, open_plane, score_call

HEAD = (
    "import threading, asyncio\nimport numpy as np\nimport pandas as pd\n"
    "gate, entered, seen = threading.Event(), threading.Event(), []\n"
    "def note(rows, gates):\n    seen.append(rows)\n    if gates:\n        entered.set()\n        gate.wait(20)\n"
)
ARRAYS = HEAD + (
    "def run_batch(data: np.ndarray):\n    note(len(data), (data == -1).any())\n"
    "    if (data == 666).any():\n        raise ValueError('no petals')\n"
    "    return data[:-1] if (data == 13).any() else data * 2\n"
)
BODIES = HEAD + (
    "def run_batch(data):\n    rows = data if isinstance(data, list) else data['data']\n"
    "    note(len(rows), -1 in rows)\n    return [[row, len(rows)] for row in rows]\n"
)


def score_module() -> Any:
    """The scoring file that the last plane loaded."""
    return sys.modules["score"]


def array_call(*rows: Sequence[float], dtype: str = "f8", **more: Any) -> Call:
    return grpc_call("flower", Tensor("x", np.array(rows, dtype)), **more)


def outputs(answer: Answer) -> Any:
    assert answer.error is None, answer.error
    return read_response(answer.body).tensors[0].array.tolist()


class Held:
    """While it is entered, a first call holds the model's thread, so that all others queue."""

    def __init__(self, plane: DataPlane, first: Call) -> None:
        self.plane, self.first = plane, first
        self.module = score_module()

    async def __aenter__(self) -> "Held":
        self.task = asyncio.ensure_future(self.plane.handle([self.first]))
        await until(self.module.entered.is_set)
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.module.gate.set()
        await self.task


async def until(what: Any) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.002)


async def queued(plane: DataPlane, *calls: Call, first: Call | None = None) -> list[Answer]:
    """The answers of calls that all waited while another ran."""
    async with Held(plane, first or array_call([-1])):
        answers = asyncio.ensure_future(plane.handle(calls))
        await asyncio.sleep(0)
    return await answers


async def test_rows_are_joined_in_order_and_given_back(tmp_path: Path) -> None:
    async with open_plane(tmp_path, ARRAYS) as plane:
        answers = await queued(plane, array_call([1]), array_call([2], [3]), array_call([4]))
        assert [outputs(a) for a in answers] == [[[2.0]], [[4.0], [6.0]], [[8.0]]]
        assert score_module().seen == [1, 4]


async def test_rows_are_capped_and_a_call_is_never_split(tmp_path: Path) -> None:
    async with open_plane(tmp_path, ARRAYS, max_batch_rows=4) as plane:
        calls = [array_call(*[[n]] * n) for n in (2, 2, 1, 9)]
        answers = await queued(plane, *calls)
        assert [len(outputs(a)) for a in answers] == [2, 2, 1, 9]
        assert score_module().seen == [1, 4, 1, 9]


async def test_only_equals_are_joined(tmp_path: Path) -> None:
    async with open_plane(tmp_path, ARRAYS) as plane:
        calls = [array_call([1]), array_call([1, 2]), array_call([1], dtype="f4"), array_call([3]), array_call([3, 4])]
        answers = await queued(plane, *calls)
        assert [outputs(a) for a in answers] == [[[2]], [[2, 4]], [[2]], [[6]], [[6, 8]]]
        assert score_module().seen == [1, 2, 2, 1]
        kinds = [read_response(a.body).tensors[0].datatype for a in answers]
        assert kinds == ["FP64", "FP64", "FP32", "FP64", "FP64"]


async def test_a_bad_call_fails_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with open_plane(tmp_path, ARRAYS) as plane:
        unreadable = array_call([1])
        unreadable.body = unreadable.body[:-3] + b"abc"[:1]
        bad = [array_call([666]), array_call(), grpc_call("flower", Tensor("x", np.array(5.0))), unreadable]
        answers = await queued(plane, array_call([1]), *bad, array_call([2]))
        assert [a.status for a in answers] == ["OK", "INTERNAL", *["INVALID_ARGUMENT"] * 3, "OK"]
        assert "no petals" in str(answers[1].error) and "run_batch takes rows" in str(answers[3].error)
        assert outputs(answers[0]) == [[2]] and outputs(answers[5]) == [[4]]
        assert score_module().seen == [1, 3, 1, 2, 1, 1], "three together, then each half, down to the bad one"
        assert capfd.readouterr().err.count("Traceback") == 1, "what a batch raised is told by the call that raises it"


async def test_one_bad_call_among_many_costs_little(tmp_path: Path) -> None:
    async with open_plane(tmp_path, ARRAYS) as plane:
        answers = await queued(plane, *(array_call([666 if n == 41 else n + 100]) for n in range(64)))
        assert [n for n, a in enumerate(answers) if a.status != "OK"] == [41]
        assert [outputs(a) for a in answers[:41]] == [[[2 * n + 200]] for n in range(41)]
        assert len(score_module().seen) == 1 + 1 + 12


async def test_a_result_of_another_length_fails_all_its_calls(tmp_path: Path) -> None:
    async with open_plane(tmp_path, ARRAYS) as plane:
        answers = await queued(plane, array_call([1]), array_call([13]), array_call([2, 3]))
        assert [a.status for a in answers] == ["INTERNAL", "INTERNAL", "OK"]
        assert "1 rows for the 2 it was given; it must return a row for each" in str(answers[0].error)
        alone = (await plane.handle([array_call([13])]))[0]
        assert alone.status == "INTERNAL" and "0 rows for the 1" in str(alone.error)


@pytest.mark.parametrize("result", ["5", "'text'", "None", "np.float64(1)", "{'a': data, 'b': data[1:]}", "[[1, 2]]"])
async def test_results_without_rows(tmp_path: Path, result: str) -> None:
    code = HEAD + f"def run_batch(data: np.ndarray):\n    note(len(data), (data == -1).any())\n    return {result}\n"
    async with open_plane(tmp_path, code) as plane:
        answers = await queued(plane, array_call([1]), array_call([2]))
        assert [a.status for a in answers] == ["INTERNAL"] * 2
        assert "must return a row for each" in str(answers[0].error)


async def test_what_expired_or_was_left_is_not_run(tmp_path: Path) -> None:
    async with open_plane(tmp_path, ARRAYS) as plane:
        late, left = array_call([7]), array_call([8])
        late.deadline = time.monotonic() + 0.05
        got: list[Answer] = []
        async with Held(plane, array_call([-1])) as held:
            plane.submit(late, got.append)
            job = plane.submit(left, got.append)
            kept = asyncio.ensure_future(plane.handle([array_call([1])]))
            plane.cancel(job)
            plane.cancel(job)
            await until(lambda: len(got) == 2)
            assert [a.status for a in got] == ["CANCELLED", "DEADLINE_EXCEEDED"], "each once, while the model is busy"
            assert not held.task.done()
        assert outputs((await kept)[0]) == [[2]]
        assert score_module().seen == [1, 1] and plane.metrics.in_flight == 0 and plane._lanes[0].waiting == 0


async def test_a_deadline_that_passes_between_two_batches(tmp_path: Path) -> None:
    code = HEAD + (
        "import time\ndef run_batch(data: np.ndarray):\n    note(len(data), (data == -1).any())\n"
        "    time.sleep(0.3 if (data == 30).any() else 0)\n    return data\n"
    )
    async with open_plane(tmp_path, code, max_batch_rows=2) as plane:
        slow, late = array_call([30], [30]), array_call([1], [2])
        late.deadline = time.monotonic() + 0.25
        answers = await queued(plane, slow, late)
        assert [a.status for a in answers] == ["OK", "DEADLINE_EXCEEDED"]
        assert score_module().seen == [1, 2]


async def test_frames_and_arrays_by_name(tmp_path: Path) -> None:
    code = HEAD + (
        "def run_batch(data: pd.DataFrame):\n    note(len(data), (data.iloc[:, 0] == -1).any())\n"
        "    return data.assign(row=range(len(data)))\n"
    )
    async with open_plane(tmp_path / "frame", code) as plane:
        bodies = [{"a": [1], "b": ["x"]}, {"a": [2, 3], "b": ["y", "z"]}, {"b": ["z"], "a": [2]}]
        answers = await queued(plane, *map(score_call, bodies), first=score_call({"a": [-1], "b": [""]}))
        assert [json.loads(a.body) for a in answers] == [
            {"a": [1], "b": ["x"], "row": [0]}, {"a": [2, 3], "b": ["y", "z"], "row": [1, 2]},
            {"b": ["z"], "a": [2], "row": [0]},
        ]
        assert score_module().seen == [1, 3, 1], "columns in another order are another table"
    code = HEAD + (
        "def run_batch(data: dict[str, np.ndarray]):\n    note(len(data['a']), (data['a'] == -1).any())\n"
        "    return {'sum': data['a'] + data['b'], 'n': [len(data['a'])] * len(data['a'])}\n"
    )
    async with open_plane(tmp_path / "dict", code) as plane:
        bodies = [{"a": [1], "b": [2]}, {"a": [3, 4], "b": [5, 6]}, {"a": [1], "b": [2, 3]}]
        answers = await queued(plane, *map(score_call, bodies), first=score_call({"a": [-1], "b": [0]}))
        assert [json.loads(a.body) for a in answers[:2]] == [{"sum": [3], "n": [3]}, {"sum": [8, 10], "n": [3, 3]}]
        assert answers[2].status == "INVALID_ARGUMENT"


async def test_parsed_bodies(tmp_path: Path) -> None:
    async with open_plane(tmp_path, BODIES) as plane:
        bodies = [{"data": [1]}, {"data": [2, 3]}, [4], [5, 6], {"data": [7], "k": 1}, {"data": [8], "k": 1}]
        refused = [{"data": 1}, "text", {"data": []}]
        answers = await queued(plane, *map(score_call, bodies + refused), first=score_call([-1]))
        assert [json.loads(a.body) for a in answers[:6]] == [
            [[1, 3]], [[2, 3], [3, 3]], [[4, 3]], [[5, 3], [6, 3]], [[7, 2]], [[8, 2]]]
        assert [a.status for a in answers[6:]] == ["INVALID_ARGUMENT"] * 3


async def test_what_has_no_rows_goes_to_run(tmp_path: Path) -> None:
    code = BODIES + "def run(data):\n    return {'alone': data}\n"
    async with open_plane(tmp_path, code) as plane:
        answers = await queued(plane, score_call({"free": 1}), score_call([1]), score_call({"free": 2}),
                               first=score_call([-1]))
        assert [json.loads(a.body) for a in answers] == [{"alone": {"free": 1}}, [[1, 1]], {"alone": {"free": 2}}]


async def test_run_never_sees_rows_of_two_calls(tmp_path: Path) -> None:
    code = ARRAYS.replace("run_batch", "run")
    async with open_plane(tmp_path, code) as plane:
        answers = await queued(plane, *[array_call([n]) for n in range(5)])
        assert [outputs(a) for a in answers] == [[[2 * n]] for n in range(5)]
        assert score_module().seen == [1] * 6


async def test_an_async_run_batch(tmp_path: Path) -> None:
    code = HEAD + (
        "async def run_batch(data: np.ndarray):\n    seen.append(len(data))\n"
        "    if (data == -1).any():\n        entered.set()\n"
        "        while not gate.is_set():\n            await asyncio.sleep(0.005)\n"
        "    if (data == 666).any():\n        raise asyncio.CancelledError('no petals')\n"
        "    return data[1:] if (data == 13).any() else data * 2\n"
    )
    async with open_plane(tmp_path, code) as plane:
        module = score_module()
        first = [asyncio.ensure_future(plane.handle([array_call([-1])])) for _ in range(1)]
        for n in range(1, 4):  # as many batches as may be under way; each is begun before the next call comes
            await until(lambda n=n: len(module.seen) == n)
            first.append(asyncio.ensure_future(plane.handle([array_call([-1])])))
        await until(lambda: len(module.seen) == 4)
        calls = [array_call([1]), array_call([666]), array_call([2]), array_call([13, 0]), array_call([0, 0])]
        rest = asyncio.ensure_future(plane.handle(calls))
        left = asyncio.ensure_future(plane.handle([array_call([5])]))
        await asyncio.sleep(0)
        left.cancel()
        module.gate.set()
        answers = await asyncio.wait_for(rest, 20)
        assert [a.status for a in answers] == ["OK", "INTERNAL", "OK", "INTERNAL", "INTERNAL"]
        assert outputs(answers[0]) == [[2]] and outputs(answers[2]) == [[4]]
        assert [outputs((await task)[0]) for task in first] == [[[-2]]] * 4
        assert module.seen[:4] == [1] * 4 and sorted(module.seen[4:]) == [1, 1, 1, 2, 2, 3], "three, halved twice; two"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def run_batch(data: bytes):\n    return 1\n", "unparsed body"),
        ("def run_batch(raw_data):\n    return 1\n", "unparsed body"),
        ("def run_batch(a, b):\n    return 1\n", "run_batch must take one argument"),
        ("def run_batch(data):\n    return 1\nasync def run(data):\n    return 1\n", "both be async"),
    ],
)
async def test_what_cannot_batch_says_why(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(CannotStart, match=said):
        async with open_plane(tmp_path, code):
            pass


class Counting(CaptureLog):
    """A real capture log that also remembers each append."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.appended: list[list[Finished]] = []

    def append(self, calls: Any) -> None:
        self.appended.append(list(calls))
        super().append(calls)


@pytest.fixture
def log(tmp_path: Path) -> Any:
    log = Counting.open(tmp_path / "spool", "0-0a1b2c3d", {}, {"enabled": True})
    yield log
    log.close()


async def test_one_append_for_each_batch(tmp_path: Path, log: Counting) -> None:
    async with open_plane(tmp_path, ARRAYS, log=log) as plane:
        calls = [array_call([n]) for n in range(9)]
        answers = await queued(plane, *calls)
        assert sum(map(len, log.appended)) == 10
        last = log.appended[-1][-9:]  # the first call may be in it as well, if the loop was slow to look
        assert [f.prediction_id for f in last] == [a.prediction_id for a in answers]
        assert [(f.request, f.response) for f in last] == [
            (c.body, a.body) for c, a in zip(calls, answers, strict=True)]
        text = (await asyncio.to_thread(plane.metrics.text)).decode()
        for line in ('batch_calls_sum{model="flower"} 10.0', 'batch_calls_count{model="flower"} 2.0',
                     'model_seconds_count{model="flower"} 2.0', 'queue_seconds_count{model="flower"} 10.0',
                     'latency_seconds_count{model="flower"} 10.0'):
            assert f"modelyard_scoring_{line}" in text


async def test_collected_rows_belong_to_the_calls_they_came_from(tmp_path: Path) -> None:
    code = HEAD + (
        "from modelyard.capture import Collector\nkept, odd = Collector('kept'), Collector('odd')\n"
        "def run_batch(data: np.ndarray):\n    note(len(data), (data == -1).any())\n"
        "    kept.collect(data)\n    odd.collect([[len(data)]] * 2)\n    return data\n"
    )
    from modelyard.scoring import collect

    class Sink:
        rows: list[tuple[str, str, Any]] = []

        def collect(self, collector: str, prediction_id: str, columns: Any, rows: Any) -> None:
            self.rows.append((collector, prediction_id, rows))

    collect.bind(Sink())
    try:
        async with open_plane(tmp_path, code) as plane:
            first, second = await queued(plane, array_call([1]), array_call([2], [3]))
            assert Sink.rows[2:] == [
                ("kept", first.prediction_id, [[1.0]]), ("kept", second.prediction_id, [[2.0], [3.0]]),
                ("odd", first.prediction_id, [[3], [3]]),
            ]
    finally:
        collect.bind(None)
