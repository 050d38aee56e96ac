"""The layers that are not the environment: our own code, the scoring file, the models, and ``image.json``."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core import archives
from ..core.errors import BuildFailed, Invalid
from .checks import flavour, requirement, score_problems
from .model import ModelInput
from .sources import is_archive
from .tarring import CHUNK, END, Entry, Layer, header, padding, parents, tar, write_layer

HOME = "opt/modelyard"
PACKAGE = Path(__file__).parents[1]
CODE = ("*.py", "core/*.py", "ports/*.py", "wire/*.py", "scoring/**/*.py", "scoring/requirements.txt",
        "adapters/__init__.py", "adapters/blobs_dir.py", "adapters/folder.py")
CODE_TOP = frozenset({"__init__.py", "capture.py"})
NAMES = {"onnx": "model.onnx", "skops": "model.skops", "pickle": "model.joblib", "": "model"}
NEEDS = {"onnx": {"onnxruntime"}, "skops": {"scikit-learn", "skops"}, "pickle": {"scikit-learn"}}
MLFLOW = {"model.onnx": "onnx", "model.skops": "skops", "model.pkl": "pickle"}
FRAMEWORKS = {"onnx": "onnx", "skops": "scikit-learn", "pickle": "scikit-learn"}


@dataclass(frozen=True)
class Made:
    """A layer and its bytes: a file, or memory when small."""

    layer: Layer
    source: Path | bytes


def code_layer() -> Made:
    """The part of this package that a scoring server needs. Blocking; remembered while no file changes."""
    files = [p for pattern in CODE for p in sorted(PACKAGE.glob(pattern))
             if p.parent != PACKAGE or p.name in CODE_TOP]
    state = tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in dict.fromkeys(files))
    return _code(state)


@functools.lru_cache(maxsize=2)
def _code(state: tuple[tuple[str, int, int], ...]) -> Made:
    entries = [Entry(f"{HOME}/lib/modelyard/{Path(name).relative_to(PACKAGE).as_posix()}", Path(name))
               for name, _, _ in state]
    entries.append(Entry(f"{HOME}/launch.py", (PACKAGE / "scoring" / "launch.py").read_bytes()))
    return small_layer("code", entries, gzip=True)


def small_layer(title: str, entries: Sequence[Entry], *, gzip: bool = False) -> Made:
    """A layer made in a temporary file and kept in memory. Blocking."""
    with tempfile.NamedTemporaryFile() as file:
        layer = write_layer(title, tar(entries), Path(file.name), gzip=gzip)
        return Made(layer, Path(file.name).read_bytes())


# -- the scoring file -------------------------------------------------------------------------------------------------


def score_check(path: Path) -> list[str]:
    """Problems of a scoring file or of a folder with one. Blocking."""
    if not is_archive(path):
        return score_problems(path.read_bytes())
    try:
        with path.open("rb") as file:
            for entry, content in archives.entries(file):
                if entry.name == "score.py":
                    return score_problems(b"".join(content))
    except Invalid as exc:
        return [f"the scoring folder cannot be read: {exc.message}"]
    return ["the scoring folder has no score.py at its top"]


def score_layer(path: Path, out: Path) -> Made:
    """``opt/modelyard/score/…``. Blocking."""
    pieces = tree(path, f"{HOME}/score") if is_archive(path) else tar([Entry(f"{HOME}/score/score.py", path)])
    return Made(write_layer("score", pieces, out, gzip=True), out)


def tree(archive: Path, root: str) -> Iterator[bytes]:
    """The files of an artifact's tar, below ``root``, as a tar of ours. Raises Invalid for a hostile archive."""
    seen: set[str] = set()
    with archive.open("rb") as file:
        for entry in sorted(archives.inspect(file), key=lambda e: e.name):
            name = f"{root}/{entry.name}"
            yield parents(name, seen) + header(name, entry.size, executable=entry.executable)
            file.seek(entry.offset)
            left = entry.size
            while left:
                chunk = file.read(min(CHUNK, left))
                if not chunk:
                    raise BuildFailed(f"{entry.name} is cut off in its archive")
                left -= len(chunk)
                yield chunk
            yield padding(entry.size)
    yield END


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where and as what a model stands in the image. ``kind`` is the flavour that serves it ("": a score.py does)."""

    model: ModelInput
    kind: str

    @classmethod
    def of(cls, model: ModelInput, score: bool) -> Place:
        return cls(model, "" if score else flavour(model)[0])

    @property
    def path(self) -> str:
        """Below ``/opt/modelyard``: the file, or the folder of a model that is one."""
        if self.model.unpack:
            return self.model.folder
        given = self.model.filename
        return f"{self.model.folder}/{given if given not in (None, '.', '..') else NAMES[self.kind]}"

    @property
    def framework(self) -> str | None:
        return FRAMEWORKS.get(self.kind, self.model.framework)


def mlflow_needs(model: ModelInput, path: Path) -> tuple[set[str], list[str]]:
    """The requirements of an MLflow folder that our server can serve, and its problems. Its own list is taken,
    without MLflow itself. Blocking."""
    names, listed = set(), b""
    try:
        with path.open("rb") as file:
            for entry, content in archives.entries(file):
                names.add(entry.name)
                if entry.name == "requirements.txt" and entry.size < CHUNK:
                    listed = b"".join(content)
    except Invalid as exc:
        return set(), [f"model '{model.id}': {exc.message}"]
    served = next((kind for name, kind in MLFLOW.items() if name in names), None)
    if served is None:
        return set(), [f"model '{model.id}': its MLflow folder has none of {', '.join(MLFLOW)}; give a score.py"]
    if served == "pickle" and not model.trusted:
        return set(), [f"model '{model.id}': its model.pkl is a pickle, and loading one may run code; register it with "
                       "trusted: true if it is yours"]
    lines = {requirement(line.strip())[0] for line in listed.decode(errors="replace").splitlines()} - {""}
    return NEEDS[served] | {line for line in lines if not line.startswith("mlflow")}, []


def model_layer(place: Place, path: Path, out: Path) -> Made:
    """An uncompressed tar: weights do not shrink, and an unchanged part stays findable. Blocking."""
    root = f"{HOME}/{place.path}"
    pieces = tree(path, root) if place.model.unpack else tar([Entry(root, path)])
    return Made(write_layer(f"model: {place.model.id}", pieces, out, gzip=False), out)
