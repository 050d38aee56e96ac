"""Run inside the sandbox, by the Python of the converter's own environment: a scikit-learn model becomes ONNX, where
that answers as scikit-learn does.

``python onnx_hook.py MODEL ASKED OUT``: ``ASKED`` is a file of JSON, ``{"sample", "trusted"}``. ``OUT/report.json``
says ``{"why"}``, or what was compared, and then ``OUT/model.onnx`` is there. Nothing of what it says is trusted.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np

RTOL, ATOL, SEED, ROWS = 1e-4, 1e-5, 20_240_601, 512
OPSETS = {"": 18, "ai.onnx.ml": 3}
METHODS = ("predict", "predict_proba")


class Refused(Exception):
    """The model stays with scikit-learn; why."""


def main(model: Path, asked: Path, out: Path) -> None:
    """Never fails: what goes wrong is the reason."""
    warnings.simplefilter("ignore")
    try:
        told = json.loads(asked.read_bytes())
        graph, report = converted(load(model, told["trusted"]), told["sample"])
        (out / "model.onnx").write_bytes(graph)
    except Refused as exc:
        report = {"why": str(exc)}
    except Exception as exc:  # noqa: BLE001 - of the model's own code, or the converter's
        report = {"why": f"{type(exc).__name__}: {exc}".replace("\n", " ")[:300]}
    (out / "report.json").write_text(json.dumps(report, sort_keys=True))


def load(path: Path, trusted: bool) -> Any:
    """The estimator. A pickle runs what it holds: here is where it may."""
    if path.suffix != ".skops":
        import joblib

        if not trusted:
            raise Refused("it is a pickle that nobody trusts")
        return joblib.load(path)
    import skops.io

    unknown = skops.io.get_untrusted_types(file=path)
    if unknown and not trusted:
        raise Refused(f"it holds types that are not trusted: {', '.join(unknown)}")
    return skops.io.load(path, trusted=unknown)


def converted(model: Any, sample: Any) -> tuple[bytes, dict[str, Any]]:
    """The first graph that answers as the model: in double precision where the converter has it, else in single."""
    columns = getattr(model, "n_features_in_", None)
    if not isinstance(columns, int):
        raise Refused("the number of its columns is not known")
    rows = compared_rows(columns, sample)
    wanted = {name: np.asarray(getattr(model, name)(rows)) for name in METHODS if hasattr(model, name)}
    if any(len(value) != len(rows) for value in wanted.values()):
        raise Refused("its outputs do not go row by row")
    reasons = []
    for dtype in (np.float64, np.float32):
        try:
            graph = onnx_of(model, columns, dtype)
            worst = differences(wanted, answers(graph, rows, dtype, wanted))
        except Refused as exc:
            reasons.append(str(exc))
        except Exception as exc:  # noqa: BLE001 - the converter raises what it likes
            reasons.append(f"it does not convert: {type(exc).__name__}: {exc}".replace("\n", " ")[:300])
        else:
            return graph, {"precision": np.dtype(dtype).name, "rows": len(rows), "largest": worst, "columns": columns}
    raise Refused(reasons[-1])


def compared_rows(columns: int, sample: Any) -> np.ndarray:
    """The sample's rows, then rows about it, or about zero, in several widths: the same ones every time."""
    given = sample.get("data") if isinstance(sample, dict) else sample
    own = np.empty((0, columns)) if given is None else np.asarray(given, np.float64)
    if own.ndim != 2 or own.shape[1] != columns:
        raise Refused(f"its sample does not fit it: it takes rows of {columns} numbers")
    draw = np.random.Generator(np.random.PCG64(SEED))
    middle = own.mean(axis=0) if len(own) else np.zeros(columns)
    width = np.where(middle == 0, 1.0, np.abs(middle)) * np.repeat((0.01, 0.3, 1.0, 3.0), ROWS // 4)[:, None]
    made = middle + width * draw.standard_normal((ROWS, columns))
    return np.concatenate([own, made, np.round(made, 1), np.zeros((1, columns)), np.ones((1, columns))])


def onnx_of(model: Any, columns: int, dtype: type) -> bytes:
    """The graph, the same bytes every time."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType

    kind = DoubleTensorType if dtype is np.float64 else FloatTensorType
    options = {id(model): {"zipmap": False}} if hasattr(model, "predict_proba") else None
    made = to_onnx(model, initial_types=[("input_0", kind([None, columns]))], options=options, target_opset=OPSETS,
                   name="scikit-learn")
    return bytes(made.SerializeToString(deterministic=True))


def answers(graph: bytes, rows: np.ndarray, dtype: type, wanted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = session.run(None, {"input_0": rows.astype(dtype)})
    if len(given) < len(wanted):
        raise Refused(f"its graph has {len(given)} outputs, not {len(wanted)}")
    return {name: np.asarray(value).reshape(wanted[name].shape)
            for name, value in zip(wanted, given, strict=False)}


def differences(wanted: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> float:
    """The largest one; Refused where it is over the tolerance, or a label is another."""
    worst = 0.0
    for name, right in wanted.items():
        if right.dtype.kind != "f":
            if wrong := int((given[name] != right).sum()):
                raise Refused(f"{name} is another in {wrong} of {len(right)} rows")
            continue
        off = np.abs(given[name] - right)
        allowed = RTOL * np.abs(right) + ATOL * min(1.0, float(np.abs(right).max()))
        if not (off <= allowed).all():
            raise Refused(f"{name} is off by up to {off.max():.3g} in {int((~(off <= allowed)).sum())} values")
        worst = max(worst, float(off.max()))
    return worst


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
