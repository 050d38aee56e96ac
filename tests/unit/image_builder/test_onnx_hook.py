"""The program that makes ONNX of a scikit-learn model: it takes only what answers as scikit-learn does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.image_builder import parts
from modelyard.scoring.graph_estimator import GraphEstimator
from modelyard.scoring.image import Model

pytestmark = pytest.mark.slow
HOOK = Path(parts.__file__).with_name("onnx_hook.py")


def offered(folder: Path, model: Any, sample: Any = None, seed: str = "0") -> tuple[dict[str, Any], bytes]:
    """What the hook says of a model, and its graph."""
    import joblib

    folder.mkdir(exist_ok=True)
    joblib.dump(model, folder / "model.joblib")
    (folder / "asked.json").write_text(json.dumps({"sample": sample, "trusted": True}))
    subprocess.run([sys.executable, str(HOOK), str(folder / "model.joblib"), str(folder / "asked.json"), str(folder)],
                   check=True, timeout=120, env={**os.environ, "PYTHONHASHSEED": seed})
    graph = folder / "model.onnx"
    return json.loads((folder / "report.json").read_text()), graph.read_bytes() if graph.exists() else b""


def test_what_answers_the_same_is_taken_and_is_the_same_bytes(tmp_path: Path) -> None:
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = load_iris(return_X_y=True)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    one, graph = offered(tmp_path / "one", model, {"data": x[:2].tolist()}, "1")
    two, again = offered(tmp_path / "two", model, {"data": x[:2].tolist()}, "2")
    assert one == two and graph and graph == again
    assert one["precision"] == "float64" and one["largest"] < 1e-6, one  # scikit-learn scales FP32 as such


def test_what_differs_or_does_not_convert_is_refused_with_the_reason(tmp_path: Path) -> None:
    from sklearn.datasets import load_iris
    from sklearn.neighbors import NearestCentroid
    from sklearn.svm import SVC

    x, y = load_iris(return_X_y=True)
    far = x + 1e6  # single precision has steps of 0.06 there, and the graph of an SVC computes in it
    said, graph = offered(tmp_path / "differs", SVC().fit(far, y), {"data": far.tolist()})
    assert "predict is another in" in said["why"] and not graph, said
    said, graph = offered(tmp_path / "unknown", NearestCentroid().fit(x, y))
    assert "does not convert" in said["why"] and not graph, said


def test_trees_and_regressors_are_taken_and_what_differs_somewhere_is_not(tmp_path: Path) -> None:
    from sklearn.datasets import load_diabetes, load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeClassifier

    x, y = load_iris(return_X_y=True)
    sample = {"data": x[:2].tolist()}
    said, graph = offered(tmp_path / "tree", DecisionTreeClassifier(random_state=0).fit(x, y), sample)
    assert said["rows"] > 3000 and graph and "nan" not in said["refusals"], said  # a tree takes NaN, and so the graph
    assert "float32" in said["refusals"]["large"], said
    said, graph = offered(tmp_path / "ridge", Ridge().fit(*load_diabetes(return_X_y=True)))
    assert said["precision"] == "float64" and graph and said["refusals"]["nan"].startswith("Input X contains NaN"), said
    forest = RandomForestClassifier(5, random_state=0).fit(x, y)
    said, graph = offered(tmp_path / "forest", forest, sample)  # NaN goes as the trees were fitted, in each
    assert said["precision"] == "float64" and graph and "nan" not in said["refusals"], said
    x[::7, 2] = float("nan")  # thresholds of infinity then: all but NaN to the left
    said, graph = offered(tmp_path / "gaps", RandomForestClassifier(5, random_state=0).fit(x, y), sample)
    assert graph, said
    x, y = load_iris(return_X_y=True)
    scaled = make_pipeline(StandardScaler(), DecisionTreeClassifier(random_state=0)).fit(x, y)
    said, graph = offered(tmp_path / "scaled", scaled, sample)
    assert "predict is another in" in said["why"] and not graph, said  # FP32 is scaled in single precision, and
    # what comes out is compared: the last digit decides


def hook() -> Any:
    spec = importlib.util.spec_from_file_location("onnx_hook", HOOK)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree_models() -> dict[str, Any]:
    """Fitted, with rows of their data: of one and of several outputs, with and without gaps in the data."""
    from sklearn import ensemble, tree
    from sklearn.datasets import load_diabetes, load_iris

    x, y = load_iris(return_X_y=True)
    gaps = x.copy()
    gaps[::7, 2] = np.nan
    rows, values = load_diabetes(return_X_y=True)
    both = np.stack([values, values**2], axis=1)
    few = {"random_state": 0, "n_estimators": 10}
    return {
        "forest": (ensemble.RandomForestClassifier(**few).fit(x, y), x),
        "forest with gaps": (ensemble.RandomForestClassifier(**few).fit(gaps, y), x),
        "votes": (ensemble.RandomForestClassifier(20, random_state=0).fit(x, y == 1), x),
        "text": (ensemble.RandomForestClassifier(**few).fit(x, np.array(["no", "yes", "may"])[y]), x),
        "extra trees": (ensemble.ExtraTreesClassifier(**few).fit(x, y), x),
        "boosting": (ensemble.GradientBoostingClassifier(**few).fit(x, y), x),
        "boosting of values": (ensemble.GradientBoostingRegressor(**few).fit(rows, values), rows),
        "histograms": (ensemble.HistGradientBoostingClassifier(max_iter=10).fit(x, y), x),
        "histograms with gaps": (ensemble.HistGradientBoostingClassifier(max_iter=10).fit(gaps, y == 1), x),
        "histograms of values": (ensemble.HistGradientBoostingRegressor(max_iter=10).fit(rows, values), rows),
        "forest of values": (ensemble.RandomForestRegressor(**few).fit(rows, values), rows),
        "two values": (ensemble.ExtraTreesRegressor(**few).fit(rows, both), rows),
        "tree of two values": (tree.DecisionTreeRegressor(random_state=0).fit(rows, both), rows),
        "tree": (tree.DecisionTreeClassifier(random_state=0).fit(gaps, y), x),
    }


def test_every_kind_of_tree_is_taken_also_at_its_thresholds_and_in_double_precision() -> None:
    """Where scikit-learn rounds to single precision, the graph of double precision compares as if it did."""
    program = hook()
    for name, (model, rows) in tree_models().items():
        graph, said = program.converted(model, {"data": rows[:5].tolist()})
        assert graph and said["precision"] == "float64", name
        assert said["rows"] > 3200, name  # those at thresholds, too


def test_a_graph_that_goes_another_way_only_at_a_threshold_is_refused() -> None:
    from sklearn.datasets import load_iris
    from sklearn.ensemble import HistGradientBoostingClassifier

    program = hook()
    x, y = load_iris(return_X_y=True)
    model = HistGradientBoostingClassifier(max_iter=10).fit(x, y)
    rows = program.compared_rows(4, {"data": x[:5].tolist()})
    graph = program.onnx_of(model, 4, np.float32)  # it compares in single precision, scikit-learn in double
    wanted = {"predict": model.predict(rows), "predict_proba": model.predict_proba(rows)}
    program.differences(wanted, program.answers(graph, rows, np.float32, wanted))
    near = program.rows_at_thresholds(model, rows)
    wanted = {"predict": model.predict(near), "predict_proba": model.predict_proba(near)}
    with pytest.raises(program.Refused):
        program.differences(wanted, program.answers(graph, near, np.float32, wanted))


@pytest.mark.parametrize("value", [0.0, 0.1, -0.1, 1.0, 1 / 3, 1e-45, -1e-45, 1e30, 0.5 + 2**-25, float("inf")])
def test_a_threshold_parts_the_numbers_as_scikit_learn_does(value: float) -> None:
    program = hook()
    for dtype in (np.float32, np.float64):
        last = program.threshold(value, dtype, "BRANCH_LEQ")
        assert np.float32(last) <= value
        if np.isfinite(last):
            over = np.nextafter(dtype(last), dtype(np.inf))
            assert not np.float32(over) <= value, (value, dtype)


def test_labels_of_any_kind_and_estimators_in_others_are_taken_and_what_is_not_is_told_plainly() -> None:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.compose import ColumnTransformer
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    program = hook()
    x, y = load_iris(return_X_y=True)
    sample = {"data": x[:5].tolist()}
    text, forest = np.array(["no", "yes", "may"])[y], RandomForestClassifier(5, random_state=0)
    for model in (make_pipeline(StandardScaler(), LogisticRegression()).fit(x, text),
                  LogisticRegression().fit(x, y == 1), MLPClassifier((4,), max_iter=20, random_state=0).fit(x, y),
                  CalibratedClassifierCV(forest).fit(x, y),
                  make_pipeline(ColumnTransformer([("some", StandardScaler(), [0, 1])], remainder="passthrough"),
                                LogisticRegression()).fit(x, y)):
        graph, said = program.converted(model, sample)
        assert graph and said["outputs"]["predict"]["dtype"] == model.predict(x[:1]).dtype.str, model
    rows = np.array([[1.0, "a"], [2.0, "b"], [3.0, "a"]], dtype=object)
    mixed = make_pipeline(ColumnTransformer([("number", StandardScaler(), [0]), ("text", OneHotEncoder(), [1])]),
                          LogisticRegression()).fit(rows, [0, 1, 0])
    with pytest.raises(program.Refused, match="its sample is not of numbers alone"):
        program.converted(mixed, {"data": rows.tolist()})
    with pytest.raises(program.Refused, match="several questions at once"):
        program.converted(forest.fit(x, np.stack([y, y == 1], axis=1)), sample)


def test_what_serves_a_graph_answers_a_number_between_two_singles_as_the_estimator(tmp_path: Path) -> None:
    """Rows that were not compared when it was made: beside every threshold, as FP64 and FP32, with NaN and without."""
    program = hook()
    for name, (model, rows) in tree_models().items():
        graph, said = program.converted(model, {"data": rows[:5].tolist()})
        (tmp_path / "model.onnx").write_bytes(graph)
        ours = GraphEstimator(Model(name="it", version="1", path=tmp_path / "model.onnx", answers=said))
        near = program.rows_at_thresholds(model, rows[5:])
        gaps = near.copy()
        gaps[::2, 0] = np.nan
        for asked in (near, near.astype(np.float32), *([] if "nan" in said["refusals"] else [gaps])):
            right, given = model.predict(asked), ours.predict(asked)
            assert given.dtype == right.dtype, name
            if right.dtype.kind == "f":
                np.testing.assert_allclose(given, right, rtol=1e-5, err_msg=name)
            else:
                assert (given == right).all(), name
        if "nan" in said["refusals"]:
            with pytest.raises(ValueError, match="NaN"):
                ours.predict(gaps)
