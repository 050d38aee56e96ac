"""What ``run`` gets and what becomes of what it returns, as its annotation says."""

from pathlib import Path

import numpy as np
import pytest

from modelyard.core.errors import Invalid
from modelyard.core.tensors import Tensor, objects
from modelyard.scoring.calls import ScoringFailed
from modelyard.scoring.runners import CannotStart
from tests.unit.scoring.planes import infer, open_plane, score

ROWS = [[1.0, 2.0], [3.0, 4.0]]
HEAD = "import numpy as np\nimport pandas as pd\nimport json\n"


def embedded(text: bytes) -> Tensor:
    return Tensor("body", objects("body", [text], [1]), "BYTES", {"content_type": "application/json"})


async def test_array(tmp_path: Path) -> None:
    code = HEAD + "def run(data: np.ndarray):\n    data *= 2\n    return data\n"
    async with open_plane(tmp_path, code) as plane:
        assert await score(plane, {"data": ROWS}) == [[2.0, 4.0], [6.0, 8.0]]
        assert await score(plane, ROWS) == [[2.0, 4.0], [6.0, 8.0]]
        assert await infer(plane, ROWS) == {"output-0": [[2.0, 4.0], [6.0, 8.0]]}
        assert await infer(plane, embedded(b'{"data": [1]}')) == {"output-0": [2]}
        for bad in (b"{", {"rows": 1}, {"data": [[1], [1, 2]]}, {"data": [None]}, {"data": {"a": 1}}):
            with pytest.raises(Invalid):
                await score(plane, bad)
        with pytest.raises(Invalid, match="not 2"):
            await infer(plane, ROWS, ROWS)


async def test_frame(tmp_path: Path) -> None:
    code = HEAD + "def run(data: pd.DataFrame):\n    data['n'] = len(data.columns)\n    return data\n"
    async with open_plane(tmp_path, code) as plane:
        by_column = {"a": [1, 2], "b": ["x", "y"], "n": [2, 2]}
        for body in (
            {"a": [1, 2], "b": ["x", "y"]},
            {"data": {"a": [1, 2], "b": ["x", "y"]}},
            {"data": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]},
            {"columns": ["a", "b"], "index": [0, 1], "data": [[1, "x"], [2, "y"]]},
        ):
            assert await score(plane, body) == by_column
        assert await infer(plane, a=[1, 2], b=["x", "y"]) == {"a": [1, 2], "b": [b"x", b"y"], "n": [2, 2]}
        assert await infer(plane, ROWS) == {"0": [1.0, 3.0], "1": [2.0, 4.0], "n": [2, 2]}
        with pytest.raises(Invalid, match="table"):
            await score(plane, {"a": [1], "b": [1, 2]})


async def test_arrays_by_name(tmp_path: Path) -> None:
    code = HEAD + "def run(data: dict[str, np.ndarray]):\n    return {k: v + 1 for k, v in data.items()}\n"
    async with open_plane(tmp_path, code) as plane:
        assert await infer(plane, a=[1, 2], b=[[3]]) == {"a": [2, 3], "b": [[4]]}
        assert await score(plane, {"a": [1, 2], "b": [[3]]}) == {"a": [2, 3], "b": [[4]]}
        with pytest.raises(Invalid):
            await score(plane, [1])


@pytest.mark.parametrize("head", ["", "from __future__ import annotations\nfrom typing import Any\n"])
async def test_parsed_body(tmp_path: Path, head: str) -> None:
    code = head + f"def run(data{': Any' if head else ''}):\n    return {{'got': data}}\n"
    async with open_plane(tmp_path, code) as plane:
        assert await score(plane, {"any": ["thing", None]}) == {"got": {"any": ["thing", None]}}
        assert await infer(plane, ROWS) == {"output-0": {"got": {"data": ROWS}}}
        assert await infer(plane, a=[1], b=["x"]) == {"output-0": {"got": {"a": [1], "b": ["x"]}}}
        assert await infer(plane, embedded(b'{"free": 1}')) == {"output-0": {"got": {"free": 1}}}
        with pytest.raises(Invalid, match="not JSON"):
            await infer(plane, embedded(b"{"))


async def test_unparsed_body(tmp_path: Path) -> None:
    code = HEAD + "def run(raw_data):\n    return [type(raw_data).__name__, json.loads(raw_data)['data']]\n"
    async with open_plane(tmp_path / "raw_data", code) as plane:
        assert await score(plane, {"data": ROWS}) == ["str", ROWS]
        assert await infer(plane, ROWS) == {"output-0": ["str", ROWS]}
    async with open_plane(tmp_path / "bytes", "def run(data: bytes):\n    return len(data)\n") as plane:
        assert await score(plane, b"\xff\x00not json") == 10
        assert await infer(plane, Tensor("picture", objects("picture", [b"\xff\xd8"], [1]), "BYTES")) == {"output-0": 2}
    async with open_plane(tmp_path / "str", "def run(text: str):\n    return text\n") as plane:
        assert await score(plane, b'{"a": 1}') == '{"a": 1}'
        with pytest.raises(Invalid, match="UTF-8"):
            await score(plane, b"\xff")


@pytest.mark.parametrize(
    ("expression", "plain", "tensors"),
    [
        ("np.array([[1.5]])", [[1.5]], {"output-0": [[1.5]]}),
        ("{'a': np.array([1]), 'b': np.array(['x'])}", {"a": [1], "b": ["x"]}, {"a": [1], "b": [b"x"]}),
        ("pd.DataFrame({'a': [1], 'b': ['x']})", {"a": [1], "b": ["x"]}, {"a": [1], "b": [b"x"]}),
        ("{'label': 'x', 'p': np.float32(0.5)}", {"label": "x", "p": 0.5}, {"output-0": {"label": "x", "p": 0.5}}),
        ("None", None, {"output-0": None}),
        ("[1, (2, 3), {'a'}]", [1, [2, 3], ["a"]], {"output-0": [1, [2, 3], ["a"]]}),
        ("[np.array([1, 2]).T, pd.Series([3])]", [[1, 2], [3]], {"output-0": [[1, 2], [3]]}),
    ],
)
async def test_results(tmp_path: Path, expression: str, plain: object, tensors: dict) -> None:
    async with open_plane(tmp_path, HEAD + f"def run(data):\n    return {expression}\n") as plane:
        assert await score(plane, {}) == plain
        assert await infer(plane, ROWS) == tensors


@pytest.mark.parametrize("expression", ["object()", "np.array([1j])", "b'\\xff'"])
async def test_results_that_cannot_be_said(tmp_path: Path, expression: str) -> None:
    async with open_plane(tmp_path, HEAD + f"def run(data):\n    return {expression}\n") as plane:
        with pytest.raises(ScoringFailed, match="what run returned"):
            await infer(plane, ROWS)


@pytest.mark.parametrize(
    "statement",
    ["raise ValueError('no petals')", "import sys; sys.exit('no petals')", "raise KeyboardInterrupt('no petals')"],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_what_user_code_throws_ends_one_call(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], statement: str, kind: str
) -> None:
    code = f"{kind} run(data):\n    if data == 1:\n        {statement}\n    return data\n"
    async with open_plane(tmp_path, code) as plane:
        with pytest.raises(ScoringFailed, match="no petals") as error:
            await score(plane, 1)
        assert "Traceback" not in error.value.message and "Traceback" in capfd.readouterr().err
        assert await score(plane, 2) == 2


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(
    "statement",
    [
        "raise Odd()",  # an exception that cannot be told
        "raise ValueError('\\ud800')",  # a message that is no text
        "raise GeneratorExit()",
        "import asyncio; raise asyncio.CancelledError()",
        "return Odd()",
        "return Liar()",
    ],
)
async def test_whatever_user_code_does_ends_one_call(tmp_path: Path, kind: str, statement: str) -> None:
    code = (
        "class Odd(Exception):\n    def __str__(self):\n        raise RuntimeError('never')\n    __repr__ = __str__\n"
        "class Liar:\n    def __getattr__(self, name):\n        raise KeyboardInterrupt(name)\n"
        f"{kind} run(data):\n    if data == 1:\n        {statement}\n    return data\n"
    )
    from tests.unit.scoring.planes import grpc_call, score_call

    async with open_plane(tmp_path, code) as plane:
        for bad in (score_call(1), grpc_call("flower", embedded(b"1"))):
            answers = await plane.handle([score_call(2), bad, score_call(3)])
            assert [a.status for a in answers] == ["OK", "INTERNAL", "OK"]
            assert [answers[0].body, answers[2].body] == [b"2", b"3"]


async def test_output_of_user_code_goes_to_the_log_and_nowhere_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import os, sys\ndef run(data):\n    print('printed')\n    os.write(1, b'written ')\n"
        "    sys.stderr.write('to stderr')\n    return data\n"
    )
    async with open_plane(tmp_path, code) as plane:
        assert await score(plane, 1) == 1
    out, err = capfd.readouterr()
    assert "printed" in out and "written " in out and "to stderr" in err


async def test_a_background_task_that_exits_does_not_end_the_model(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\nasync def leave():\n    sys.exit('gone')\n"
        "async def run(data):\n    if data == 1:\n        asyncio.get_running_loop().create_task(leave())\n"
        "        await asyncio.sleep(0.01)\n    return data\n"
    )
    async with open_plane(tmp_path, code, timeout_ms=20_000) as plane:
        for data in (1, 2, 1, 3):
            assert await score(plane, data) == data


async def test_async_runs_overlap(tmp_path: Path) -> None:
    code = (
        "import asyncio\nn = most = 0\nasync def run(data):\n    global n, most\n    n += 1\n"
        "    most = max(most, n)\n    await asyncio.sleep(0.05)\n    n -= 1\n    return most\n"
    )
    from tests.unit.scoring.planes import score_call

    async with open_plane(tmp_path, code) as plane:
        answers = await plane.handle([score_call(i) for i in range(20)])
        assert {a.status for a in answers} == {"OK"}
        assert int(answers[-1].body) == 20


async def test_init_runs_once_and_finds_the_models(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, modelyard\nruns = 0\ndef init():\n    global runs, path\n    runs += 1\n"
        "    path = modelyard.model_path('iris')\n"
        "def run(data):\n    return [runs, path, modelyard.model_path('iris', 3)]\n"
    )
    models = [{"name": "iris", "version": v, "file": files["skops"]} for v in (3, 10)]
    monkeypatch.setenv("MODELYARD_ROOT", str(tmp_path / "opt/modelyard"))
    async with open_plane(tmp_path, code, models) as plane:
        for _ in range(2):
            runs, path, old = await score(plane, {})
            assert runs == 1 and path.endswith("/models/iris/10/model.skops") and old.endswith("/iris/3/model.skops")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def init():\n    raise RuntimeError('no such luck')\ndef run(data):\n    return 1\n", "no such luck"),
        ("def init():\n    import sys\n    sys.exit(4)\ndef run(data):\n    return 1\n", "SystemExit"),
        ("def run(data:\n", "SyntaxError"),
        ("import nothing_like_it\n", "nothing_like_it"),
        ("x = 1\n", "no function run"),
        ("def run():\n    return 1\n", "one argument"),
        ("def run(a, b):\n    return 1\n", "one argument"),
    ],
)
async def test_what_cannot_start_says_why(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(CannotStart, match=said):
        async with open_plane(tmp_path, code):
            pass


async def test_collector_and_current_call(tmp_path: Path) -> None:
    code = (
        "from modelyard.scoring.context import CURRENT\n"
        "def run(data):\n    c = CURRENT.get()\n    return [c.prediction_id, c.request_id, c.model]\n"
    )
    from tests.unit.scoring.planes import score_call

    async with open_plane(tmp_path, code) as plane:
        call = score_call({})
        call.request_id = "mine"
        answer = (await plane.handle([call]))[0]
        import json

        assert json.loads(answer.body) == [answer.prediction_id, "mine", "flower"]
        assert answer.request_id == "mine" and len(answer.prediction_id) == 32


def test_numpy_is_not_written_through() -> None:
    raw = b"\0" * 8
    from modelyard.core.tensors import from_raw

    assert not from_raw("x", "FP64", [1], raw).flags.writeable
    assert np.array_equal(from_raw("x", "FP64", [1], raw), [0.0])
