"""Hundreds of damaged requests: only documented statuses, and the server goes on."""

import random
from pathlib import Path
from typing import Any

import numpy as np

from modelyard.core.inference import BINARY, PROTO, Inference, write_request
from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Call
from modelyard.scoring.codecs import GrpcCodec, RestCodec, ScoreCodec, StreamCodec
from tests.unit.scoring.planes import infer, open_plane

FLOWER = np.array([[5.1, 3.5, 1.4, 0.2]])
ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
SEEDS = [
    write_request(Inference("flower", tensors=[Tensor("x", FLOWER)])),
    write_request(Inference("flower", tensors=[Tensor("x", FLOWER)], raw=False, outputs=("predict",))),
    write_request(
        Inference("iris", "4", "id", {"p": 1}, [Tensor("t", np.array([["a", "bc"]])), Tensor("h", FLOWER.astype("f2"))])
    ),
]
JSON_SEED = (
    b'{"id": "1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [5, 3, 1, 0],'
    b'"parameters": {}}], "outputs": [{"name": "predict", "parameters": {"binary_data": true}}]}'
)


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


async def test_damaged_requests(tmp_path: Path, two_models: list[dict[str, Any]]) -> None:
    dice = random.Random(20261123)
    seen: dict[str, int] = {}
    async with open_plane(tmp_path, models=two_models[:1]) as plane:
        for n in range(3000):
            if n % 3 == 2:
                codec, body, kind = RestCodec(), mutate(JSON_SEED, dice), BINARY
            elif n % 11 == 0:
                codec, body, kind = ScoreCodec(), mutate(b'{"data": [[5.1, 3.5, 1.4, 0.2]]}', dice), ""
            else:
                codec, body, kind = dice.choice((GrpcCodec(), StreamCodec())), mutate(dice.choice(SEEDS), dice), PROTO
            call = Call(
                "grpc",
                "ModelInfer",
                body,
                kind,
                codec,
                model="flower" if kind != PROTO else "",
                options=dice.choice((None, 10, len(body))) if kind == BINARY else None,
            )
            answer = (await plane.handle([call]))[0]
            assert answer.status in ALLOWED, (answer.error, body)
            seen[answer.status] = seen.get(answer.status, 0) + 1
        assert await infer(plane, FLOWER) == {"predict": [0]}
    assert seen["OK"] > 50 and seen["INVALID_ARGUMENT"] > 500 and seen["NOT_FOUND"] > 20, seen
