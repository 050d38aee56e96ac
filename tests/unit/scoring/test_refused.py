"""What a transport refuses before it is a call is counted, by the metrics and by capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest

from modelyard.core.inference import JSON
from modelyard.core.tensors import Tensor
from modelyard.scoring.oip import SERVICE
from modelyard.scoring.transport import Transport
from modelyard.scoring.transport_direct import DirectTransport
from modelyard.scoring.transport_h2 import H2Transport
from modelyard.scoring.transport_rest import RestTransport
from modelyard.wire import inference_pb2 as pb
from tests.unit.scoring.planes import grpc_call
from tests.unit.scoring.test_capture_policy import planned, reasons

LIMIT = 4096


async def over_grpc(address: str) -> None:
    large = grpc_call("flower", Tensor("x", np.zeros(LIMIT))).body
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{SERVICE}/ModelInfer")(large)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [_ async for _ in channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter([large]))]
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{SERVICE}/ModelMetadata")(
                pb.ModelMetadataRequest(name="nobody").SerializeToString())
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def over_rest(address: str) -> None:
    connector = aiohttp.UnixConnector(address.removeprefix("unix:"))
    async with aiohttp.ClientSession("http://localhost", connector=connector) as http:
        for path in ("/score", "/v2/models/flower/infer"):
            async with http.post(path, data=b" " * (LIMIT + 1), headers={"Content-Type": JSON}) as answer:
                assert answer.status == 413
        async with http.get("/v2/models/nobody") as answer:
            assert answer.status == 404


@pytest.mark.parametrize(("made", "over"), [
    (H2Transport, over_grpc), (DirectTransport, over_rest), (RestTransport, over_rest)])
async def test_what_is_too_large_is_counted_and_a_question_is_not(tmp_path: Path, made: type[Transport],
                                                                  over: Any) -> None:
    async with planned(tmp_path, "def run(data):\n    return 1\n", {"max_message_bytes": LIMIT}) as (plane, log):
        transport = made(address := f"unix:{tmp_path}/socket", plane)  # type: ignore[call-arg]
        await transport.start()
        try:
            await over(address)
        finally:
            await transport.stop(2)
        assert log.totals["refused"] == 2 and plane.metrics.total == 3
    assert reasons(tmp_path) == {"refused": 2}
