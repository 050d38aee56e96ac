"""Checks of what an image is made from. Nothing is imported, unpickled or run: texts are only parsed.

Each check gives its problems, so that a caller can report all of them at once. That a model's file is what its
framework says is the registry's check, made when it was registered.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence

from .model import ModelInput

SCORE_LIMIT = 4_000_000
PICKLE = ("is not named as a skops file (model.skops), and loading a pickle may run code: save it with skops, or "
          "register it with trusted: true if it is yours")
PICKLE_TORCH = ("is an exported program, and loading one may run code: save it as TorchScript, or register it with "
                "trusted: true if it is yours")
TREES = ("lightgbm", "xgboost")
PICKLED_TREES = ("is a pickle, and loading one may run code: save it with Booster.save_model, or register it with "
                 "trusted: true if it is yours")
PICKLES = (".joblib", ".pkl", ".pickle")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def flavour(model: ModelInput) -> tuple[str, str]:
    """What serves a model without a scoring file (``onnx``, ``skops``, ``pickle``, ``lightgbm``, ``xgboost``, the
    last two also as ``…-pickle``; ``mlflow`` and ``pytorch``: looked into when they are built) and "", or "" and why
    nothing does."""
    name = (model.filename or "").lower()
    if model.framework == "mlflow" and model.unpack:
        return "mlflow", ""
    if model.unpack:
        return "", "is a folder: give a score.py that loads it"
    if model.framework == "onnx":
        return "onnx", ""
    if model.framework in TREES:
        if not name.endswith(PICKLES):
            return model.framework, ""
        return (f"{model.framework}-pickle", "") if model.trusted else ("", PICKLED_TREES)
    if model.framework == "pytorch":
        return ("pytorch", "") if model.trusted or not name.endswith(".pt2") else ("", PICKLE_TORCH)
    if model.framework != "scikit-learn":
        return "", (f"is of framework '{model.framework or 'none'}': without a score.py only onnx, scikit-learn, "
                    f"pytorch, {' and '.join(TREES)} are served")
    if name.endswith(".skops"):
        return "skops", ""
    return ("pickle", "") if model.trusted else ("", PICKLE)


def score_problems(source: bytes, name: str = "score.py") -> list[str]:
    """What keeps a scoring file from being served, each with its line."""
    if len(source) > SCORE_LIMIT:
        return [f"{name} has more than {SCORE_LIMIT} bytes, which are read at most"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source, filename=name)
    except SyntaxError as exc:
        shown = f": {exc.text.strip()[:120]}" if exc.text else ""
        where = f" line {exc.lineno}" if exc.lineno else ""
        return [f"{name}{where} does not parse: {exc.msg}{shown}"]
    except (ValueError, RecursionError, MemoryError) as exc:
        return [f"{name} does not parse: {exc or 'it is nested too deeply'}"]
    names = dict(_top_names(tree.body))
    out = []
    if "run" not in names and "run_batch" not in names:
        out.append(f"{name} has no function run(data); that is what answers a call")
    for wanted, count in (("run", 1), ("run_batch", 1), ("init", 0)):
        found = names.get(wanted)
        if isinstance(found, Function) and (why := _arity(found, count)):
            out.append(f"{name} line {found.lineno}: {why}")
        elif isinstance(found, ast.ClassDef):
            out.append(f"{name} line {found.lineno}: {wanted} is a class; a function is needed")
    return out


def _top_names(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names bound at the top of a module, also inside if, try and with; the last binding comes last."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((a.asname or a.name.partition(".")[0], node) for a in node.names)
        elif isinstance(node, ast.Assign):
            yield from ((t.id, node) for target in node.targets for t in ast.walk(target) if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node
        elif isinstance(node, ast.If | ast.With | ast.Try):
            for part in ("body", "orelse", "finalbody"):
                yield from _top_names(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _top_names(handler.body)


def _arity(function: Function, count: int) -> str:
    """Why a function cannot be called with ``count`` positional arguments, or ""."""
    given = function.args
    positional = len(given.posonlyargs) + len(given.args)
    needed = positional - len(given.defaults)
    keywords = [a.arg for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is None]
    if keywords:
        return f"{function.name} needs the keyword {keywords[0]}, which nobody gives it"
    if needed > count or (positional < count and given.vararg is None):
        called = f"{function.name}(data)" if count else f"{function.name}()"
        return f"{function.name} takes {positional} arguments; it is called as {called}"
    return ""
