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
from collections.abc import Iterator
from contextlib import suppress
from functools import partial, partialmethod
from itertools import chain
from pathlib import Path
from typing import Any

os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np

RTOL, ATOL, SEED, ROWS, THRESHOLDS = 1e-4, 1e-5, 20_240_601, 512, 300
OPSETS = {"": 18, "ai.onnx.ml": 3}
METHODS = ("predict", "predict_proba")
NAMES = 50_000
"""Characters of its columns' names that a report has room for."""
VOTES, ADD = "votes", "add_tree_to_attribute_pairs"
TREES = (("TreeEnsembleClassifier",), ("TreeEnsembleRegressor",))


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
    names = [str(name) for name in getattr(model, "feature_names_in_", ())]
    if sum(map(len, names)) > NAMES:
        raise Refused("the names of its columns are too long to be kept")
    refusals = refused(model, columns)
    rows = compared_rows(columns, sample)
    asked = requests(np.concatenate([rows, rows_at_thresholds(model, rows)]), refusals)
    said = [{name: getattr(model, name)(rows) for name in METHODS if hasattr(model, name)} for rows in asked]
    if any(isinstance(value, list) for one in said for value in one.values()):
        raise Refused("it answers several questions at once, with probabilities for each")
    wanted = [{name: np.asarray(value) for name, value in one.items()} for one in said]
    if any(len(value) != len(rows) for rows, one in zip(asked, wanted, strict=True) for value in one.values()):
        raise Refused("its outputs do not go row by row")
    outputs = [{name: {"dtype": value.dtype.str, "row": value.shape[1:]} for name, value in one.items()}
               for one in wanted]
    if any(one != outputs[0] for one in outputs):
        raise Refused("the type of its outputs depends on that of its input")
    classes = getattr(model, "classes_", None)
    report = {"outputs": outputs[0], "refusals": refusals, "columns": columns, "names": names,
              "rows": sum(map(len, asked)), "classes": len(classes) if isinstance(classes, np.ndarray) else None}
    reasons = []
    for dtype in (np.float64, np.float32):
        try:
            graph = onnx_of(model, columns, dtype)
            worst = max(differences(one, answers(graph, rows, dtype, one))
                        for rows, one in zip(asked, wanted, strict=True))
        except Refused as exc:
            reasons.append(str(exc))
        except Exception as exc:  # noqa: BLE001 - the converter raises what it likes
            reasons.append(f"it does not convert: {type(exc).__name__}: {exc}".replace("\n", " ")[:300])
        else:
            return graph, {**report, "precision": np.dtype(dtype).name, "largest": worst}
    raise Refused(reasons[-1])


def refused(model: Any, columns: int) -> dict[str, str]:
    """What the model refuses, and its words for it: a graph would answer."""
    whole = np.ones((1, columns))
    tried = {"nan": whole * np.nan, "inf": whole * np.inf, "inf of float32": (whole * np.inf).astype(np.float32),
             "large": whole * 1e300, "over float32": whole * 1e39, "none": whole[:0],
             "text": np.array([["1.5"] * columns])}
    found = {}
    for name, rows in tried.items():
        try:
            model.predict(rows)
        except (ValueError, TypeError) as exc:
            found[name] = str(exc)[:2000]
    if ("large" in found) != ("over float32" in found):
        raise Refused("what is too large for it is not known")
    if "none" not in found:
        raise Refused("it answers where there are no rows")
    return found


def requests(rows: np.ndarray, refusals: dict[str, str]) -> list[np.ndarray]:
    """The rows as callers send them: FP64, with the odd values that the model takes in each column; FP32; INT64."""
    odd = [value for name, values in (("nan", [np.nan]), ("inf", [np.inf, -np.inf]), ("large", [1e300, -1e300]))
           if name not in refusals for value in values]
    more = np.repeat(rows[:1], len(odd) * rows.shape[1], axis=0)
    for number, value in enumerate(odd):
        for column in range(rows.shape[1]):
            more[number * rows.shape[1] + column, column] = value
    whole = np.clip(np.rint(rows), -2**53, 2**53).astype(np.int64)
    return [np.concatenate([rows, more]), rows.astype(np.float32), whole]


def compared_rows(columns: int, sample: Any) -> np.ndarray:
    """The sample's rows, then rows about it, or about zero, in several widths: the same ones every time."""
    given = sample.get("data") if isinstance(sample, dict) else sample
    try:
        own = np.empty((0, columns)) if given is None else np.asarray(given, np.float64)
    except ValueError as exc:
        raise Refused("its sample is not of numbers alone: only what takes rows of numbers is converted") from exc
    if own.ndim != 2 or own.shape[1] != columns:
        raise Refused(f"its sample does not fit it: it takes rows of {columns} numbers")
    draw = np.random.Generator(np.random.PCG64(SEED))
    middle = own.mean(axis=0) if len(own) else np.zeros(columns)
    width = np.where(middle == 0, 1.0, np.abs(middle)) * np.repeat((0.01, 0.3, 1.0, 3.0), ROWS // 4)[:, None]
    made = middle + width * draw.standard_normal((ROWS, columns))
    return np.concatenate([own, made, np.round(made, 1), np.zeros((1, columns)), np.ones((1, columns))])


def rows_at_thresholds(model: Any, rows: np.ndarray) -> np.ndarray:
    """Rows that reach a node of a tree with its own threshold, what single precision makes of it, and what lies next
    to both in either precision: of at most THRESHOLDS nodes, spread over all trees."""
    found = [one for tree in trees_of(model) for one in nodes_of(tree)]
    made = []
    for at, (column, value, low, high) in enumerate(found[:: -(-len(found) // THRESHOLDS) or 1]):
        single = np.float32(threshold(value, np.float32, ""))
        after = np.nextafter(single, np.float32(np.inf))
        middle = (np.float64(single) + np.float64(after)) / 2
        around = [single, np.nextafter(single, np.float32(-np.inf)), after]
        for one in (value, middle):
            around += [one, np.nextafter(one, -np.inf), np.nextafter(one, np.inf)]
        row = rows[at % len(rows)]
        if column < len(row) and len(low) <= len(row):
            fit = row[:len(low)]
            below = np.where(np.isfinite(low), low, 0.0)
            fit = np.where(fit > low, fit, below + 1e-3 * (1 + np.abs(below)))
            row = np.concatenate([np.minimum(fit, high), row[len(low):]])
            row = np.repeat(row[None], len(around), axis=0)
            row[:, column] = around
            made.append(row[(np.abs(row) < np.finfo(np.float32).max).all(axis=1)])
    if not made:
        return rows[:0]
    scaled = np.concatenate(made)
    try:
        return np.concatenate([scaled, model[:-1].inverse_transform(scaled)])  # what a pipeline's steps make that of
    except Exception:  # noqa: BLE001 - no pipeline, or nothing that goes back
        return scaled


def trees_of(model: Any) -> Iterator[tuple[np.ndarray, ...]]:
    """Left, right, column and threshold by node, of every tree in the estimator, or in what it is made of."""
    if (tree := getattr(model, "tree_", None)) is not None:
        yield tree.children_left, tree.children_right, tree.feature, tree.threshold
    for one in chain.from_iterable(getattr(model, "_predictors", [])):
        nodes, names = one.nodes, one.nodes.dtype.names
        yield (np.where(nodes["is_leaf"], -1, nodes["left"].astype(int)), nodes["right"].astype(int),
               nodes["feature_idx"].astype(int), nodes["num_threshold" if "num_threshold" in names else "threshold"])
    parts = getattr(model, "estimators_", [])
    parts = parts.ravel() if isinstance(parts, np.ndarray) else parts
    named = [part for _, part in getattr(model, "steps", [])]
    more = [getattr(model, name, None) for name in ("estimator", "best_estimator_")]
    more += getattr(model, "calibrated_classifiers_", [])
    for part in (one for one in (*parts, *named, *more) if one is not None):
        yield from trees_of(part)


def nodes_of(tree: tuple[np.ndarray, ...]) -> Iterator[tuple[int, float, np.ndarray, np.ndarray]]:
    """By node that compares: its column and threshold, and between what numbers a row must lie to come there."""
    left, right, column, value = tree
    wide = np.full(int(max(column.max(), 0)) + 1, np.inf)
    todo = [(0, -wide, wide)]
    while todo:
        node, low, high = todo.pop()
        if left[node] < 0:
            continue
        yield int(column[node]), float(value[node]), low, high
        below, above = high.copy(), low.copy()
        below[column[node]] = above[column[node]] = value[node]
        todo += [(int(right[node]), above, high), (int(left[node]), low, below)]


def onnx_of(model: Any, columns: int, dtype: type) -> bytes:
    """The graph, the same bytes every time."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType

    kind = DoubleTensorType if dtype is np.float64 else FloatTensorType
    options = {id(model): {"zipmap": False}} if hasattr(model, "predict_proba") else None
    with suppress(ImportError, AttributeError):  # of another version's insides: what comes of it is compared anyway
        mend_trees()
    made = to_onnx(model, initial_types=[("input_0", kind([None, columns]))], options=options, target_opset=OPSETS,
                   name="scikit-learn")
    for output in made.graph.output:
        for size in output.type.tensor_type.shape.dim[1:]:  # it says 1 where a tree has several outputs
            size.ClearField("dim_value")
    if dtype is np.float64 and any(node.op_type.startswith("TreeEnsemble") for node in made.graph.node):
        for output in made.graph.output:
            kind = output.type.tensor_type
            kind.elem_type = 11 if kind.elem_type == 1 else kind.elem_type  # double, as add_node has it
    return bytes(made.SerializeToString(deterministic=True))


def mend_trees() -> None:
    """The converter's trees send NaN to the right always, where scikit-learn's send it as they were fitted; it looks
    for ever for what stands for a threshold of infinity (all but NaN to the left); thresholds in double precision are
    rounded to single; and a vote of 50 of 100 trees is no half, in a sum of hundredths."""
    import skl2onnx.common.tree_ensemble as trees
    from skl2onnx.common._container import ModelComponentContainer

    add, nan = getattr(trees, ADD), "nodes_missing_value_tracks_true"
    if add.__module__ != trees.__name__:
        return

    def added(attributes: dict[str, Any], is_classifier: bool, tree: Any, tree_id: int, weight: float, *more: Any,
              **named: Any) -> None:
        votes = is_classifier and weight < 1 and more[1:2] == (True,)
        add(attributes, is_classifier, tree, tree_id, 1.0 if votes else weight, *more, **named)
        if votes:
            attributes[VOTES] = round(1 / weight)
        nodes = tree.__getstate__()["nodes"]
        if "missing_go_to_left" in nodes.dtype.names:
            attributes[nan][-len(nodes):] = nodes["missing_go_to_left"].astype(int).tolist()

    for module in [m for name, m in sys.modules.items() if name.startswith("skl2onnx.")]:
        if getattr(module, ADD, None) is add:
            setattr(module, ADD, added)
            for one in vars(module).values():
                if (said := getattr(one, "__defaults__", None) or ())[:1] in TREES:
                    one.__defaults__ = (*said[:2], 3)  # the operator's first version with double precision
    trees.sklearn_threshold = threshold
    ModelComponentContainer.add_node = partialmethod(add_node, ModelComponentContainer.add_node)


def add_node(self: Any, before: Any, kind: str, inputs: Any, outputs: Any, *more: Any, **named: Any) -> None:
    """In place of the converter's own (``before``): trees keep their double precision, and a forest counts votes."""
    if not kind.startswith("TreeEnsemble"):
        before(self, kind, inputs, outputs, *more, **named)
        return
    from onnx import TensorProto, helper

    count, outputs = named.pop(VOTES, None), [outputs] if isinstance(outputs, str) else list(outputs)
    double = getattr(named.get("nodes_values"), "dtype", None) == np.float64
    for name in ("nodes_values", "class_weights", "target_weights", "base_values"):
        if double and name in named:
            value = np.asarray(named.pop(name), np.float64).ravel()
            named[f"{name}_as_tensor"] = helper.make_tensor(name, TensorProto.DOUBLE, value.shape, value)
    wanted = outputs[-1]
    if double:
        named["op_version"] = 3
        outputs[-1] = f"{wanted}_single"
        before(self, "Cast", [outputs[-1]], [wanted], name=f"{wanted}_cast", to=TensorProto.DOUBLE, op_version=13)
    if count is None:
        before(self, kind, inputs, outputs, *more, **named)
    else:
        vote(partial(before, self), count, inputs, outputs, more, named)


def vote(add: Any, count: int, inputs: Any, outputs: list[str], more: Any, named: dict[str, Any]) -> None:
    """A forest's classes, by the sum of its trees' shares, which is exact where leaves are pure: the first of the
    largest, as scikit-learn has it."""
    from onnx import TensorProto as Types
    from onnx import helper

    texts = "classlabels_strings" in named
    labels = named.pop("classlabels_strings", None) or named.pop("classlabels_int64s")
    two, stem = len(labels) == 2, f"{outputs[-1]}_votes"
    named.pop("post_transform", None)
    named = {name.replace("class_", "target_"): value for name, value in named.items()}
    add("TreeEnsembleRegressor", inputs, [f"{stem}_second" if two else stem], *more,
        n_targets=1 if two else len(labels), **named)
    constants = {"count": ([], Types.FLOAT, [float(count)]),
                 "labels": ([len(labels)], Types.STRING if texts else Types.INT64, labels)}
    for name, (shape, kind, value) in constants.items():
        value = [one.encode() for one in value] if kind == Types.STRING else value
        add("Constant", [], [f"{stem}_{name}"], name=f"{stem}_{name}", op_version=13,
            value=helper.make_tensor(name, kind, shape, value))
    steps = [("Div", [stem, f"{stem}_count"], outputs[-1], {}),
             ("ArgMax", [stem], f"{stem}_first", {"axis": 1, "keepdims": 0}),
             ("Gather", [f"{stem}_labels", f"{stem}_first"], outputs[0], {})]
    if two:
        steps[:0] = [("Sub", [f"{stem}_count", f"{stem}_second"], f"{stem}_other", {}),
                     ("Concat", [f"{stem}_other", f"{stem}_second"], stem, {"axis": 1})]
    for step, given, made, said in steps:
        add(step, given, [made], name=f"{made}_{step}", op_version=13, **said)


def threshold(value: float, dtype: type, _mode: str) -> np.float64:
    """What to compare a number of that type with, where scikit-learn rounds it to single precision and compares that
    with ``value``: the largest one that goes to the left."""
    with np.errstate(over="ignore"):
        low = np.float32(value)
        low = np.nextafter(low, np.float32(-np.inf)) if low > value else low
        high = np.nextafter(low, np.float32(np.inf))
    if dtype is np.float32 or not np.isfinite(high):
        return np.float64(low)
    middle = (np.float64(low) + np.float64(high)) / 2
    return np.float64(middle if np.float32(middle) == low else np.nextafter(middle, -np.inf))


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
        finite = np.isfinite(right)
        if not (finite == np.isfinite(given[name])).all() or not np.array_equal(
                right[~finite], given[name][~finite], equal_nan=True):
            raise Refused(f"{name} is another where it is no number")
        right, ours = right[finite], given[name][finite]
        off = np.abs(ours - right)
        scale = np.median(np.abs(right)) if right.size else 0.0
        allowed = RTOL * np.abs(right) + ATOL * min(1.0, float(scale) or 1.0)
        if not (off <= allowed).all():
            raise Refused(f"{name} is off by up to {off.max():.3g} in {int((~(off <= allowed)).sum())} values")
        off = off / np.maximum(1.0, np.abs(right))
        worst = max(worst, float(off.max(initial=0)))
    return worst


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
