"""What a graph takes and gives is told as it is; what calls cannot carry does not become ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.inference import read_response
from modelyard.core.tensors import Tensor
from modelyard.scoring.runners import CannotStart
from tests.unit.scoring.planes import grpc_call, open_plane
from tests.unit.scoring.test_given import echo

ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]], np.float32)


def entry(file: Path) -> dict[str, Any]:
    return {"name": "m", "version": 1, "file": file, "framework": "onnx"}


def graph(folder: Path, operation: str, given: int, said: Any) -> Path:
    """One operation on x of a datatype of ONNX's; y as ``said``."""
    from onnx import helper, save_model

    attributes = {"to": said.type.tensor_type.elem_type} if operation == "Cast" else {}
    inside = helper.make_graph([helper.make_node(operation, ["x"], ["y"], **attributes)], "g",
                               [helper.make_tensor_value_info("x", given, ["n", 2])], [said])
    save_model(helper.make_model(inside, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
               folder / "graph.onnx")
    return folder / "graph.onnx"


async def test_a_graph_on_bfloat16_does_not_start(tmp_path: Path) -> None:
    from onnx import helper

    with pytest.raises(CannotStart, match=r"model m:1: its input 'x' is a tensor\(bfloat16\), which calls cannot"):
        async with open_plane(tmp_path / "in", models=[entry(echo(tmp_path, 16))]):
            pass
    cast = graph(tmp_path, "Cast", 1, helper.make_tensor_value_info("y", 16, ["n", 2]))
    with pytest.raises(CannotStart, match=r"its output 'y' is a tensor\(bfloat16\)"):
        async with open_plane(tmp_path / "out", models=[entry(cast)]):
            pass


async def test_probabilities_by_class_are_told_as_they_come(tmp_path: Path) -> None:
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(np.vstack([ROWS, ROWS * 2]), [0, 1, 1, 2])
    (tmp_path / "zip.onnx").write_bytes(to_onnx(model, ROWS[:1]).SerializeToString())
    async with open_plane(tmp_path, models=[entry(tmp_path / "zip.onnx")]) as plane:
        told = {slot.name: slot for slot in plane.about("m")[1].outputs}
        (answer,) = await plane.handle([grpc_call("m", Tensor("X", ROWS))])
        assert answer.error is None
        for tensor in read_response(answer.body).tensors:
            slot = told[tensor.name]
            assert tensor.datatype == slot.datatype and tensor.array.ndim == len(slot.shape)
        assert told["output_probability"] == ("output_probability", "FP64", (-1, -1))
        np.testing.assert_allclose(tensor.array, model.predict_proba(ROWS), atol=1e-5)


async def test_a_sequence_of_tensors_is_not_told(tmp_path: Path) -> None:
    from onnx import helper

    said = helper.make_tensor_sequence_value_info("y", 1, None)
    async with open_plane(tmp_path, models=[entry(graph(tmp_path, "SequenceConstruct", 1, said))]) as plane:
        assert plane.about("m")[1].outputs == (("y", "", ()),)
        (answer,) = await plane.handle([grpc_call("m", Tensor("x", ROWS[:, :2].copy()))])
        assert read_response(answer.body).tensors[0].array.tolist() == [ROWS[:, :2].tolist()]
