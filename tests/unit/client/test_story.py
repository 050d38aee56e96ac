"""The examples in the SDK's documentation are one story, and it is true: iris, its image, its deployment, its calls."""

import doctest
from pathlib import Path

import pytest

from modelyard import AsyncClient, AsyncScoringClient, Client
from modelyard.client.capture import AsyncCapture
from modelyard.client.dead import AsyncDeadLetters
from modelyard.client.deployments import AsyncDeployments
from modelyard.client.images import AsyncImages
from modelyard.client.models import AsyncModels
from tests.e2e.yard import Yard, until

BUILD = [
    Client, AsyncModels.register, AsyncModels.get, AsyncModels.list, AsyncModels.update, AsyncModels.alias,
    AsyncImages.build, AsyncImages.list, AsyncImages.update, AsyncDeployments.create, AsyncDeployments.get,
    AsyncDeployments.list,
]
WATCH = [
    AsyncCapture.read, AsyncCapture.verify, AsyncClient.telemetry, AsyncClient.events, AsyncDeadLetters.list,
    AsyncDeployments.scale, AsyncScoringClient.infer, AsyncScoringClient.infer_many,
]


def iris(path: Path) -> None:
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    x, y = load_iris(return_X_y=True)
    graph = to_onnx(LogisticRegression(max_iter=200).fit(x, y), x[:1].astype("float32"), options={"zipmap": False})
    path.write_bytes(graph.SerializeToString())


def tell(chapters: list[object], names: dict[str, object]) -> None:
    runner = doctest.DocTestRunner(verbose=False)
    for chapter in chapters:
        text, name = chapter.__doc__ or "", getattr(chapter, "__qualname__", "")
        found = doctest.DocTestParser().get_doctest(text, names, name, None, None)
        found.globs = names  # one story: a chapter knows what the ones before it made
        assert found.examples, f"{name} has no example"
        assert runner.run(found, clear_globs=False).failed == 0, name


@pytest.mark.slow
def test_the_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yard = Yard.start("all-in-one", tmp_path / "data")
    iris(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELYARD_URL", yard.url())
    names: dict[str, object] = {"Client": Client}
    try:
        tell(BUILD, names)
        with Client(yard.url()) as client:
            until(lambda: client.capture("iris").read().num_rows == 1, 30, why="the call is captured")
            until(lambda: client.telemetry("iris"), 30, why="the call is counted")
        tell(WATCH, names)
    finally:
        assert yard.stop() == []
