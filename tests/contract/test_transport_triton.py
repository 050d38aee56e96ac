"""A client that others wrote, unmodified: tritonclient over gRPC and HTTP, in an environment of its own (its pins
do not go with ours on every Python)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.transports import Served

pytestmark = pytest.mark.slow  # installs a package
PROGRAM = r"""
import queue, sys
import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http

x = np.arange(12, dtype=np.float32).reshape(3, 4)

def ask(kind, value=x, **how):
    given = kind.InferInput("x", list(value.shape), "FP32")
    given.set_data_from_numpy(value, **how)
    return [given]

def same(result, value=x):
    assert np.array_equal(result.as_numpy("x"), value), result.get_response()

grpc = over_grpc.InferenceServerClient(sys.argv[1])
assert grpc.is_server_live() and grpc.is_server_ready() and grpc.is_model_ready("flower")
assert grpc.get_server_metadata().name == "modelyard" and grpc.get_model_metadata("flower").name == "flower"
same(grpc.infer("flower", ask(over_grpc), request_id="7", client_timeout=10))
same(grpc.infer("flower", ask(over_grpc), outputs=[over_grpc.InferRequestedOutput("x")], headers={"x-request-id": "8"}))
for algorithm in ("gzip", "deflate"):
    same(grpc.infer("flower", ask(over_grpc), compression_algorithm=algorithm))
try:
    grpc.infer("nobody", ask(over_grpc))
    raise SystemExit("nobody answered")
except over_grpc.InferenceServerException as exc:
    assert "NOT_FOUND" in exc.status() and "nobody" in exc.message(), exc

answers = queue.Queue()
grpc.start_stream(lambda result, error: answers.put((result, error)))
for n in range(20):
    grpc.async_stream_infer("nobody" if n == 7 else "flower", ask(over_grpc, x + n), request_id=str(n))
for n in range(20):
    result, error = answers.get(timeout=20)
    if n == 7:
        assert "NOT_FOUND" in str(error), error
    else:
        assert error is None and result.get_response().id == str(n), (n, error)
        same(result, x + n)
grpc.stop_stream()

http = over_http.InferenceServerClient(sys.argv[2])
assert http.is_server_live() and http.is_server_ready() and http.is_model_ready("flower")
assert http.get_model_metadata("flower")["name"] == "flower"
for asked in (True, False):
    for answered in (True, False):
        same(http.infer("flower", ask(over_http, binary_data=asked),
                        outputs=[over_http.InferRequestedOutput("x", binary_data=answered)]))
print("fine")
"""


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has tritonclient."""
    folder = tmp_path_factory.mktemp("triton")
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder / "env"], check=True, timeout=60)
    python = folder / "env/bin/python"
    subprocess.run([uv, "pip", "install", "-q", "--python", python, "tritonclient[grpc,http]"], check=True, timeout=300)
    return python


def test_tritonclient_infers_streams_and_asks(served: Served, triton: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([triton, program, served.replica.grpc, served.replica.http], capture_output=True, text=True,
                          timeout=120)
    assert done.stdout == "fine\n", done.stdout + done.stderr
