"""The data plane in this process: who answers, flavours, limits and deadlines, and capture before the answer."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.errors import Invalid, NotFound
from modelyard.core.inference import read_response
from modelyard.core.tensors import Tensor
from modelyard.scoring.capture import CaptureLog, Finished
from modelyard.scoring.dataplane import DataPlane
from modelyard.scoring.runners import CannotStart
from modelyard.scoring.settings import Limits
from tests.unit.scoring.planes import grpc_call, infer, open_plane, rest_call, score, score_call

FLOWER = np.array([[5.1, 3.5, 1.4, 0.2]])
SLEEPER = (
    "import time\nran = []\ndef run(data):\n    if data == 'ran':\n        return ran\n    time.sleep(data)\n"
    "    ran.append(data)\n    return data\n"
)


class Seen(CaptureLog):
    """A real capture log that also remembers what it was handed and in which order."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.finished: list[Finished] = []
        self.refusals: list[tuple[str, str]] = []

    def append(self, calls: Any) -> None:
        self.finished += calls
        super().append(calls)

    def refused(self, model: str, status: str, started_ns: int | None = None, reason: str = "refused") -> None:
        self.refusals.append((model, status))
        super().refused(model, status, started_ns, reason)


@pytest.fixture
def log(tmp_path: Path) -> Any:
    log = Seen.open(tmp_path / "spool", "0-0a1b2c3d", {}, {"enabled": True})
    yield log
    log.close()


async def statuses(plane: DataPlane, *calls: Any) -> list[str]:
    return [a.status for a in await plane.handle(calls)]


async def test_each_flavour_answers_under_its_name(tmp_path: Path, two_models: list[dict[str, Any]]) -> None:
    async with open_plane(tmp_path, models=two_models) as plane:
        assert plane.table.names == ["iris", "iris-onnx"], "two models: the deployment's name means neither"
        sk, onnx = await plane.handle(
            [grpc_call("iris", Tensor("any", FLOWER)), grpc_call("iris-onnx", Tensor("any", FLOWER.astype("f4")))]
        )
        answer = read_response(sk.body)
        assert (answer.model, answer.version, sk.model) == ("iris", "4", "iris:4")
        assert [(t.name, t.array.tolist()) for t in answer.tensors] == [("predict", [0])]
        outputs = {t.name: t.array for t in read_response(onnx.body).tensors}
        assert outputs["label"].tolist() == [0] and outputs["probabilities"].shape == (1, 3)
        asked = (await plane.handle([grpc_call("iris", Tensor("x", FLOWER), outputs=("predict_proba", "predict"))]))[0]
        assert [t.name for t in read_response(asked.body).tensors] == ["predict_proba", "predict"]
        refused = await plane.handle(
            [
                grpc_call("flower", Tensor("x", FLOWER)),
                grpc_call("iris", Tensor("x", FLOWER), version="5"),
                score_call({"data": FLOWER.tolist()}),
                grpc_call("iris", Tensor("x", FLOWER), outputs=("no",)),
                grpc_call("iris", Tensor("x", FLOWER[:, :3])),
                grpc_call("iris-onnx", Tensor("x", FLOWER[0])),
                grpc_call("iris", Tensor("x", FLOWER * np.nan)),
                grpc_call("iris"),
                grpc_call("iris-onnx"),
                grpc_call("iris-onnx", Tensor("x", np.array([["a"] * 4]))),
                grpc_call("iris", Tensor("x", FLOWER), Tensor("y", FLOWER)),
            ]
        )
        assert [a.status for a in refused] == ["NOT_FOUND"] * 3 + ["INVALID_ARGUMENT"] * 8
        assert "iris, iris-onnx" in str(refused[0].error)


async def test_one_model_answers_under_both_names(tmp_path: Path, two_models: list[dict[str, Any]]) -> None:
    async with open_plane(tmp_path, models=two_models[:1]) as plane:
        assert await infer(plane, FLOWER) == {"predict": [0]}
        assert await score(plane, {"data": FLOWER.tolist()}) == [0]
        body = {"id": "9", "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [5, 3, 1, 0]}]}
        answer = (await plane.handle([rest_call("iris", body)]))[0]
        assert json.loads(answer.body) == {
            "model_name": "iris",
            "model_version": "4",
            "id": "9",
            "outputs": [{"name": "predict", "datatype": "INT64", "shape": [1], "data": [0]}],
        }


async def test_a_scoring_file_hides_its_models(tmp_path: Path, two_models: list[dict[str, Any]]) -> None:
    code = "def run(data):\n    return 1\n"
    async with open_plane(tmp_path / "one", code, two_models[:1]) as plane:
        assert plane.table.names == ["flower", "iris"]
        assert plane.table.find("flower")[0].version == "4"
    async with open_plane(tmp_path / "two", code, two_models) as plane:
        assert plane.table.names == ["flower"] and plane.table.find("flower", "7")
        with pytest.raises(NotFound):
            plane.table.find("flower", "4")


async def test_highest_version_answers_when_none_is_named(tmp_path: Path, files: dict[str, Path]) -> None:
    models = [{"name": "iris", "version": v, "file": files["skops"]} for v in (9, 10)]
    async with open_plane(tmp_path, models=models) as plane:
        assert plane.table.find("iris")[0].version == "10" and plane.table.find("iris", "9")[0].version == "9"
        assert plane.table.versions("iris") == ["9", "10"]


async def test_pickles_only_when_trusted(tmp_path: Path, files: dict[str, Path]) -> None:
    model = {"name": "iris", "version": 1, "file": files["joblib"], "framework": "scikit-learn"}
    with pytest.raises(CannotStart, match="trusted: true"):
        async with open_plane(tmp_path / "a", models=[model]):
            pass
    async with open_plane(tmp_path / "b", models=[{**model, "trusted": True}]) as plane:
        assert await infer(plane, FLOWER) == {"predict": [0]}


async def test_models_that_are_not_what_they_claim(tmp_path: Path, files: dict[str, Path]) -> None:
    import skops.io
    from sklearn.preprocessing import FunctionTransformer

    odd = tmp_path / "odd.skops"
    skops.io.dump(FunctionTransformer(time.sleep), odd)
    cases = [
        ({"file": odd}, "time.sleep|not trusted"),
        ({"file": files["onnx"], "framework": "scikit-learn"}, "pickle"),
        ({"file": files["skops"], "framework": "onnx"}, "not an ONNX graph"),
        ({"file": files["onnx"], "framework": "keras"}, "scoring file"),
    ]
    for n, (fields, said) in enumerate(cases):
        with pytest.raises(CannotStart, match=said):
            async with open_plane(tmp_path / str(n), models=[{"name": "m", "version": 1, **fields}]):
                pass
    with pytest.raises(CannotStart, match="neither"):
        async with open_plane(tmp_path / "none"):
            pass


async def test_queue_full_is_refused_and_counted(tmp_path: Path, log: Seen) -> None:
    async with open_plane(tmp_path, SLEEPER, log=log, max_queue=2) as plane:
        first = asyncio.ensure_future(plane.handle([score_call(0.3)]))
        while not plane._lanes[0].busy or plane._lanes[0].waiting:
            await asyncio.sleep(0.005)
        assert await statuses(plane, *[score_call(0)] * 5) == ["OK"] * 2 + ["RESOURCE_EXHAUSTED"] * 3
        assert (await first)[0].status == "OK"
        assert log.refusals == [("flower", "RESOURCE_EXHAUSTED")] * 3 and len(log.finished) == 3
        assert plane._lanes[0].waiting == 0
        async with asyncio.timeout(5):  # its thread lays the batch aside after the answers have left
            while plane._lanes[0].busy:
                await asyncio.sleep(0.005)


async def test_past_the_deadline_nothing_runs(tmp_path: Path, log: Seen) -> None:
    async with open_plane(tmp_path, SLEEPER, log=log) as plane:
        running = asyncio.ensure_future(plane.handle([score_call(0.25)]))
        await asyncio.sleep(0.05)
        late, gone = score_call(0.001), score_call(0.002)
        late.deadline, gone.deadline = time.monotonic() + 0.05, time.monotonic() - 1
        began = time.monotonic()
        assert await statuses(plane, late, gone) == ["DEADLINE_EXCEEDED"] * 2
        assert time.monotonic() - began < 0.2, "answered at the deadline, not when the model is free"
        await running
        assert await score(plane, "ran") == [0.25]
        assert [f.status for f in log.finished] == ["DEADLINE_EXCEEDED"] * 2 + ["OK"] * 2
        assert plane._lanes[0].waiting == 0


async def test_timeout_of_the_deployment(tmp_path: Path) -> None:
    async with open_plane(tmp_path, SLEEPER, timeout_ms=50) as plane:
        assert await statuses(plane, score_call(0.2)) == ["DEADLINE_EXCEEDED"]
        while plane._lanes[0].busy:
            await asyncio.sleep(0.01)
        assert await statuses(plane, score_call(0)) == ["OK"]


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_a_caller_that_left_is_not_served(tmp_path: Path, log: Seen, kind: str) -> None:
    sleep = "await asyncio.sleep(data)" if "async" in kind else "time.sleep(data)"
    code = (
        SLEEPER.replace("def run", f"{kind} run")
        .replace("time.sleep(data)", sleep)
        .replace("import time", "import time, asyncio")
    )
    async with open_plane(tmp_path, code, log=log) as plane:
        task = asyncio.ensure_future(plane.handle([score_call(0.1), score_call(0.2)]))
        await asyncio.sleep(0.03)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while plane._lanes[0].busy:
            await asyncio.sleep(0.01)
        assert await score(plane, "ran") == ([0.1] if kind == "def" else [])
        assert [f.status for f in log.finished] == ["CANCELLED", "CANCELLED", "OK"]
        assert plane._lanes[0].waiting == 0 and plane.metrics.in_flight == 0


async def test_slow_user_code_does_not_block_the_loop(tmp_path: Path) -> None:
    code = "import time\ndef run(data):\n    end = time.time() + data\n    while time.time() < end:\n        pass\n"
    async with open_plane(tmp_path, code) as plane:
        busy = asyncio.ensure_future(plane.handle([score_call(0.4)]))
        longest = 0.0
        while not busy.done():
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            longest = max(longest, time.perf_counter() - began)
        assert longest < 0.2


async def test_capture_has_every_admitted_call_before_its_answer(
    tmp_path: Path, log: Seen, two_models: list[dict[str, Any]]
) -> None:
    async with open_plane(tmp_path, models=two_models, log=log) as plane:
        calls = [
            grpc_call("iris", Tensor("x", FLOWER)),
            grpc_call("iris", Tensor("x", FLOWER[0])),
            grpc_call("nobody"),
            rest_call("iris", {"inputs": []}),
            grpc_call("iris", Tensor("x", np.zeros((3000, 4)))),
        ]
        calls[0].request_id, calls[0].trace_id = "r-1", "0af7651916cd43dd8448eb211c80319c"
        plane.limits = Limits(max_message_bytes=65_536)
        answers = await plane.handle(calls)
        assert [a.status for a in answers] == [
            "OK",
            "INVALID_ARGUMENT",
            "NOT_FOUND",
            "INVALID_ARGUMENT",
            "RESOURCE_EXHAUSTED",
        ]
        assert log.refusals == [("(unknown)", "NOT_FOUND"), ("(unknown)", "RESOURCE_EXHAUSTED")]
        by_id = {f.prediction_id: f for f in log.finished}
        assert set(by_id) == {a.prediction_id for a in answers if a.status in ("OK", "INVALID_ARGUMENT")}
        first = by_id[answers[0].prediction_id]
        assert (first.request, first.response) == (calls[0].body, answers[0].body), "bytes as they were on the wire"
        assert (first.request_id, first.trace_id, first.model, first.protocol) == (
            "r-1",
            calls[0].trace_id,
            "iris:4",
            "grpc",
        )
        assert first.latency_ns >= first.queue_ns >= 0 and abs(first.started_ns - time.time_ns()) < 60e9
        assert json.loads(by_id[answers[3].prediction_id].response)["status"] == 400
        assert log.totals["recorded"] == 3 and log.totals["refused"] == 2


@pytest.fixture(params=["reject", "block"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    policy = {"enabled": True, "on_pressure": request.param, "spool_bytes": 1}
    log = CaptureLog.open(tmp_path / "spool", "0-0a1b2c3d", {}, policy)
    yield log
    log.close()


async def test_a_full_spool_refuses_or_waits_when_the_policy_says_so(tmp_path: Path, full: CaptureLog) -> None:
    async with open_plane(tmp_path, SLEEPER, log=full, timeout_ms=300) as plane:
        began = time.monotonic()
        assert await statuses(plane, score_call(0)) == ["RESOURCE_EXHAUSTED"]
        assert (time.monotonic() - began >= 0.3) == (full.on_pressure == "block")
        assert full.totals == {"recorded": 0, "collected": 0, "pressed": 1}


async def test_short_predictions_of_ours_run_inline(tmp_path: Path, two_models: list[dict[str, Any]]) -> None:
    async with open_plane(tmp_path, models=two_models[1:]) as plane:
        for _ in range(3000):  # how short they are is measured: on a busy machine it takes more of them to show
            await infer(plane, FLOWER.astype("f4"))
            job = plane.submit(grpc_call("flower", Tensor("x", FLOWER.astype("f4"))), lambda answer: None)
            await asyncio.sleep(0)  # one turn of the loop, after which nothing that a thread did can have arrived
            if job.settled:
                break
            while not job.settled:  # alone to the end: calls that overlap are waited for
                await asyncio.sleep(0)
        assert job.settled and job.status == "OK"


async def test_not_loaded_is_unavailable() -> None:
    plane = DataPlane("flower", Limits())
    assert await statuses(plane, score_call(1)) == ["UNAVAILABLE"] and not plane.ready
    with pytest.raises(Invalid):
        from modelyard.scoring.transport import parse_address

        parse_address("nowhere")
