"""Damaged requests by the thousand, mixed with good ones: only documented statuses, neighbours untouched, and the
server goes on, no larger than before."""

import asyncio
import gc
import random
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from modelyard.core.inference import BINARY, PROTO, Inference, read_response, write_request
from modelyard.core.tensors import DTYPES, Tensor
from modelyard.scoring.calls import Answer, Call
from modelyard.scoring.codecs import GrpcCodec, RestCodec, ScoreCodec, StreamCodec
from modelyard.scoring.dataplane import DataPlane
from modelyard.wire import inference_pb2 as pb
from tests.unit.scoring.planes import grpc_call, infer, open_plane

FLOWER = np.array([[5.1, 3.5, 1.4, 0.2]])
ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
SEEDS = [
    write_request(Inference("iris", tensors=[Tensor("x", FLOWER)])),
    write_request(Inference("iris", tensors=[Tensor("x", FLOWER)], raw=False, outputs=("predict",))),
    write_request(Inference("iris-onnx", tensors=[Tensor("x", FLOWER.astype("f4"))])),
    write_request(
        Inference("iris", "4", "id", {"p": 1}, [Tensor("t", np.array([["a", "bc"]])), Tensor("h", FLOWER.astype("f2"))])
    ),
]
JSON_SEED = (
    b'{"id": "1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [5, 3, 1, 0],'
    b'"parameters": {}}], "outputs": [{"name": "predict", "parameters": {"binary_data": true}}]}'
)
JSON_SEEDS = [JSON_SEED, b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[[5.1,3.5,1.4,0.2]]}]}']
FLOATS = FLOWER.astype("f4").tobytes()
TEXTS = b"".join(len(word).to_bytes(4, "little") + word for word in (b"a", b"", b"\xff\xfe", b"word"))
BINARY_SEEDS: list[tuple[str, list[tuple[str, bytes]]]] = [
    ("iris", [("FP32", FLOATS)]), ("iris-onnx", [("FP32", FLOATS)]), ("iris", [("FP64", FLOWER.tobytes())]),
    ("iris", [("BYTES", TEXTS)]), ("iris-onnx", [("FP32", FLOATS), ("BYTES", TEXTS)])]
"""A model, and the type and the bytes of each tensor."""
ODD = [None, True, -1, 0, 1, 2**31, 2**62, 2**63, 1e308, -0.5, "", "x", "FP64", "BYTES", [], [1], [[1], [2, 3]], {},
       {"data": 1}, [None], ["a", 1], "\ud800"]


def mutate(seed: bytes, dice: random.Random) -> bytes:
    raw = bytearray(seed)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(raw) + 1)
        what = dice.randrange(5)
        if what == 0 and at < len(raw):
            raw[at] ^= 1 << dice.randrange(8)
        elif what == 1:
            del raw[at : at + dice.randint(1, 9)]
        elif what == 2:
            raw[at:at] = dice.randbytes(dice.randint(1, 9))
        elif what == 3 and at < len(raw):
            raw[at] = dice.choice((0, 0x7F, 0x80, 0xFF))
        else:
            raw[at:at] = raw[: dice.randint(0, len(raw))]
    return bytes(raw)


def mutated_message(dice: random.Random) -> bytes:
    """A request that parses, with fields that do not fit together."""
    message = pb.ModelInferRequest.FromString(dice.choice(SEEDS))
    for _ in range(dice.randint(1, 3)):
        tensor = dice.choice(message.inputs) if message.inputs else message.inputs.add()
        what = dice.randrange(8)
        if what == 0:
            tensor.datatype = dice.choice([*DTYPES, "FP8", ""])
        elif what == 1:
            tensor.shape[:] = [dice.choice((-1, 0, 1, 2, 4, 2**40, 2**62)) for _ in range(dice.randint(0, 40))]
        elif what == 2:
            message.raw_input_contents.append(dice.randbytes(dice.randint(0, 40)))
        elif what == 3:
            del message.raw_input_contents[:]
        elif what == 4:
            tensor.contents.int_contents.extend([dice.randint(-(2**31), 2**31 - 1)] * dice.randint(1, 8))
        elif what == 5:
            message.inputs.add().CopyFrom(tensor)
        elif what == 6:
            message.outputs.add(name=dice.choice(("predict", "predict_proba", "label", "", "no")))
        else:
            message.model_name = dice.choice(("iris", "iris-onnx", "nobody", "\x00", "n" * 1000))
    return message.SerializeToString()


def mutated_json(value: Any, dice: random.Random) -> Any:
    """The same document with odd values in odd places."""
    if dice.random() < 0.03:
        return dice.choice(ODD)
    if isinstance(value, dict):
        return {dice.choice((*[k] * 20, "name")): mutated_json(v, dice) for k, v in value.items()}
    if isinstance(value, list):
        return [mutated_json(v, dice) for v in value for _ in range(dice.choice((0, 2, *[1] * 20)))]
    return value


def dumped(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate, or a number over 64 bits
        import json

        return json.dumps(value).encode("utf-8", "surrogatepass")


def grpc_body(dice: random.Random) -> Call:
    body = mutated_message(dice) if dice.random() < 0.5 else mutate(dice.choice(SEEDS), dice)
    return Call("grpc", "ModelInfer", body, PROTO, dice.choice((GrpcCodec(), StreamCodec())))


def rest_body(dice: random.Random) -> Call:
    if dice.random() < 0.15:
        return Call("score", "score", mutate(b'{"data": [[5.1, 3.5, 1.4, 0.2]]}', dice), "", ScoreCodec(), "iris")
    seed = dice.choice(JSON_SEEDS)
    body = dumped(mutated_json(orjson.loads(seed), dice)) if dice.random() < 0.5 else mutate(seed, dice)
    options = dice.choice((None, None, 10, len(body), len(body) + 1))
    return Call("rest", "ModelInfer", body, BINARY, RestCodec(), dice.choice(("iris", "iris-onnx")), options=options)


def binary_body(dice: random.Random) -> Call:
    """The binary extension: a JSON head that says which bytes behind it are whose, and is wrong about it."""
    name, behind = dice.choice(BINARY_SEEDS)
    head: Any = {"inputs": [
        {"name": f"x{n}", "datatype": datatype, "shape": [1, 4], "parameters": {"binary_data_size": len(raw)}}
        for n, (datatype, raw) in enumerate(behind)],
        "parameters": {"binary_data_output": dice.random() < 0.5}}
    for tensor in head["inputs"]:
        if dice.random() < 0.3:
            tensor["parameters"]["binary_data_size"] = dice.choice((*ODD, 3, 15, 17, 33, 2**40))
        if dice.random() < 0.2:
            tensor["shape"] = dice.choice(([4], [0, 4], [2, 4], [1, 4] * 20, [2**62, 4], [-1, 4], []))
        if dice.random() < 0.1:
            tensor["datatype"] = dice.choice([*DTYPES, "FP8", ""])
    written = dumped(mutated_json(head, dice) if dice.random() < 0.5 else head)
    if dice.random() < 0.1:
        written = mutate(written, dice)
    raw = b"".join(raw for _, raw in behind)
    if dice.random() < 0.3:
        raw = mutate(raw, dice)
    length = len(written) if dice.random() < 0.8 else dice.choice((0, 1, len(written) - 1, len(written) + 1, 10**12))
    return Call("rest", "ModelInfer", written + raw, BINARY, RestCodec(), name, options=length)


def resident_mib() -> float:
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * 4096 / 2**20


async def bombard(plane: DataPlane, dice: random.Random, make: Any, seen: dict[str, int]) -> int:
    """One bunch of calls at once: one good one among up to fifteen damaged ones."""
    calls = [make(dice) for _ in range(dice.randint(1, 15))]
    at = dice.randrange(len(calls) + 1)
    good = grpc_call("iris", Tensor("x", FLOWER))
    async with asyncio.timeout(60):
        answers: list[Answer] = await plane.handle([*calls[:at], good, *calls[at:]])
    assert len(answers) == len(calls) + 1
    kept = answers.pop(at)
    assert kept.error is None and read_response(kept.body).tensors[0].array.tolist() == [0], kept.error
    for call, answer in zip(calls, answers, strict=True):
        assert answer.status in ALLOWED, (answer.error, call.body)
        seen[answer.status] = seen.get(answer.status, 0) + 1
    return len(calls)


@pytest.mark.parametrize("many", [300, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [grpc_body, rest_body, binary_body])
async def test_damaged_requests(tmp_path: Path, two_models: list[dict[str, Any]], make: Any, many: int) -> None:
    dice = random.Random(20261123)
    seen: dict[str, int] = {}
    async with open_plane(tmp_path, models=two_models) as plane:
        done, before = 0, 0.0
        while done < many:
            done += await bombard(plane, dice, make, seen)
            if not before and done >= many // 4:
                before = await asyncio.to_thread(resident_mib)
        grown = await asyncio.to_thread(resident_mib) - before
        assert all(lane.runner is not None and lane.runner.batched for lane in plane._lanes)
        assert plane.metrics.in_flight == 0 == sum(lane.waiting for lane in plane._lanes)
        answer = await plane.handle([grpc_call("iris", Tensor("x", FLOWER))])
        assert answer[0].status == "OK"
    assert seen["OK"] > many // 60 and seen["INVALID_ARGUMENT"] > many // 3, seen
    assert grown < 24, f"{grown:.1f} MiB more after three quarters of {many} calls"


async def test_damaged_requests_to_a_scoring_file(tmp_path: Path) -> None:
    dice = random.Random(1)
    code = "import numpy as np\ndef run_batch(data: np.ndarray):\n    return data.sum(axis=1)\n"
    async with open_plane(tmp_path, code) as plane:
        for n in range(600):
            call = grpc_body(dice) if n % 2 else rest_body(dice)
            if call.protocol == "grpc":
                call.body = call.body.replace(b"\x04iris", b"\x06flower")
            answer = (await asyncio.wait_for(plane.handle([call, grpc_call("flower", Tensor("x", FLOWER))]), 30))[0]
            assert answer.status in {*ALLOWED, "INTERNAL"}, (answer.error, call.body)
        assert await infer(plane, FLOWER) == {"output-0": [10.2]}
