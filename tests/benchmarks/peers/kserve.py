"""KServe: a custom Model that does what its scikit-learn server does, over gRPC and REST v2."""

from __future__ import annotations

from tests.benchmarks.peers.peer import Order, Peer, load

PEER = Peer("kserve", "0.21.0", ("kserve==0.21.0",), grpc=True, env={"KSERVE_LOGLEVEL": "WARNING"},
            how="its log lines and warnings for each call are switched off; one worker, on uvloop")


def main() -> None:
    import logging

    from kserve import InferOutput, InferResponse, Model, ModelServer
    from kserve.logging import configure_logging
    from kserve.utils.utils import generate_uuid

    order = Order.read()

    class Scored(Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(order.model)
            self.predict_rows = load(order.file)
            self.ready = True

        async def predict(self, payload, headers=None, response_headers=None):  # type: ignore[no-untyped-def]
            values = self.predict_rows(payload.inputs[0].as_numpy())
            datatype = "INT64" if values.dtype.kind == "i" else "FP32"
            output = InferOutput("output-0", list(values.shape), datatype)
            output.set_data_from_numpy(values, binary_data=False)
            return InferResponse(generate_uuid(), self.name, [output])

    model = Scored()
    server = ModelServer(http_port=order.http, grpc_port=order.grpc, workers=1, enable_grpc=True,
                         enable_latency_logging=False)
    configure_logging()  # it does so but once
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    server.start([model])


if __name__ == "__main__":
    main()
