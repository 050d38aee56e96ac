"""BentoML: a service with one asynchronous API, the fastest of its kinds here. REST only."""

from __future__ import annotations

import os

from tests.benchmarks.peers.peer import Order, Peer, load, program

PEER = Peer("bentoml", "1.4.39", ("bentoml==1.4.39",), rest="/predict", rows_in="rows",
            how="an async API (a sync one is slower); access log and metrics off")


def main() -> None:
    order = Order.read()
    order.to_env()
    os.environ |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(order.folder),
                   "PATH": f"{os.path.dirname(program('bentoml'))}:{os.environ['PATH']}"}
    os.execv(program("bentoml"), ["bentoml", "serve", "tests.benchmarks.peers.bentoml:Scored", "--host", "127.0.0.1",
                                  "--port", str(order.http)])


if "BENCH_ORDER" in os.environ:
    import bentoml
    import numpy as np

    @bentoml.service(workers=1, logging={"access": {"enabled": False}}, metrics={"enabled": False})
    class Scored:
        def __init__(self) -> None:
            file = Order.from_env().file
            self._predict, self._dtype = load(file), np.float32 if file.suffix == ".onnx" else np.float64

        @bentoml.api
        async def predict(self, rows: list) -> list:
            return self._predict(np.array(rows, self._dtype)).tolist()


if __name__ == "__main__":
    main()
