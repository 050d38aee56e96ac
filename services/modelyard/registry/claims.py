"""Whether a file is what its registration claims, told from its bytes: nothing is loaded, nothing is unpickled."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from ..core.archives import Entry, inspect
from ..core.errors import Invalid
from ..core.specs import ModelSpec
from .onnx_scan import NotOnnx, scan

BY_SUFFIX = {".onnx": "onnx", ".skops": "scikit-learn", ".joblib": "scikit-learn", ".ubj": "xgboost"}
PICKLES = (".joblib", ".pkl", ".pickle")
COMPRESSED = (b"\x78", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00\x00", b"\x04\x22\x4d\x18", b"ZF")
"""How joblib's compressed files begin: zlib, gzip, bzip2, xz, lzma, lz4, and its own old form."""
PROTOCOLS = range(2, 6)
MOST_DIRECTORY = 4 << 20


@dataclass(frozen=True)
class Seen:
    """What the file is, and the signature that it carries itself (None: none that we can read)."""

    framework: str
    signature: dict[str, Any] | None = None


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
    return Seen(framework)


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
    return Seen(spec.framework or ("mlflow" if mlflow else "custom"))


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
    if _head(file, 4) == b"PK\x03\x04":
        return "scikit-learn" if _zip_names(file, size) & {"schema.json"} else "custom"
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


def _zip_names(file: BinaryIO, size: int) -> set[str]:
    """The names in a zip's directory, which is read only when it is of a sane size."""
    tail = min(size, 22 + 65535)
    file.seek(size - tail)
    raw = file.read(tail)
    at = raw.rfind(b"PK\x05\x06")
    length = struct.unpack("<I", raw[at + 12:at + 16])[0] if 0 <= at <= len(raw) - 22 else MOST_DIRECTORY + 1
    if length > MOST_DIRECTORY:
        raise wrong("the file begins as a zip, but its directory is missing or too large")
    try:
        with zipfile.ZipFile(file) as archive:
            return set(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as exc:
        raise wrong(f"the file begins as a zip, but cannot be read as one: {exc}") from exc
