"""LightGBM and XGBoost: native files, estimators in pickles, and what is wrong with either."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.inference import read_response
from modelyard.core.tensors import Tensor
from modelyard.scoring.runners import CannotStart
from tests.unit.scoring.planes import grpc_call, infer, open_plane, score

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same task for both: files by name, what the libraries themselves say, and some rows."""
    import joblib  # with these, what takes seconds to import: every worker reads this file
    import lightgbm
    import xgboost
    from sklearn.datasets import load_iris

    folder = tmp_path_factory.mktemp("trees")
    x, y = load_iris(return_X_y=True)
    light = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1, n_jobs=1).fit(x, y)
    extreme = xgboost.XGBClassifier(n_estimators=5, n_jobs=1).fit(x, y)
    light.booster_.save_model(folder / "model.txt")
    for name in ("model.json", "model.ubj"):
        extreme.save_model(folder / name)
    (folder / "model").write_bytes((folder / "model.json").read_bytes())
    joblib.dump(light, folder / "light.joblib")
    joblib.dump(extreme, folder / "extreme.joblib")
    joblib.dump(light.booster_, folder / "booster.pkl")
    rows = x[[0, 60, 120]]
    return {"folder": folder, "rows": rows, "light": light.booster_.predict(rows),
            "extreme": extreme.get_booster().inplace_predict(rows), "labels": light.predict(rows)}


def model(made: dict[str, Any], file: str, framework: str = "", **more: Any) -> dict[str, Any]:
    return {"name": "m", "version": 1, "file": made["folder"] / file, "framework": framework, **more}


@pytest.mark.parametrize(
    ("file", "framework", "expected"),
    [("model.txt", "lightgbm", "light"), ("booster.pkl", "lightgbm", "light"), ("model.json", "xgboost", "extreme"),
     ("model.ubj", "", "extreme"), ("model", "xgboost", "extreme")],
)
async def test_boosters(tmp_path: Path, made: dict[str, Any], file: str, framework: str, expected: str) -> None:
    async with open_plane(tmp_path, models=[model(made, file, framework, trusted=file.endswith("pkl"))]) as plane:
        rows, wanted = made["rows"], made[expected]
        np.testing.assert_allclose((await infer(plane, rows))["predict"], wanted, rtol=1e-6)
        np.testing.assert_allclose(await score(plane, {"data": rows.tolist()}), wanted, rtol=1e-6)
        answers = await plane.handle([grpc_call("m", Tensor("x", rows[n : n + 1])) for n in range(3)])
        for answer, row in zip(answers, wanted, strict=True):
            np.testing.assert_allclose(read_response(answer.body).tensors[0].array, [row], rtol=1e-6)
        assert plane._lanes[0].runner.batched
        bad = [Tensor("x", rows[:, :3]), Tensor("x", rows[0]), Tensor("x", np.array([["a"] * 4]))]
        answers = await plane.handle(
            [*(grpc_call("m", t) for t in bad), grpc_call("m", Tensor("x", rows), outputs=("no",)),
             grpc_call("m", Tensor("x", (rows * 10).astype("i8")))])
        assert [a.status for a in answers] == ["INVALID_ARGUMENT"] * 4 + ["OK"]
        assert plane.about("m")[1].platform == (framework or "xgboost")


@pytest.mark.parametrize(("file", "framework"), [("light.joblib", "lightgbm"), ("extreme.joblib", "xgboost")])
async def test_estimators(tmp_path: Path, made: dict[str, Any], file: str, framework: str) -> None:
    with pytest.raises(CannotStart, match="trusted"):
        async with open_plane(tmp_path / "no", models=[model(made, file, framework)]):
            pass
    async with open_plane(tmp_path / "yes", models=[model(made, file, framework, trusted=True)]) as plane:
        assert (await infer(plane, made["rows"]))["predict"] == made["labels"].tolist()
        asked = grpc_call("m", Tensor("x", made["rows"]), outputs=("predict_proba",))
        assert read_response((await plane.handle([asked]))[0].body).tensors[0].array.shape == (3, 3)


@pytest.mark.slow
async def test_an_mlflow_folder_answers_as_what_was_logged(tmp_path: Path) -> None:
    """The file of a classifier and of its booster is the same, and what they answer is not."""
    import mlflow.xgboost
    import xgboost
    from sklearn.datasets import load_iris

    x, y = load_iris(return_X_y=True)
    logged = xgboost.XGBClassifier(n_estimators=5, n_jobs=1).fit(x, y)
    for name, what in (("classifier", logged), ("booster", logged.get_booster())):
        mlflow.xgboost.save_model(what, str(tmp_path / name), pip_requirements=["xgboost-cpu"])
        given = {"name": "m", "version": 1, "file": tmp_path / name, "framework": "mlflow"}
        async with open_plane(tmp_path / f"root-{name}", models=[given]) as plane:
            answer = await infer(plane, x[[0, 60, 120]])
            ask = logged.predict if name == "classifier" else what.inplace_predict
            expected = ask(x[[0, 60, 120]])
            assert np.allclose(answer["predict"], expected) and np.shape(answer["predict"]) == expected.shape


@pytest.mark.parametrize("framework", ["lightgbm", "xgboost"])
async def test_files_that_are_none(tmp_path: Path, files: dict[str, Path], framework: str) -> None:
    with pytest.raises(CannotStart, match="cannot be loaded") as error:
        async with open_plane(tmp_path, models=[{"name": "m", "version": 1, "file": files["onnx"],
                                                 "framework": framework}]):
            pass
    assert "\n" not in str(error.value)
