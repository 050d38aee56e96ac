"""MLServer: a custom runtime that does what its scikit-learn runtime does, over gRPC and REST v2."""

from __future__ import annotations

import json
import os

from tests.benchmarks.peers.peer import Order, Peer, load, program

# With uvloop 0.22 and later its gRPC never answers; with parallel workers (its default: 1) it does half as much.
PEER = Peer("mlserver", "1.7.1", ("mlserver==1.7.1", "uvloop==0.21.0"), grpc=True,
            how="parallel_workers=0 (its default, 1, is half as fast); no metrics endpoint, no access log")

try:
    from mlserver import MLModel
    from mlserver.codecs import NumpyCodec
    from mlserver.types import InferenceRequest, InferenceResponse
except ImportError:  # not in its environment: only PEER is wanted
    pass
else:
    class Scored(MLModel):  # type: ignore[misc]
        async def load(self) -> bool:
            self._predict = load(Order.from_env().file)
            return True

        async def predict(self, payload: InferenceRequest) -> InferenceResponse:
            rows = self.decode(payload.inputs[0], default_codec=NumpyCodec)
            values = self._predict(rows)
            output = NumpyCodec.encode_output("output-0", values)
            return InferenceResponse(model_name=self.name, outputs=[output])


def main() -> None:
    order = Order.read()
    order.to_env()
    order.folder.joinpath("settings.json").write_text(json.dumps({
        "debug": False, "host": "127.0.0.1", "http_port": order.http, "grpc_port": order.grpc, "parallel_workers": 0,
        "metrics_endpoint": None, "use_structured_logging": False}))
    folder = order.folder / order.model
    folder.mkdir(exist_ok=True)
    folder.joinpath("model-settings.json").write_text(json.dumps({
        "name": order.model, "implementation": "tests.benchmarks.peers.mlserver.Scored"}))
    os.execv(program("mlserver"), ["mlserver", "start", str(order.folder)])


if __name__ == "__main__":
    main()
