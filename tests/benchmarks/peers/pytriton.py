"""pytriton: Triton's C++ front with a Python model behind it, with Triton's dynamic batching. gRPC and REST v2."""

from __future__ import annotations

import os
import sysconfig

from tests.benchmarks.peers.peer import Order, Peer, load

# Its Python stub looks for the interpreter's library, which it finds only where it is told.
PEER = Peer("pytriton", "0.7.0", ("nvidia-pytriton==0.7.0",), grpc=True, models=frozenset({"lr", "mlp"}),
            env={"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or ""},
            how="dynamic batching up to 64 rows, without a delay")


def main() -> None:
    import numpy as np
    from pytriton.decorators import batch
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    order = Order.read()
    predict, onnx = load(order.file), order.file.suffix == ".onnx"
    dtype, width = (np.float32, 784) if onnx else (np.float64, 4)

    @batch
    def run(**inputs):  # type: ignore[no-untyped-def]
        values = predict(next(iter(inputs.values())))
        return [values if onnx else values.reshape(-1, 1)]

    os.environ["PYTRITON_HOME"] = str(order.folder)
    config = TritonConfig(http_address="127.0.0.1", http_port=order.http, grpc_address="127.0.0.1",
                          grpc_port=order.grpc, allow_metrics=False)
    with Triton(config=config, workspace=str(order.folder / "workspace")) as server:
        server.bind(model_name=order.model, infer_func=run, inputs=[Tensor(name="x", dtype=dtype, shape=(width,))],
                    outputs=[Tensor(name="y", dtype=np.float32 if onnx else np.int64, shape=(-1,))],
                    config=ModelConfig(max_batch_size=64,
                                       batcher=DynamicBatcher(max_queue_delay_microseconds=0)), strict=False)
        server.serve()


if __name__ == "__main__":
    main()
