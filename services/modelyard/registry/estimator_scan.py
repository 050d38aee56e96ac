"""What files of LightGBM, XGBoost and skops say of what they take and give. Nothing is loaded.

Of trees the ends of the file are read, whatever its size: LightGBM's text begins with it, XGBoost's JSON and UBJSON
have sorted keys, and ``learner_model_param`` and ``objective`` come after the trees.
"""

from __future__ import annotations

import json
import re
import zipfile
from typing import Any, BinaryIO

from ..core.signatures import Signature, Slot
from .zips import BadZip, entry

END = 64 * 1024
HEAD = 1 << 20
LIGHTGBM = b"tree\nversion="
XGBOOST = re.compile(rb'\{\s*"learner"|\{L\x00{7}\x07learner')
CLASSES = frozenset({"multi:softprob"})
MOST_COLUMNS = 10_000


def _row(count: int, columns: list[str], datatype: str = "FP64") -> Slot:
    named = {"columns": columns} if len(columns) == count <= MOST_COLUMNS else {}
    return {"name": "input-0", "datatype": datatype, "shape": [-1, count], **named}


def lightgbm(file: BinaryIO, size: int) -> Signature | None:
    """Of LightGBM's text."""
    file.seek(0)
    head, _, _ = file.read(HEAD).partition(b"\nTree=")
    if not head.startswith(LIGHTGBM):
        return None
    told = dict(line.partition("=")[::2] for line in head.decode("utf-8", "replace").splitlines())
    each = int(told.get("num_tree_per_iteration", "1"))
    names = told.get("feature_names", "").split(" ")
    given = names if not all(name == f"Column_{n}" for n, name in enumerate(names)) else []
    return {"inputs": [_row(int(told["max_feature_idx"]) + 1, given)],
            "outputs": [{"name": "predict", "datatype": "FP64", "shape": [-1] if each == 1 else [-1, each]}]}


def xgboost(file: BinaryIO, size: int) -> Signature | None:
    """Of XGBoost's JSON or UBJSON."""
    file.seek(0)
    head = file.read(min(HEAD, size))
    if not XGBOOST.match(head):
        return None
    file.seek(max(0, size - END))
    tail = file.read(END)
    end = tail[tail.rfind(b"learner_model_param"):] if b"learner_model_param" in tail else b""

    objective = _text(end[max(0, end.find(b"objective")):], b"name")
    features, classes, targets = (int(_text(end, name) or 0) for name in (b"num_feature", b"num_class", b"num_target"))
    if not features or not objective:
        return None
    wide = classes if objective in CLASSES else targets
    return {"inputs": [_row(features, _feature_names(head))],
            "outputs": [{"name": "predict", "datatype": "FP32", "shape": [-1, wide] if wide > 1 else [-1]}]}


def _text(part: bytes, key: bytes) -> str:
    """The first text behind a key, in either form; "" where there is none."""
    found = re.search(key + rb'(?:"\s*:\s*"([^"]*)"|SL(.{8}))', part, re.DOTALL)
    if found is None:
        return ""
    told = found[1] if found[2] is None else part[found.end():found.end() + int.from_bytes(found[2], "big")]
    return told.decode("utf-8", "replace")


def _feature_names(head: bytes) -> list[str]:
    """The list behind ``feature_names``, in either form; nothing when it goes on beyond what was read."""
    at = head.find(b"feature_names")
    if at < 0:
        return []
    rest = head[at + len(b"feature_names"):]
    if rest.startswith(b'"'):
        found, _ = json.JSONDecoder().raw_decode(rest.lstrip(b'": \n\t\r').decode("utf-8", "replace"))
        return [str(name) for name in found] if isinstance(found, list) else []
    if not rest.startswith(b"[#L"):
        return []
    count, at, names = int.from_bytes(rest[3:11], "big"), 11, []
    for _ in range(min(count, MOST_COLUMNS)):
        length = int.from_bytes(rest[at + 2:at + 10], "big")
        if rest[at:at + 2] != b"SL" or at + 10 + length > len(rest):
            return []
        names.append(rest[at + 10:at + 10 + length].decode("utf-8", "replace"))
        at += 10 + length
    return names


def skops(archive: zipfile.ZipFile) -> Signature | None:
    """Of an estimator that skops wrote: its ``schema.json`` holds plain numbers as text. Arrays lie beside it as .npy
    files, of which the head is read. Raises what a hostile JSON makes the parser raise."""
    root = json.loads(entry(archive, "schema.json"))
    first, last = _steps(root)
    features = _plain(first, "n_features_in_")
    if type(features) is not int or features < 1:
        return None
    outputs: list[Slot] = []
    classes = _array(archive, _fields(last).get("classes_"))
    if classes is not None:
        outputs = [{"name": "predict", "datatype": classes, "shape": [-1]}]
    return {"inputs": [_row(features, [])], "outputs": outputs}


def _fields(node: Any) -> dict[str, Any]:
    """What an estimator's node holds by attribute."""
    content = node.get("content")
    inner = content.get("content") if isinstance(content, dict) else None
    return inner if isinstance(inner, dict) else {}


def _steps(root: Any) -> tuple[Any, Any]:
    """The first and the last estimator of a pipeline, at any depth; of anything else the thing itself twice."""
    first = last = root
    for _ in range(16):
        steps = _fields(first).get("steps")
        first = steps["content"][0]["content"][1] if steps else first
        steps = _fields(last).get("steps")
        last = steps["content"][-1]["content"][1] if steps else last
    return first, last


def _plain(node: Any, name: str) -> Any:
    found = _fields(node).get(name) or {}
    return json.loads(found["content"]) if found.get("is_json") else None


def _array(archive: zipfile.ZipFile, node: Any) -> str | None:
    """The datatype of an array's elements, as ``predict`` gives them."""
    if not isinstance(node, dict) or node.get("type") != "numpy":
        return None
    try:
        head = entry(archive, str(node["file"]), 256)
    except BadZip:
        return None
    found = re.search(rb"'descr': '[<|=]?(\w)(\d*)'", head)
    if found is None:
        return None
    if found[1] == b"b":
        return "BOOL"
    kind = {b"f": "FP", b"i": "INT", b"u": "UINT"}.get(found[1])
    return f"{kind}{8 * int(found[2] or 8)}" if kind else "BYTES" if found[1] in (b"U", b"S", b"O") else None
