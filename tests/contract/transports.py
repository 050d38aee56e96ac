"""One replica for each transport, whose scoring code does what a call asks for; and calls to it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from modelyard.core.inference import Inference, read_response, write_request
from modelyard.core.segments import RECORD, RECORD_WORDS, Reader
from modelyard.core.tensors import Tensor
from modelyard.wire import inference_pb2 as pb
from tests.unit.scoring.roots import Replica, launch, make_root

SERVICE = "inference.GRPCInferenceService"
INFER, STREAM = f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelStreamInfer"
SCORE = """
import os, time
import numpy as np

def run(data: dict[str, np.ndarray]):
    if "mark" in data:
        with open(os.environ["RUNS"], "a") as runs:
            runs.write(data["mark"][0].decode() if isinstance(data["mark"][0], bytes) else str(data["mark"][0]))
            runs.write(chr(10))
    if "sleep" in data:
        time.sleep(float(data["sleep"][0]))
    if "fail" in data:
        raise ValueError("100% größer\\nals erlaubt")
    return {"x": data["x"]} if "x" in data else {"x": np.zeros(1)}
"""


@dataclass
class Served:
    """A replica under test. ``transport`` is the name that ``--transport`` was given."""

    transport: str
    replica: Replica
    runs: Path
    spool: Path

    @property
    def address(self) -> str:
        return self.replica.grpc

    def ran(self) -> list[str]:
        """The marks of the calls that scoring code began, in order."""
        return self.runs.read_text().split() if self.runs.exists() else []

    def captured(self, request_id: str) -> list[dict[str, Any]]:
        """The capture records of a request id, in order: their words, ``request`` and ``response``."""
        found = []
        for path in sorted(self.spool.iterdir()):
            if path.suffix in (".seg", ".live"):
                for frame in Reader(_bytes(path)):
                    words = dict(zip(RECORD_WORDS, frame.text(), strict=False)) if frame.kind == RECORD else {}
                    if words.get("request_id") == request_id:
                        found.append(words | {"request": frame.request, "response": frame.response})
        return found

    def resident_mib(self) -> float:
        """Its own memory, without what it shares with others."""
        fields = Path(f"/proc/{self.replica.process.pid}/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def in_flight(self) -> int:
        return int(self.metric("modelyard_scoring_in_flight"))

    def metric(self, name: str) -> float:
        """The sum over a metric's labels."""
        lines = self.replica.get("/metrics")[1].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{")))


def _bytes(path: Path) -> bytes:
    """A segment's, which may be closed meanwhile and have another name then."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return path.with_suffix(".seg").read_bytes()


@contextlib.contextmanager
def serving(folder: Path, transport: str, env: dict[str, str] | None = None, limits: dict[str, int] | None = None,
            arguments: tuple[str, ...] = (), score: str = SCORE, **more: Any) -> Iterator[Served]:
    """A replica of its own, capture on."""
    root = make_root(folder, score)
    runs, spool = folder / "runs", folder / "spool"
    with launch(root, spool=spool, capture={"enabled": True}, limits=limits, arguments=arguments,
                env={"MODELYARD_TRANSPORT": transport, "RUNS": str(runs), **(env or {})}, **more) as replica:
        yield Served(transport, replica, runs, spool)


def ask(x: np.ndarray | None = None, *, id: str = "", model: str = "flower", mark: str = "", sleep: float = 0,
        fail: bool = False) -> bytes:
    """A ModelInferRequest's bytes."""
    tensors = [Tensor("x", np.zeros(1) if x is None else x)]
    if mark:
        tensors.append(Tensor("mark", np.array([mark.encode()], object)))
    if sleep:
        tensors.append(Tensor("sleep", np.array([sleep])))
    if fail:
        tensors.append(Tensor("fail", np.zeros(1)))
    return write_request(Inference(model, id=id, tensors=tensors))


def outcome(answer: bytes) -> np.ndarray:
    """The tensor x of a ModelInferResponse."""
    return read_response(answer).tensors[0].array


def streamed(answer: bytes) -> pb.ModelStreamInferResponse:
    return pb.ModelStreamInferResponse.FromString(answer)


def failed(call: Callable[[], Any]) -> grpc.RpcError:
    """The error that a call must end with."""
    try:
        call()
    except grpc.RpcError as exc:
        return exc
    raise AssertionError("the call did not fail")


def wait_for(done: Callable[[], Any], seconds: float = 10, what: str = "it") -> Any:
    """Asks until it is so, and gives back what was said."""
    end = time.monotonic() + seconds
    while not (said := done()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)
    return said


os.environ.setdefault("GRPC_VERBOSITY", "NONE")
