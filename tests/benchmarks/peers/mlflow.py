"""MLflow: ``mlflow models serve`` of a model saved with its scikit-learn flavour. REST only."""

from __future__ import annotations

import os

from tests.benchmarks.peers.peer import Order, Peer, program

PEER = Peer("mlflow", "3.17.2", ("mlflow==3.17.2",), rest="/invocations", rows_in="inputs",
            models=frozenset({"lr", "rf"}),
            how="one worker, in its own environment; no flag switches its access log off")


def main() -> None:
    order = Order.read()
    saved = order.folder / "model"
    if not saved.exists():
        import joblib
        import mlflow.sklearn

        mlflow.sklearn.save_model(joblib.load(order.file), saved, serialization_format="cloudpickle",
                                  pip_requirements=["scikit-learn"])
    os.environ["PATH"] = f"{os.path.dirname(program('mlflow'))}:{os.environ['PATH']}"
    os.execv(program("mlflow"), ["mlflow", "models", "serve", "-m", str(saved), "-h", "127.0.0.1",
                                 "-p", str(order.http), "-w", "1", "--env-manager", "local"])


if __name__ == "__main__":
    main()
