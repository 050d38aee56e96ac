"""One way to ask one server: what h2load sends, and a real client that looks at what comes back."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass

import grpc
import numpy as np

from modelyard.core.inference import Inference, write_request
from modelyard.core.tensors import DTYPES, FIELDS, Tensor
from modelyard.wire import inference_pb2 as pb
from tests.benchmarks.peers.models import Model
from tests.benchmarks.peers.peer import V2

METHOD = "/inference.GRPCInferenceService/ModelInfer"
ANSWER_S = 10.0
LARGE = [("grpc.max_receive_message_length", -1)]


class Wrong(Exception):
    """An answer that is not the right one."""


@dataclass(frozen=True)
class Wire:
    """``body`` is the whole request body, with gRPC's five bytes in front where it is gRPC."""

    kind: str
    address: str
    path: str
    body: bytes
    model: Model

    @property
    def headers(self) -> dict[str, str]:
        if self.kind == "grpc":
            return {"content-type": "application/grpc", "te": "trailers"}
        return {"content-type": "application/json"}

    def check(self) -> int:
        """Asks once; the length of the answer's body. Raises Wrong when it is not right, OSError when there is none."""
        if self.kind == "grpc":
            return self._check_grpc()
        request = urllib.request.Request(f"http://{self.address}{self.path}", self.body, self.headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            body = response.read()
        self._compare(_values(json.loads(body)))
        return len(body)

    def _check_grpc(self) -> int:
        options = [*LARGE, ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self.address, options) as channel:
            try:
                body: bytes = channel.unary_unary(METHOD)(self.body[5:], timeout=ANSWER_S)
            except grpc.RpcError as exc:  # it is a call, too
                raise OSError(f"{exc.code().name}: {exc.details()}") from exc  # type: ignore[attr-defined]
        self._compare(_first(body))
        return len(body) + 5

    def _compare(self, values: object) -> None:
        got, right = np.ravel(np.asarray(values)), np.ravel(self.model.answer)
        if got.shape != right.shape or not np.allclose(got, right, rtol=1e-4, atol=1e-6):
            raise Wrong(f"{self.address} answers {got[:4]}, right is {right[:4]}")


def over_grpc(address: str, model: Model) -> Wire:
    """Open Inference Protocol v2, raw tensors."""
    body = write_request(Inference(model.name, tensors=[Tensor("x", model.rows)]))
    return Wire("grpc", address, METHOD, b"\0" + len(body).to_bytes(4, "big") + body, model)


def over_rest(address: str, model: Model, path: str = V2, field: str = "") -> Wire:
    """Open Inference Protocol v2, or a JSON body with the rows in ``field``."""
    rows = model.rows.tolist()
    datatype = "FP64" if model.rows.dtype == np.float64 else "FP32"
    asked = {field: rows} if field else {"inputs": [
        {"name": "x", "shape": list(model.rows.shape), "datatype": datatype, "data": np.ravel(model.rows).tolist()}]}
    return Wire("rest", address, path.format(model=model.name), json.dumps(asked).encode(), model)


def _first(body: bytes) -> np.ndarray:
    """The first output of a ModelInferResponse; raw where it is raw, though some peers fill in ``contents`` as well."""
    answer = pb.ModelInferResponse.FromString(body)
    output = answer.outputs[0]
    if answer.raw_output_contents:
        return np.frombuffer(answer.raw_output_contents[0], DTYPES[output.datatype])
    return np.array(getattr(output.contents, FIELDS[output.datatype]))


def _values(body: object) -> object:
    if not isinstance(body, dict):
        return body
    return body["outputs"][0]["data"] if "outputs" in body else body.get("predictions", body.get("rows"))
