"""TorchScript and exported programs, run by PyTorch itself where it is installed: for Linux the package index has it
with CUDA only, gigabytes, so the project's own tests do not bring it. Debian's ``python3-torch`` is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.core.errors import Invalid
from modelyard.core.inference import read_response
from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import ScoringFailed
from modelyard.scoring.runners import CannotStart
from tests.unit.scoring.planes import grpc_call, infer, open_plane, score

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
GOLDEN = Path(__file__).parents[1] / "golden" / "torch"
X = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
BIAS = np.array([[10.0], [20.0]], np.float32)


def entry(file: Path, **more: Any) -> dict[str, Any]:
    return {"name": "m", "version": 1, "file": file, "framework": "pytorch", **more}


class Writing(torch.nn.Module):
    """Writes into its input."""

    def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
        return x.mul_(2)


class Looked(torch.nn.Module):
    """Takes whole numbers, gives what numpy has no type for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))

    def forward(self, ids: torch.Tensor, scale: float = 1.0):  # type: ignore[no-untyped-def]
        return (self.rows(ids) * scale).to(torch.bfloat16)


class Mean(torch.nn.Module):
    """Its rows depend on each other."""

    def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
        return x - x.mean(0)


class Odd(torch.nn.Module):
    def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
        return {"n": x.shape[0]}


class Listed(torch.nn.Module):
    def forward(self, xs: list[torch.Tensor]):  # type: ignore[no-untyped-def]
        return xs[0]


def saved(folder: Path, module: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.script(module.eval()).save(folder / "model.pt")
    return entry(folder / "model.pt")


async def test_torchscript(tmp_path: Path) -> None:
    said = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}, {"name": "bias", "datatype": "FP32"}],
            "outputs": [{"name": "output-0", "datatype": "FP32", "shape": [-1, 1]}, {"name": "output-1"}]}
    for n, signature in enumerate(({}, said)):
        model = entry(GOLDEN / "script.pt", signature=signature)
        async with open_plane(tmp_path / str(n), models=[model]) as plane:
            runner = plane.about("m")[1]
            assert (runner.platform, runner.batched, [s.name for s in runner.inputs]) == (
                "pytorch_libtorch", True, ["x", "bias"])
            expected = {"output-0": [[15.5], [31.5]], "output-1": X.tolist()}
            assert await infer(plane, x=X, bias=BIAS) == expected
            assert await infer(plane, x=X.astype("f8"), bias=BIAS.astype(">f4")) == expected
            assert await score(plane, {"x": X.tolist(), "bias": BIAS.tolist()}) == expected
            calls = [grpc_call("m", Tensor("x", X[n:n + 1]), Tensor("bias", BIAS[n:n + 1])) for n in (0, 1)]
            wrong = grpc_call("m", Tensor("x", X), Tensor("bias", BIAS), outputs=("no",))
            answers = await plane.handle([*calls, wrong])
            assert [a.status for a in answers] == ["OK", "OK", "INVALID_ARGUMENT"]
            for answer, row in zip(answers, ([15.5], [31.5]), strict=False):
                assert read_response(answer.body).tensors[0].array.tolist() == [row]
            with pytest.raises(Invalid, match="text"):
                await infer(plane, x=np.array([["a", "b"]]), bias=BIAS)
            with pytest.raises(Invalid if signature else ScoringFailed):
                await infer(plane, x=X[:, :1], bias=BIAS)
        assert runner.outputs == () if not signature else runner.outputs[0].shape == (-1, 1)


async def test_exported_programs(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match=r"m:1.*trusted: true"):
        async with open_plane(tmp_path / "no", models=[entry(GOLDEN / "program.pt2")]):
            pass
    async with open_plane(tmp_path / "yes", models=[entry(GOLDEN / "program.pt2", trusted=True)]) as plane:
        runner = plane.about("m")[1]
        assert [tuple(s) for s in runner.inputs] == [("x", "FP32", (-1, 2))] and runner.platform == "pytorch_export"
        assert await infer(plane, X) == {"logits": [[5.5], [11.5]], "best": [0, 0]}
        assert await score(plane, {"data": [[1, 2]]}) == {"logits": [[5.5]], "best": [0]}
        answers = await plane.handle([grpc_call("m", Tensor("x", X[:1]), outputs=("best",)),
                                      grpc_call("m", Tensor("x", X[:, :1]))])
        assert [a.status for a in answers] == ["OK", "INVALID_ARGUMENT"]
        assert [t.name for t in read_response(answers[0].body).tensors] == ["best"]


async def test_a_call_is_read_where_it_lies_and_never_written_to(tmp_path: Path) -> None:
    raw = X.tobytes()
    given = np.frombuffer(raw, "<f4").reshape(2, 2)
    async with open_plane(tmp_path / "w", models=[saved(tmp_path / "writing", Writing())]) as plane:
        assert (await infer(plane, Tensor("x", given)))["output-0"] == (X * 2).tolist()
        runner: Any = plane.about("m")[1]
        assert runner._writes and runner.predict({"x": given}, ())["output-0"].tolist() == (X * 2).tolist()
    assert raw == X.tobytes()
    async with open_plane(tmp_path / "s", models=[entry(GOLDEN / "script.pt")]) as plane:
        runner = plane.about("m")[1]
        assert np.shares_memory(runner.predict({"x": given, "bias": BIAS}, ())["output-1"], given)


async def test_types_that_come_and_go(tmp_path: Path) -> None:
    async with open_plane(tmp_path / "p", models=[saved(tmp_path / "looked", Looked())]) as plane:
        assert [s.name for s in plane.about("m")[1].inputs] == ["ids"]
        assert (await infer(plane, np.array([1, 0]))) == {"output-0": [[2.0, 3.0], [0.0, 1.0]]}
        assert await score(plane, {"data": [1]}) == [[2.0, 3.0]]


async def test_rows_that_depend_on_each_other_are_not_joined(tmp_path: Path) -> None:
    async with open_plane(tmp_path / "p", models=[saved(tmp_path / "mean", Mean())]) as plane:
        answers = await plane.handle([grpc_call("m", Tensor("x", X[n:n + 1])) for n in (0, 1)])
        assert [read_response(a.body).tensors[0].array.tolist() for a in answers] == [[[0.0, 0.0]]] * 2
        assert not plane.about("m")[1].batched


async def test_what_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for n, (model, told) in enumerate((
            (entry(GOLDEN / "weights.pt"), "cannot be loaded"), (entry(tmp_path / "junk.pt"), "cannot be loaded"),
            (saved(tmp_path / "listed", Listed()), "forward takes 'xs'"))):
        with pytest.raises(CannotStart, match=f"model m:1.*{told}") as error:
            async with open_plane(tmp_path / str(n), models=[model]):
                pass
        assert "\n" not in str(error.value)
    async with open_plane(tmp_path / "odd", models=[saved(tmp_path / "counts", Odd())]) as plane:
        with pytest.raises(ScoringFailed, match="'n' is a int, not a tensor"):
            await infer(plane, X)


async def test_threads_are_the_cores_that_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_THREADS", "1")
    async with open_plane(tmp_path, models=[entry(GOLDEN / "script.pt")]):
        assert (torch.get_num_threads(), torch.get_num_interop_threads()) == (1, 1)
