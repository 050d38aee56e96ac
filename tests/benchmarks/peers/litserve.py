"""LitServe: one worker, one request at a time. REST only."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.peers.peer import Order, Peer, load

PEER = Peer("litserve", "0.2.19", ("litserve==0.2.19", "uvloop"), rest="/predict", rows_in="rows",
            how="not batched (its batches wait for a timer); access log off")

try:
    import litserve
    import numpy as np
except ImportError:  # not in its environment: only PEER is wanted
    pass
else:
    class Scored(litserve.LitAPI):  # type: ignore[misc]
        def setup(self, device: str) -> None:
            file = Order.from_env().file
            self._predict, self._dtype = load(file), np.float32 if file.suffix == ".onnx" else np.float64

        def decode_request(self, request):  # type: ignore[no-untyped-def] # it makes of a type what is read
            return np.array(request["rows"], self._dtype)

        def predict(self, x: Any) -> Any:
            return self._predict(x)

        def encode_response(self, output: Any) -> Any:
            return {"rows": output.tolist()}


def main() -> None:
    order = Order.read()
    order.to_env()
    server = litserve.LitServer(Scored(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=order.http, num_api_servers=1, log_level="warning", access_log=False,
               generate_client_file=False)


if __name__ == "__main__":
    main()
