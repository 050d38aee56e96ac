"""Requests that begin alike are read by what is known of the beginning, and answers of one prediction are written
together: both must be what the protobuf library makes of the same bytes and arrays."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, given, settings

from modelyard.core.errors import Invalid
from modelyard.core.inference import PROTO, Inference, response_message, write_request
from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Asked, Call, Served
from modelyard.scoring.codecs import GrpcCodec, StreamCodec
from modelyard.scoring.heads import AGAIN
from modelyard.scoring.ids import DRAWN, new_id
from modelyard.scoring.parts import Rows
from modelyard.scoring.results import Outputs
from modelyard.scoring.runners import RowRunner
from modelyard.wire import inference_pb2 as pb
from tests.unit.scoring.planes import grpc_call, open_plane

some = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SERVED = Served("flower", "7", "iris:7")
X = np.arange(8, dtype="f4").reshape(2, 4)


def opened(codec: GrpcCodec, body: bytes) -> Asked:
    asked = codec.open(Call("grpc", "ModelInfer", body, PROTO, codec))
    codec.read(asked)
    return asked


def told(codec: GrpcCodec, body: bytes) -> Any:
    """What a codec makes of a request, so that it can be compared."""
    try:
        asked = opened(codec, body)
    except Invalid as exc:
        return exc.message
    return (asked.model, asked.version, asked.id, asked.outputs, asked.raw,
            [(t.name, t.datatype, t.array.shape, t.array.dtype, t.array.tobytes(), t.parameters)
             for t in asked.tensors or []])


def request(array: np.ndarray = X, **more: Any) -> bytes:
    return write_request(Inference("flower", tensors=[Tensor("x", array)], **more))


def test_a_request_that_begins_as_one_before_is_not_parsed() -> None:
    codec = GrpcCodec()
    assert opened(codec, request(X, outputs=("predict",))).head is None, "nothing is known yet"
    asked = opened(codec, request(X + 1, outputs=("predict",)))
    assert asked.head is not None and asked.outputs == ("predict",) and asked.tensors is not None
    assert asked.tensors[0].array.tolist() == (X + 1).tolist() and asked.tensors[0].array.flags.aligned
    assert opened(codec, request(X.T.copy(), outputs=("predict",))).head is None, "another shape"


class Seen(RowRunner):
    """Gives back its input, and keeps whether it was aligned."""

    def __init__(self) -> None:
        super().__init__()
        self.aligned: list[bool] = []

    def arrays(self, asked: Asked) -> tuple[dict[str, Any], tuple[str, ...]]:
        assert asked.tensors is not None
        return {"x": asked.tensors[0].array}, ("y",)

    def predict(self, arrays: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        self.aligned.append(arrays["x"].flags.aligned)
        return Outputs({"y": arrays["x"] * 2})


def test_what_lies_in_the_request_is_aligned_before_a_model_sees_it() -> None:
    codec, runner = GrpcCodec(), Seen()
    opened(codec, request())
    runner.prepare(opened(codec, request()))
    parts = []
    for n in range(3):
        part = runner.known(codec.open(Call("grpc", "ModelInfer", request(X + n), PROTO, codec)))
        assert part is not None and not part.inputs[0]["x"].flags.aligned, "there is something to align"
        assert runner.one(part)["y"].tolist() == (2 * (X + n)).tolist()
        parts.append(part)
    together = [rows["y"].tolist() for rows in runner.many(parts)]
    assert together == [(2 * (X + n)).tolist() for n in range(3)]
    assert len(runner.aligned) > 4 and all(runner.aligned)


def test_what_has_no_head_is_parsed_each_time() -> None:
    for body in (request(raw=False), request(np.array([b"a", b"b"], object)), request(X > 2),
                 write_request(Inference("m", tensors=[Tensor("x", X), Tensor("y", X)])),
                 write_request(Inference("m", tensors=[Tensor("x", X, "FP32", {"content_type": "np"})])),
                 request(np.empty((0, 4), "f4"))):
        codec = GrpcCodec()
        assert told(codec, body) == told(codec, body) == told(GrpcCodec(), body)
        assert opened(codec, body).head is None


def test_heads_of_one_length_take_turns() -> None:
    codec = GrpcCodec()
    a, b = request(id="a"), request(id="b")
    opened(codec, a)
    for _ in range(AGAIN):
        assert opened(codec, b).id == "b"
    assert opened(codec, b).head is not None and opened(codec, a).id == "a"


@given(st.integers(0, len(request(id="abc")) - 1), st.integers(0, 255))
@some
def test_a_request_of_a_known_length_is_what_protobuf_says(at: int, byte: int) -> None:
    good = request(id="abc")
    odd = good[:at] + bytes((byte,)) + good[at + 1:]
    codec = GrpcCodec()
    opened(codec, good)
    assert told(codec, odd) == told(GrpcCodec(), odd)
    assert told(codec, good) == told(GrpcCodec(), good), "and the odd one has left nothing"


def test_contents_that_another_field_holds_are_no_head() -> None:
    """The end of the bytes looks like raw contents, but is inside another field."""
    message = pb.ModelInferRequest.FromString(request())
    raw = message.raw_input_contents[0]
    tail = pb.ModelInferRequest(raw_input_contents=[raw]).SerializeToString()
    unknown = b"\x7a" + bytes((len(tail),)) + tail  # field 15, which nobody knows
    body = message.SerializeToString() + unknown
    codec = GrpcCodec()
    opened(codec, body)
    assert opened(codec, body).head is None


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.sampled_from(["f4", "f8", "i8", "?", ">i4"]),
       st.booleans(), st.sampled_from(["", "ä1"]), st.booleans())
@some
def test_answers_of_one_prediction(sizes: list[int], dtype: str, two: bool, id_: str, stream: bool) -> None:
    total = sum(sizes)
    arrays = Outputs(a=np.arange(total * 3).reshape(total, 3).astype(dtype))
    if two:
        arrays["b"] = np.arange(total).astype(dtype)
    codec, rows = (StreamCodec() if stream else GrpcCodec()), Rows(arrays, sizes)
    write = codec.writer(rows, SERVED)
    assert write is not None
    asked = Asked("flower", id=id_, raw=True)
    for (start, end), piece in zip(rows.edges, rows, strict=True):
        message = response_message(Inference("flower", "7", id_, {}, [Tensor(n, v) for n, v in piece.items()]))
        wanted = pb.ModelStreamInferResponse(infer_response=message) if stream else message
        assert write(asked, start, end) == (wanted.SerializeToString(deterministic=True), PROTO)
        assert codec.write(asked, piece, SERVED) == write(asked, start, end)
    assert write(Asked("flower", raw=False), 0, 1) is None, "typed: by itself"


def test_large_answers_and_those_that_are_not_plain_arrays() -> None:
    big = np.random.default_rng(0).random((4, 16_384), np.float32)
    rows = Rows(Outputs(y=big), [1, 3])
    write = GrpcCodec().writer(rows, SERVED)
    assert write is not None
    for start, end in rows.edges:
        assert write(Asked("flower"), start, end) == GrpcCodec().write(Asked("flower"), {"y": big[start:end]}, SERVED)
    for odd in (np.array(["a", "b"]), np.array([1j, 2]), np.empty((2, 0))):
        assert GrpcCodec().writer(Rows(Outputs(y=odd), [1, 1]), SERVED) is None


def test_ids_are_unlike_and_sort_by_time() -> None:
    ids = [new_id(n * 500_000) for n in range(3 * DRAWN)]
    assert len(set(ids)) == len({id_[12:] for id_ in ids}) == len(ids)
    assert all(len(id_) == 32 and int(id_, 16) >= 0 for id_ in ids)
    assert [id_[:12] for id_ in ids] == sorted(id_[:12] for id_ in ids)


async def test_a_call_that_comes_alone_is_run_at_once(tmp_path: Path, two_models: list[dict[str, Any]]) -> None:
    call = lambda: grpc_call("iris-onnx", Tensor("x", np.ones((1, 4), "f4")))  # noqa: E731
    async with open_plane(tmp_path, models=two_models[1:]) as plane:
        for _ in range(3000):  # how short predictions are is measured: on a busy machine it takes more to show
            await plane.handle([call()])
            first = plane.submit(call(), lambda answer: None)
            second = plane.submit(call(), lambda answer: None)
            at_once = first.settled, second.settled
            while not (first.settled and second.settled):
                await asyncio.sleep(0)
            if at_once[0]:
                break
        assert at_once == (True, False) and first.status == second.status == "OK", "the next waits for the turn's end"
