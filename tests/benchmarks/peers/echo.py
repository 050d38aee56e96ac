"""The floor: a server that reads a ModelInferRequest and gives its tensors back, on one of our two transports, as thin
as it can be written.

    python -m tests.benchmarks.peers.echo h2|grpc PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvloop

from modelyard.scoring.__main__ import _keep_memory
from modelyard.wire import inference_pb2 as pb

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/grpc")],
         "trailers": True}
OK = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}


def echo(body: bytes) -> bytes:
    asked = pb.ModelInferRequest.FromString(body)
    answer = pb.ModelInferResponse(model_name=asked.model_name, model_version="1", id=asked.id)
    for tensor in asked.inputs:
        answer.outputs.add(name="y", datatype=tensor.datatype, shape=tensor.shape)
    answer.raw_output_contents.extend(asked.raw_input_contents)
    return answer.SerializeToString()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    event = await receive()
    body = event["body"]
    while event.get("more_body"):
        event = await receive()
        body += event.get("body", b"")
    answer = echo(body[5:])
    await send(START)
    await send({"type": "http.response.body", "body": b"\0" + len(answer).to_bytes(4, "big") + answer})
    await send(OK)


async def h2(port: int) -> None:
    from h2corn import Config, Server

    await Server(app, Config(bind=(f"127.0.0.1:{port}",), grpc=True, http1=False, access_log=False, lifespan="off",
                             date_header=False, runtime_threads=1, max_concurrent_streams=2000,
                             h2_initial_stream_window_size=8 << 20, h2_initial_connection_window_size=16 << 20)).serve()


async def aio(port: int) -> None:
    import grpc

    async def answer(body: bytes, context: Any) -> bytes:
        return echo(body)

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference.GRPCInferenceService",
                                                                          {"ModelInfer": handler})])
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    _keep_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run({"h2": h2, "grpc": aio}[sys.argv[1]](int(sys.argv[2])))
