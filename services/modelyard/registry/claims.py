"""Whether a file is what its registration claims, told from its bytes: nothing is loaded, nothing is unpickled."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

import yaml

from ..core.archives import Entry, inspect
from ..core.errors import Invalid
from ..core.specs import ModelSpec
from ..core.torch_files import exported, scripted
from . import estimator_scan, mlflow_scan, torch_scan, zips
from .onnx_scan import NotOnnx, scan

T = TypeVar("T")
BY_SUFFIX = {".onnx": "onnx", ".skops": "scikit-learn", ".joblib": "scikit-learn", ".ubj": "xgboost",
             ".pt": "pytorch", ".pt2": "pytorch", ".pth": "pytorch"}
ZIP = b"PK\x03\x04"
PICKLES = (".joblib", ".pkl", ".pickle")
COMPRESSED = (b"\x78", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00\x00", b"\x04\x22\x4d\x18", b"ZF")
"""How joblib's compressed files begin: zlib, gzip, bzip2, xz, lzma, lz4, and its own old form."""
PROTOCOLS = range(2, 6)


@dataclass(frozen=True)
class Seen:
    """What the file is, and the signature and the sample input that it carries itself (None: none that we can read)."""

    framework: str
    signature: dict[str, Any] | None = None
    sample: Any = None


def examine(file: BinaryIO, size: int, spec: ModelSpec) -> Seen:
    """Raises Invalid when the file is not what ``spec`` says, or an archive that may not be unpacked."""
    if size == 0:
        raise wrong("the artifact is empty")
    if spec.unpack:
        return _folder(file, spec)
    suffix = PurePosixPath(spec.filename or "").suffix.lower()
    framework = spec.framework or BY_SUFFIX.get(suffix) or _by_content(file, size)
    if framework == "onnx":
        return Seen("onnx", _onnx(file, size))
    if framework == "mlflow":
        raise wrong("an MLflow model is a folder with an MLmodel file; register the folder (unpack: true)")
    if framework == "scikit-learn":
        _sklearn(file, size, suffix)
    return Seen(framework, _carried(lambda: _signature(file, size, framework)))


def _signature(file: BinaryIO, size: int, framework: str) -> dict[str, Any] | None:
    """Raises what ``_carried`` knows."""
    if framework in ("lightgbm", "xgboost"):
        return (estimator_scan.lightgbm if framework == "lightgbm" else estimator_scan.xgboost)(file, size)
    if framework not in ("scikit-learn", "pytorch") or _head(file, 4) != ZIP:
        return None
    with zips.opened(file, size) as archive:
        return torch_scan.scan(archive) if framework == "pytorch" else estimator_scan.skops(archive)


def _carried(look: Callable[[], T]) -> T | None:
    """What a file says beside what it is. One that is odd there is no worse a model: then it says nothing."""
    try:
        return look()
    except (zips.BadZip, NotOnnx, Invalid, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError,
            RecursionError):
        return None


def wrong(message: str, field: str = "artifact") -> Invalid:
    return Invalid(message, errors=[{"field": field, "message": message}])


def _folder(file: BinaryIO, spec: ModelSpec) -> Seen:
    try:
        found = inspect(file)
    except Invalid as exc:
        raise Invalid(exc.message, code=exc.code, errors=[{"field": "artifact", "message": exc.message}]) from exc
    if not found:
        raise wrong("the archive has no file")
    mlflow = any(entry.name == "MLmodel" for entry in found)
    if spec.framework == "mlflow" and not mlflow:
        raise wrong("an MLflow model has a file MLmodel at the top of its folder; this one has none")
    if spec.framework == "onnx":
        return Seen("onnx", _onnx_in(file, found))
    framework = spec.framework or ("mlflow" if mlflow else "custom")
    if framework != "mlflow":
        return Seen(framework)
    said = _carried(lambda: mlflow_scan.scan(_reader(file, found))) or (None, None)
    onnx = [e for e in found if e.name == "model.onnx"]  # served as the graph that it is, by the graph's own names
    return Seen("mlflow", _carried(lambda: _onnx_in(file, onnx)) if onnx else said[0], said[1])


def _reader(file: BinaryIO, found: list[Entry]) -> mlflow_scan.Read:
    by_name = {entry.name: entry for entry in found}

    def read(name: str, most: int) -> bytes | None:
        entry = by_name.get(name)
        if entry is None or entry.size > most:
            return None
        file.seek(entry.offset)
        return file.read(entry.size)

    return read


def _onnx_in(file: BinaryIO, found: list[Entry]) -> dict[str, Any]:
    """The signature of a folder's first ``.onnx`` file (its other files hold the weights)."""
    models = sorted((e for e in found if e.name.endswith(".onnx")), key=lambda e: (e.name.count("/"), e.name))
    if not models:
        raise wrong("the folder has no .onnx file")
    return _onnx(_Window(file, models[0]), models[0].size)


class _Window(io.RawIOBase):
    """One entry of an archive as a file."""

    def __init__(self, file: BinaryIO, entry: Entry) -> None:
        self._file, self._entry = file, entry

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(self._entry.offset + offset) - self._entry.offset

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


def _onnx(file: Any, size: int) -> dict[str, Any]:
    try:
        return scan(file, size)
    except NotOnnx as exc:
        raise wrong(f"the file is not an ONNX model: {exc}") from exc


def _by_content(file: BinaryIO, size: int) -> str:
    """For files without a telling name: only what identifies itself beyond doubt."""
    head = _head(file, 64)
    if head.startswith(ZIP):
        names = _zip_names(file, size)
        torch = exported(names) or scripted(names)
        return "scikit-learn" if "schema.json" in names else "pytorch" if torch else "custom"
    if head.startswith(estimator_scan.LIGHTGBM):
        return "lightgbm"
    if estimator_scan.XGBOOST.match(head):
        return "xgboost"
    try:
        scan(file, size)
    except NotOnnx:
        return "custom"
    return "onnx"


def _sklearn(file: BinaryIO, size: int, suffix: str) -> None:
    """skops is a zip with a schema.json; joblib and pickle begin with a pickle's opcodes or a compressor's mark."""
    head = _head(file, 8)
    if head.startswith(b"PK") and suffix not in PICKLES:
        if "schema.json" not in _zip_names(file, size):
            raise wrong("the file is a zip, but not a skops model: it has no schema.json")
        return
    if suffix == ".skops":
        raise wrong("the file is not a skops model: it is no zip")
    if head[:1] == b"\x80" and len(head) > 1 and head[1] in PROTOCOLS:
        file.seek(size - 1)
        if file.read(1) != b".":
            raise wrong("the file is a pickle that was cut off: it does not end with STOP")
    elif not head.startswith(COMPRESSED):
        raise wrong("the file is not a scikit-learn model: neither skops, nor joblib or pickle (protocol 2 to 5)")


def _head(file: BinaryIO, size: int) -> bytes:
    file.seek(0)
    return file.read(size)


def _zip_names(file: BinaryIO, size: int) -> list[str]:
    try:
        with zips.opened(file, size) as archive:
            return archive.namelist()
    except zips.BadZip as exc:
        raise wrong(f"the file {exc}") from exc
