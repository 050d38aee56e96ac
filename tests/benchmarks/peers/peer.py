"""What a peer is, and what it needs to serve a model. Runs in the peer's own environment too: standard library only.

Each peer is a module here with a ``PEER`` and a ``main``. ``python -m tests.benchmarks.peers.NAME MODEL FILE GRPC HTTP
FOLDER``, run by the peer's Python, serves ``FILE`` under the name ``MODEL`` on these two ports until it is ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

V2 = "/v2/models/{model}/infer"


@dataclass(frozen=True)
class Peer:
    """``rest``: the path of a prediction, by HTTP/1.1; "": none. ``rows_in``: what its JSON body keeps the rows in; "":
    it is an Open Inference Protocol v2 body. ``packages`` are beside the model libraries, which all servers share."""

    name: str
    version: str
    packages: tuple[str, ...]
    grpc: bool = False
    rest: str = V2
    rows_in: str = ""
    models: frozenset[str] = frozenset({"lr", "rf", "mlp"})
    env: Mapping[str, str] = field(default_factory=dict)
    how: str = ""
    """How it differs from how it comes."""

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Order:
    """What a peer's ``main`` is asked for."""

    model: str
    file: Path
    grpc: int
    http: int
    folder: Path

    @classmethod
    def read(cls) -> Order:
        """From the arguments."""
        model, file, grpc, http, folder = sys.argv[1:]
        return cls(model, Path(file), int(grpc), int(http), Path(folder))

    @classmethod
    def from_env(cls) -> Order:
        """For peers that start the process that has the model themselves."""
        model, file, grpc, http, folder = os.environ["BENCH_ORDER"].split("|")
        return cls(model, Path(file), int(grpc), int(http), Path(folder))

    def to_env(self) -> None:
        os.environ["BENCH_ORDER"] = f"{self.model}|{self.file}|{self.grpc}|{self.http}|{self.folder}"


def load(file: Path) -> Callable[[Any], Any]:
    """Rows in, the first output's values out: as thin as a serving framework's own runtime for it."""
    if file.suffix == ".joblib":
        import joblib

        return joblib.load(file).predict
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda rows: session.run(None, {name: rows})[0]


def program(name: str) -> str:
    """A program of the environment that this runs in."""
    return str(Path(sys.executable).with_name(name))
