"""A data plane in this process, and calls to it as each transport would make them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelyard.core.inference import JSON, PROTO, Inference, read_response, write_request
from modelyard.core.tensors import Tensor
from modelyard.scoring.calls import Answer, Call
from modelyard.scoring.capture import CaptureLog
from modelyard.scoring.codecs import GrpcCodec, RestCodec, ScoreCodec
from modelyard.scoring.dataplane import DataPlane
from modelyard.scoring.image import Image
from modelyard.scoring.settings import Limits
from tests.unit.scoring.roots import make_root


@contextlib.asynccontextmanager
async def open_plane(
    folder: Path,
    score: str | None = None,
    models: Sequence[Mapping[str, Any]] = (),
    log: CaptureLog | None = None,
    **limits: int,
) -> AsyncIterator[DataPlane]:
    plane = DataPlane("flower", Limits(**limits), log)
    await plane.load(await asyncio.to_thread(lambda: Image.read(make_root(folder, score, models))), "7")
    try:
        yield plane
    finally:
        plane.close()


def grpc_call(model: str, *tensors: Tensor, raw: bool = True, deadline: float = math.inf, **more: Any) -> Call:
    body = write_request(Inference(model, tensors=list(tensors), raw=raw, **more))
    return Call("grpc", "ModelInfer", body, PROTO, GrpcCodec(), deadline=deadline)


def score_call(body: Any) -> Call:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Call("score", "score", raw, JSON, ScoreCodec())


def rest_call(model: str, body: Any) -> Call:
    return Call("rest", "ModelInfer", json.dumps(body).encode(), JSON, RestCodec(), model=model)


async def infer(plane: DataPlane, *arrays: Any, **named: Any) -> dict[str, Any]:
    """One gRPC call with these arrays (``x0`` … or by name); outputs as nested lists, embedded JSON parsed."""
    given = {f"x{i}": a for i, a in enumerate(arrays)} | named
    tensors = [a if isinstance(a, Tensor) else Tensor(n, np.asarray(a)) for n, a in given.items()]
    answer = (await plane.handle([grpc_call("flower", *tensors)]))[0]
    if answer.error is not None:
        raise answer.error
    return {
        t.name: json.loads(t.array.item()) if t.parameters.get("content_type") == JSON else t.array.tolist()
        for t in read_response(answer.body).tensors
    }


async def score(plane: DataPlane, body: Any) -> Any:
    answer: Answer = (await plane.handle([score_call(body)]))[0]
    if answer.error is not None:
        raise answer.error
    return json.loads(answer.body)
