"""MLflow folders by their python_function: folders that MLflow itself wrote, loaded by MLflow itself."""

from __future__ import annotations

import os
import warnings

os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"  # before anything imports it

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.errors import Invalid
from modelyard.core.signatures import normal
from modelyard.core.tensors import Tensor
from modelyard.registry.mlflow_scan import scan
from modelyard.scoring.calls import ScoringFailed
from modelyard.scoring.runners import CannotStart
from tests.unit.scoring.planes import infer, open_plane, score

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Entries of image.json, with what the registry would say of each."""
    warnings.simplefilter("ignore")
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import infer_signature

    class Sum(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: Any) -> Any:
            if (model_input["a"] > 1e6).any():
                raise ValueError("that is too much")
            return pd.DataFrame({"total": model_input["a"] + model_input["b"], "who": ["x"] * len(model_input)})

    class Twice(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: Any) -> Any:
            return model_input * 2

    class Named(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: Any) -> Any:
            return {"sum": model_input["left"] + model_input["right"]}

    class Plain(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: Any) -> Any:
            return [f"{type(model_input).__name__} {len(model_input)}"]

    frame = pd.DataFrame({"a": [1.0, 2.0], "b": np.array([3, 4], np.int32)})
    array = np.ones((2, 3), np.float32)
    both = {"left": array, "right": array}
    root = tmp_path_factory.mktemp("mlflow")
    for name, made, example in (("sum", Sum(), frame), ("twice", Twice(), array), ("named", Named(), both),
                                ("plain", Plain(), None)):
        more = {} if example is None else {"input_example": example, "signature": infer_signature(
            example, made.predict(None, example))}
        mlflow.pyfunc.save_model(root / name, python_model=made, pip_requirements=["mlflow"], **more)
    return {name: entry(root / name) for name in ("sum", "twice", "named", "plain")}


def entry(folder: Path) -> dict[str, Any]:
    signature, sample = scan(lambda name, most: (folder / name).read_bytes() if (folder / name).is_file() else None)
    said = {"signature": signature} if signature else {}
    return {"name": folder.name, "version": 1, "file": folder, "framework": "mlflow", "trusted": True, **said,
            **({"sample": sample} if sample else {})}


async def test_columns(tmp_path: Path, folders: dict[str, Any]) -> None:
    assert folders["sum"]["sample"] == {"columns": ["a", "b"], "data": [[1.0, 3], [2.0, 4]]}
    async with open_plane(tmp_path, models=[folders["sum"]]) as plane:
        runner = plane.about("sum")[1]
        assert [tuple(slot) for slot in runner.inputs] == [("a", "FP64", (-1,)), ("b", "INT32", (-1,))]
        assert [tuple(slot) for slot in runner.outputs] == [("total", "FP64", (-1,)), ("who", "BYTES", (-1,))]
        answer = {"total": [4.0, 6.0], "who": ["x", "x"]}
        for body in (folders["sum"]["sample"], {"a": [1, 2], "b": [3, 4]}, {"data": [[1, 3], [2, 4]]}):
            assert await score(plane, body) == answer
        got = await infer(plane, a=np.array([1.0, 2.0]), b=np.array([3, 4]))
        assert got["total"] == [4.0, 6.0] and [str(w, "utf-8") for w in got["who"]] == ["x", "x"]
        assert (await infer(plane, np.array([[1.0, 3.0], [2.0, 4.0]], np.float32)))["total"] == [4.0, 6.0]
        for bad in ({"a": [1]}, {"a": ["x"], "b": [1]}, {"a": [1.0], "b": [2**40]}, {"a": [1], "b": [1.5]}):
            with pytest.raises(Invalid):
                await score(plane, bad)
        with pytest.raises(ScoringFailed, match="too much"):
            await score(plane, {"a": [1e7], "b": [1]})


async def test_tensors(tmp_path: Path, folders: dict[str, Any]) -> None:
    async with open_plane(tmp_path / "one", models=[folders["twice"]]) as plane:
        assert await score(plane, {"data": [[1, 2, 3]]}) == [[2.0, 4.0, 6.0]]
        got = await infer(plane, np.ones((2, 3)))
        assert got == {"output-0": [[2.0] * 3] * 2}
        with pytest.raises(Invalid):
            await score(plane, {"data": [[1, 2]]})
    async with open_plane(tmp_path / "two", models=[folders["named"]]) as plane:
        assert plane.about("named")[1].sample == folders["named"]["sample"]
        assert await score(plane, {"left": [[1, 2, 3]], "right": [[1, 1, 1]]}) == {"sum": [[2.0, 3.0, 4.0]]}
        got = await infer(plane, left=Tensor("left", np.ones((1, 3))), right=Tensor("right", np.ones((1, 3))))
        assert got == {"sum": [[2.0] * 3]}


async def test_without_a_signature(tmp_path: Path, folders: dict[str, Any]) -> None:
    async with open_plane(tmp_path, models=[folders["plain"]]) as plane:
        assert await score(plane, {"data": [[1, 2], [3, 4]]}) == ["ndarray 2"]
        assert await score(plane, {"columns": ["a"], "data": [[1], [3]]}) == ["DataFrame 2"]
        assert await score(plane, {"a": [1, 2, 3]}) == ["DataFrame 3"]


async def test_what_does_not_start(tmp_path: Path, folders: dict[str, Any]) -> None:
    with pytest.raises(CannotStart, match=r"model sum:1.*trusted: true"):
        async with open_plane(tmp_path / "a", models=[{**folders["sum"], "trusted": False}]):
            pass
    with pytest.raises(CannotStart, match=r"sum:1 cannot score its own sample.*too much"):
        async with open_plane(tmp_path / "b", models=[{**folders["sum"], "sample": {"a": [1e7], "b": [1]}}]):
            pass
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "MLmodel").write_text("flavors: {}\n")
    with pytest.raises(CannotStart, match="model m:1 cannot be loaded"):
        async with open_plane(tmp_path / "c", models=[{"name": "m", "version": 1, "file": tmp_path / "empty",
                                                       "framework": "mlflow", "trusted": True}]):
            pass
    async with open_plane(tmp_path / "d", models=[{**folders["sum"], "sample": {"data": [["x", "y"]]}}]) as plane:
        assert await score(plane, {"a": [1], "b": [1]}) == {"total": [2.0], "who": ["x"]}


def test_mlflows_own_dictionary_is_a_signature() -> None:
    import pandas as pd
    from mlflow.models import infer_signature

    said = infer_signature(pd.DataFrame({"a": [1.0]}), np.ones((2, 3))).to_dict()
    assert normal(said) == {"inputs": [{"name": "a", "datatype": "FP64", "shape": [-1]}],
                            "outputs": [{"name": "output-0", "datatype": "FP64", "shape": [-1, 3]}]}
