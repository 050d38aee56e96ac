"""The layers that are not the environment: our own code, the scoring file, the models, and ``image.json``."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import io
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ..core import archives
from ..core.errors import BuildFailed, Invalid
from ..kernel.service import Context
from .checks import SCORE_LIMIT, flavour, score_problems
from .model import Image, ModelInput
from .sources import Source, is_archive, stored
from .tarring import (
    CHUNK,
    END,
    Entry,
    Layer,
    header,
    opened,
    padding,
    parents,
    plain,
    tar,
    uncompressed,
    write_layer,
)

HOME = "opt/modelyard"
PACKAGE = Path(__file__).parents[1]
CODE = ("*.py", "core/*.py", "ports/*.py", "wire/*.py", "scoring/**/*.py", "scoring/requirements.txt",
        "adapters/__init__.py", "adapters/blobs_azure_sas.py", "adapters/blobs_dir.py", "adapters/folder.py",
        "adapters/grants_lent.py")
CODE_TOP = frozenset({"__init__.py", "capture.py"})
NAMES = {"onnx": "model.onnx", "skops": "model.skops", "pickle": "model.joblib", "lightgbm": "model.txt",
         "xgboost": "model.ubj", "lightgbm-pickle": "model.joblib", "xgboost-pickle": "model.joblib",
         "pytorch": "model.pt", "": "model"}
NEEDS = {"onnx": {"onnxruntime"}, "skops": {"scikit-learn", "skops"}, "pickle": {"scikit-learn"},
         "lightgbm": {"lightgbm"}, "lightgbm-pickle": {"lightgbm", "scikit-learn"},
         "xgboost": {"xgboost-cpu"}, "xgboost-pickle": {"xgboost-cpu", "scikit-learn"},
         "pytorch": {"torch"}}
PINS = {"skops": "scikit-learn=={}", "pickle": "scikit-learn=={}", "lightgbm": "lightgbm>={}",
        "lightgbm-pickle": "lightgbm=={}", "xgboost": "xgboost-cpu>={}", "xgboost-pickle": "xgboost-cpu=={}",
        "pytorch": "torch>={}"}
"""What the framework's version asks for: a library's own format is read by later ones, a pickle by its own alone."""
FRAMEWORKS = {"onnx": "onnx", "skops": "scikit-learn", "pickle": "scikit-learn", "lightgbm": "lightgbm",
              "lightgbm-pickle": "lightgbm", "xgboost": "xgboost", "xgboost-pickle": "xgboost"}


@dataclass(frozen=True)
class Made:
    """A layer and its bytes: a file, memory when small, or what can be read again."""

    layer: Layer
    source: Source | AsyncIterable[bytes]


@dataclass(frozen=True)
class Pieces:
    """What a blocking iterator gives, made anew each time it is iterated over."""

    again: Callable[[], Iterator[bytes]]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = self.again()
        while some := await asyncio.to_thread(_some, pieces):
            yield some


def _some(pieces: Iterator[bytes]) -> bytes:
    """The next of them, at least a chunk together; b"" behind the last."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= CHUNK:
            break
    return b"".join(held)


@functools.cache
def code_layer() -> Made:
    """The part of this package that a scoring server needs. Blocking, once in a process."""
    files = [p for pattern in CODE for p in PACKAGE.glob(pattern) if p.parent != PACKAGE or p.name in CODE_TOP]
    entries = [Entry(f"{HOME}/lib/modelyard/{p.relative_to(PACKAGE).as_posix()}", p) for p in set(files)]
    return made("code", tar([*entries, Entry(f"{HOME}/launch.py", PACKAGE / "scoring" / "launch.py")]), gzip=True)


def about_layer(said: bytes) -> Made:
    """``image.json`` alone: it changes with every model, and is small. Blocking."""
    return made("about", tar([Entry(f"{HOME}/image.json", said)]), gzip=True)


def made(title: str, pieces: Iterable[bytes], *, gzip: bool = False, into: Path | None = None) -> Made:
    """A layer in the file ``into``, or in memory. Blocking."""
    if into is not None:
        with into.open("wb") as file:
            return Made(write_layer(title, pieces, file, gzip=gzip), into)
    memory = io.BytesIO()
    return Made(write_layer(title, pieces, memory, gzip=gzip), memory.getvalue())


# -- the scoring file -------------------------------------------------------------------------------------------------


def score_check(source: Source) -> list[str]:
    """Problems of a scoring file or of a folder with one. Blocking."""
    if not is_archive(source):
        with opened(source) as file:
            return score_problems(file.read(SCORE_LIMIT + 1))
    try:
        with opened(source) as file:
            for entry, content in archives.entries(file):
                if entry.name == "score.py":
                    return score_problems(b"".join(content))
    except Invalid as exc:
        return [f"the scoring folder cannot be read: {exc.message}"]
    return ["the scoring folder has no score.py at its top"]


def score_layer(source: Source) -> Made:
    """``opt/modelyard/score/…``. Blocking."""
    root = f"{HOME}/score"
    pieces = tree(source, root) if is_archive(source) else tar([Entry(f"{root}/score.py", source)])
    return made("score", pieces, gzip=True,
                into=None if isinstance(source, bytes) else source.with_name(source.name + ".layer"))


def tree(archive: Source, root: str) -> Iterator[bytes]:
    """The files of an artifact's tar, below ``root``, as a tar of ours. Raises Invalid for a hostile archive."""
    seen: set[str] = set()
    with opened(archive) as file:
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


def once(wanted: Iterable[str]) -> set[str]:
    """Requirements without our choice of XGBoost where somebody made one: its packages share their files."""
    names = {line: Requirement(line).name.lower().replace("_", "-") for line in wanted}
    chosen = any(name == "xgboost" for name in names.values())
    return {line for line, name in names.items() if not (chosen and name == "xgboost-cpu")}


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """ONNX that was made of a model. ``runtime`` is the one that it was compared with (``onnxruntime==1.32.0``);
    ``told`` is what a server needs to answer as the model does."""

    data: bytes
    runtime: str
    told: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"


@dataclass(frozen=True)
class Place:
    """Where and as what a model stands in the image. ``kind`` is the flavour that serves it ("": a score.py does);
    ``graph`` stands there instead of the model, where it became one."""

    model: ModelInput
    kind: str
    graph: Graph | None = None

    @classmethod
    def of(cls, model: ModelInput, score: bool) -> Place:
        return cls(model, "" if score else flavour(model)[0])

    @property
    def path(self) -> str:
        """Below ``/opt/modelyard``: the file, or the folder of a model that is one."""
        if self.model.unpack:
            return self.model.folder
        given = self.model.filename if self.graph is None else None
        return f"{self.model.folder}/{given if given not in (None, '.', '..') else NAMES[self.kind]}"

    @property
    def framework(self) -> str | None:
        return FRAMEWORKS.get(self.kind, self.model.framework)


def needs(places: Iterable[Place]) -> set[str]:
    """What the models need where no scoring file serves them."""
    out: set[str] = set()
    for place in places:
        out |= NEEDS.get(place.kind, set())
        if place.kind in PINS and place.model.framework_version:
            out.add(PINS[place.kind].format(place.model.framework_version.partition("+")[0]))
        if place.graph is not None:
            out.add(place.graph.runtime)
    return out


def model_layer(place: Place, source: Source) -> Made:
    """An uncompressed tar: weights do not shrink, and an unchanged part stays findable. Of a large source it is made
    anew each time it is read, never kept. Blocking."""
    source = source if place.graph is None else place.graph.data
    root, title = f"{HOME}/{place.path}", f"model: {place.model.id}"

    def pieces() -> Iterator[bytes]:
        return tree(source, root) if place.model.unpack else tar([Entry(root, source)])

    if isinstance(source, bytes):
        return made(title, pieces())
    return Made(plain(title, pieces()), Pieces(pieces))


async def stored_layer(ctx: Context, doc: Image, place: Place) -> Made:
    """The same of an artifact that is not unpacked and stays in the blob store."""
    model, name = place.model, f"{HOME}/{place.path}"
    start, end = parents(name, set()) + header(name, model.size), padding(model.size) + END
    source, digest = await stored(ctx, doc, model.artifact, f"model '{model.id}'", (start, end))
    return Made(uncompressed(f"model: {model.id}", digest, len(start) + model.size + len(end)), source)
