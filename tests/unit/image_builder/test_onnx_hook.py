"""The program that makes ONNX of a scikit-learn model: it takes only what answers as scikit-learn does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelyard.image_builder import parts

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
    assert said["precision"] == "float32" and graph and "nan" not in said["refusals"], said
    x[::7, 2] = float("nan")  # thresholds of infinity then: all but NaN to the left
    said, graph = offered(tmp_path / "gaps", RandomForestClassifier(5, random_state=0).fit(x, y), sample)
    assert graph, said
    x, y = load_iris(return_X_y=True)
    scaled = make_pipeline(StandardScaler(), DecisionTreeClassifier(random_state=0)).fit(x, y)
    said, graph = offered(tmp_path / "scaled", scaled, sample)
    assert "predict is another in" in said["why"] and not graph, said  # scaled in single precision, then compared
