"""What flavours say of an input that does not fit: which tensor it is, and nothing is changed to make it fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.errors import Invalid
from modelyard.core.tensors import Tensor
from tests.unit.scoring.planes import infer, open_plane, score

BYTES = np.array([[b"fine", "é".encode()], [b"caf\xe9", b""]], object)


def echo(folder: Path, kind: int) -> Path:
    """A graph that gives its only input x back as y, of a datatype of ONNX's."""
    from onnx import helper, save_model

    said = [helper.make_tensor_value_info(name, kind, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", said[:1], said[1:])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
               folder / "echo.onnx")
    return folder / "echo.onnx"


def encoder(folder: Path) -> Path:
    """A scikit-learn pipeline on text."""
    import joblib
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    rows = np.array([["fine", "é"], ["bad", ""]], object)
    joblib.dump(make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(rows, [0, 1]),
                folder / "text.joblib")
    return folder / "text.joblib"


@pytest.mark.parametrize("flavour", ["onnx", "scikit-learn"])
async def test_bytes_that_are_no_text_are_refused(tmp_path: Path, flavour: str) -> None:
    file = echo(tmp_path, 8) if flavour == "onnx" else encoder(tmp_path)
    model: dict[str, Any] = {"name": "m", "version": 1, "file": file, "framework": flavour, "trusted": True}
    async with open_plane(tmp_path, models=[model]) as plane:
        with pytest.raises(Invalid, match=r"tensor 'x': the model takes text in UTF-8.*0xe9"):
            await infer(plane, x=Tensor("x", BYTES))
        answer = await infer(plane, x=Tensor("x", BYTES[:1]))
        assert answer == ({"y": BYTES[:1].tolist()} if flavour == "onnx" else {"predict": [0]})


def forest(folder: Path, framework: str) -> Path:
    """A small model of four columns."""
    x, y = np.arange(80.0).reshape(20, 4), np.arange(20) % 2
    if framework == "scikit-learn":
        import skops.io
        from sklearn.linear_model import LogisticRegression

        skops.io.dump(LogisticRegression().fit(x, y), folder / "m.skops")
        return folder / "m.skops"
    if framework == "lightgbm":
        import lightgbm

        lightgbm.LGBMClassifier(n_estimators=2, verbose=-1, n_jobs=1).fit(x, y).booster_.save_model(folder / "m.txt")
        return folder / "m.txt"
    import xgboost

    xgboost.XGBClassifier(n_estimators=2, n_jobs=1).fit(x, y).save_model(folder / "m.json")
    return folder / "m.json"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("framework", ["scikit-learn", "lightgbm", "xgboost"])
async def test_a_wrong_shape_is_told_with_the_tensor_s_name(tmp_path: Path, framework: str) -> None:
    model = {"name": "m", "version": 1, "file": forest(tmp_path, framework), "framework": framework}
    shape = r"the model takes rows of 4 numbers, shape \[n, 4\]; it was given shape \[1, 3\]"
    async with open_plane(tmp_path, models=[model]) as plane:
        with pytest.raises(Invalid, match=f"tensor 'petals': {shape}"):
            await infer(plane, petals=np.zeros((1, 3)))
        with pytest.raises(Invalid, match=f"tensor 'data': {shape}"):
            await score(plane, {"data": [[1, 2, 3]]})
        if framework != "scikit-learn":
            with pytest.raises(Invalid, match="tensor 'petals': the model takes numbers, not text"):
                await infer(plane, petals=np.array([["a"] * 4]))
