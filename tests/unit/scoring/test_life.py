"""A replica's beginning and end: what cannot start says so; who leaves loses no call."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.client import HTTPConnection, RemoteDisconnected
from pathlib import Path
from typing import Any

import grpc
import pytest

from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.unit.scoring.roots import SERVICES, Replica, command, launch, make_root

pytestmark = pytest.mark.slow  # real programs are started and stopped

ECHO = "import time\ndef run(data):\n    time.sleep(data.get('sleep', 0))\n    return data\n"
RETRY = [
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": [{}],
                        "retryPolicy": {
                            "maxAttempts": 5,
                            "initialBackoff": "0.05s",
                            "maxBackoff": "1s",
                            "backoffMultiplier": 2,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ]
            }
        ),
    ),
    ("grpc.default_authority", "flower"),  # of several addresses it would be their list, which is no authority
]


def request(body: Any) -> pb.ModelInferRequest:
    tensor = {
        "name": "b",
        "datatype": "BYTES",
        "shape": [1],
        "parameters": {"content_type": pb.InferParameter(string_param="application/json")},
    }
    request = pb.ModelInferRequest(model_name="flower", inputs=[tensor])
    request.inputs[0].contents.bytes_contents.append(json.dumps(body).encode())
    return request


def test_a_failing_init_exits_3_with_its_reason(tmp_path: Path) -> None:
    root = make_root(tmp_path, "def init():\n    raise RuntimeError('no such luck')\ndef run(data):\n    return 1\n")
    with launch(root, wait=False) as replica:
        assert replica.process.wait(30) == 3
        last = replica.log.read_text().strip().splitlines()[-1]
        assert last == "modelyard: cannot start: init() of score.py failed: RuntimeError: no such luck"
        assert "line 2, in init" in replica.log.read_text(), "the traceback is in the log"


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    root = make_root(tmp_path, ECHO)
    with launch(root) as first:
        arguments = ["serve", "--grpc", first.grpc, "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
        done = subprocess.run([*command(root), *arguments], capture_output=True, text=True, timeout=30)
        assert done.returncode == 1 and f"cannot listen on {first.grpc}" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MODELYARD_LIMITS": "{"}, "MODELYARD_LIMITS is not JSON"),
        ({"MODELYARD_LIMITS": '{"timeout_ms": 0}'}, "timeout_ms"),
        ({"MODELYARD_REPLICA": "x"}, "MODELYARD_REPLICA"),
        ({"MODELYARD_CAPTURE": "[]"}, "MODELYARD_CAPTURE"),
    ],
)
def test_bad_settings_exit_2(tmp_path: Path, env: dict[str, str], said: str) -> None:
    with launch(make_root(tmp_path, ECHO), wait=False, env=env) as replica:
        assert replica.process.wait(30) == 2 and said in replica.log.read_text()


def test_an_image_without_packages_for_this_python_says_so(tmp_path: Path) -> None:
    root = make_root(tmp_path, ECHO)
    (tmp_path / "opt/env/lib").rename(tmp_path / "opt/env/elsewhere")
    done = subprocess.run(command(root), capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "no packages for python3" in done.stderr


def test_health_answers_while_models_load_and_while_run_is_busy(tmp_path: Path) -> None:
    code = "import time\ndef init():\n    time.sleep(1.5)\n" + ECHO
    with launch(make_root(tmp_path, code), wait=False) as replica:
        while b"loading" not in replica.log.read_bytes():
            time.sleep(0.02)
        assert replica.get("/livez")[0] == 200 and replica.get("/readyz")[0] == 503
        with grpc.insecure_channel(replica.grpc) as channel:
            stub = GRPCInferenceServiceStub(channel)
            assert not stub.ServerReady(pb.ServerReadyRequest()).ready
            with pytest.raises(grpc.RpcError) as error:
                stub.ModelInfer(request({}))
            assert error.value.code().name == "UNAVAILABLE"
            replica.wait_ready()
            slow = stub.ModelInfer.future(request({"sleep": 1}))
            began = time.monotonic()
            assert stub.ServerLive(pb.ServerLiveRequest()).live and replica.get("/livez")[0] == 200
            assert time.monotonic() - began < 0.7 and not slow.done()
            assert slow.result().model_name == "flower"


def test_unix_sockets(tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path}/{n}.sock" for n in ("grpc", "http", "admin")]
    arguments = ["serve", "--grpc", addresses[0], "--http", addresses[1], "--admin", addresses[2]]
    process = subprocess.Popen(
        [*command(make_root(tmp_path, ECHO)), *arguments],
        stderr=subprocess.DEVNULL,
        env={"MODELYARD_DEPLOYMENT": "flower"},
    )
    try:
        with grpc.insecure_channel(addresses[0]) as channel:
            grpc.channel_ready_future(channel).result(30)
            stub = GRPCInferenceServiceStub(channel)
            end = time.monotonic() + 20
            while not stub.ServerReady(pb.ServerReadyRequest()).ready and time.monotonic() < end:
                time.sleep(0.05)
            assert stub.ModelInfer(request({"a": 1})).model_name == "flower"
        process.send_signal(signal.SIGTERM)
        assert process.wait(25) == 0
    finally:
        process.kill()
        process.wait()


class Load:
    """Callers of two kinds, with the retries that are promised to be enough."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas, self.failed, self.made = replicas, [], 0
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=t) for t in (self._grpc, self._grpc, self._http, self._http)]

    def _grpc(self) -> None:
        while not self.stopping.is_set():
            here = self.replicas
            with grpc.insecure_channel(f"ipv4:{','.join(r.grpc for r in here)}", RETRY) as channel:
                stub = GRPCInferenceServiceStub(channel)
                while not self.stopping.is_set() and here is self.replicas:
                    try:
                        stub.ModelInfer(request({"sleep": 0.002}), timeout=10)
                        self.made += 1
                    except grpc.RpcError as exc:
                        self.failed.append(f"{exc.code()} {exc.details()}")

    def _http(self) -> None:
        """Keep-alive; told to close, or closed before a byte of the answer: the other replica is asked."""
        order, connection = list(self.replicas), None
        while not self.stopping.is_set():
            for _ in range(4):
                try:
                    connection = connection or HTTPConnection(order[0].http, timeout=10)
                    connection.request("POST", "/score", b'{"sleep": 0.002}')
                    answer = connection.getresponse()
                    answer.read()
                except (ConnectionError, RemoteDisconnected):
                    connection = None
                    order.reverse()
                    continue
                if answer.getheader("Connection") == "close":
                    connection = None
                    order.reverse()
                if answer.status != 200:
                    self.failed.append(str(answer.status))
                self.made += 1
                break
            else:
                self.failed.append("no replica took the call")


@pytest.mark.slow
def test_drain_under_load_fails_no_call(tmp_path: Path) -> None:
    """HTTP callers are led away by the answers. gRPC channels are led away by whoever is in front (the supervisor's
    relay): a grpcio server that stops while calls arrive may cancel one that it has not looked at."""
    roots = [make_root(tmp_path / str(n), ECHO) for n in range(2)]
    with launch(roots[0], spool=tmp_path / "s0", capture={"enabled": True}) as one, launch(roots[1]) as two:
        load = Load([one, two])
        for thread in load.threads:
            thread.start()
        time.sleep(1)
        load.replicas = [two]
        status, took = one.stop()
        after = load.made
        time.sleep(0.5)
        load.stopping.set()
        for thread in load.threads:
            thread.join(15)
        assert load.failed == [] and load.made > after > 200
        assert status == 0 and took <= 25
        assert "Traceback" not in one.log.read_text()
        assert not list((tmp_path / "s0").glob("*.live")), "capture was closed"


def test_sigterm_answers_what_is_in_flight(tmp_path: Path) -> None:
    with launch(make_root(tmp_path, ECHO)) as replica, grpc.insecure_channel(replica.grpc) as channel:
        slow = GRPCInferenceServiceStub(channel).ModelInfer.future(request({"sleep": 2.5}))
        time.sleep(0.3)
        status, took = replica.stop()
        assert status == 0 and 2 < took < 9
        assert slow.result().model_name == "flower"


@pytest.mark.slow
def test_sigterm_with_hanging_user_code_still_ends(tmp_path: Path) -> None:
    with (
        launch(make_root(tmp_path, ECHO), spool=tmp_path / "spool", capture={"enabled": True}) as replica,
        grpc.insecure_channel(replica.grpc) as channel,
    ):
        hanging = GRPCInferenceServiceStub(channel).ModelInfer.future(request({"sleep": 60}))
        time.sleep(0.3)
        status, took = replica.stop()
        assert status == 0 and took <= 25
        assert hanging.exception() is not None
        assert not list((tmp_path / "spool").glob("*.live"))


def test_drain_by_the_admin_socket(tmp_path: Path) -> None:
    with launch(make_root(tmp_path, ECHO)) as replica:
        connection = HTTPConnection(replica.http, timeout=5)
        connection.request("POST", "/score", b'{"a": 1}')
        first = connection.getresponse()
        assert first.read() == b'{"a":1}' and first.getheader("Connection") != "close"
        asked = urllib.request.Request(f"http://{replica.admin}/drain", method="POST")
        with urllib.request.urlopen(asked, timeout=5) as answer:
            assert answer.status == 202 and json.loads(answer.read())["draining"]
        assert replica.get("/readyz")[0] == 503 and replica.get("/livez")[0] == 200
        connection.request("POST", "/score", b'{"a": 2}')
        second = connection.getresponse()
        assert second.status == 200 and second.getheader("Connection") == "close", "answered, and led away"
        time.sleep(1.2)
        status, took = replica.stop()
        assert status == 0 and took < 3, "drained before: nothing to wait for"


def test_aiohttp_is_imported_for_whoever_needs_it(tmp_path: Path) -> None:
    """On the caller's address as on the admin's: what is chunked is answered, but only then is aiohttp there."""
    with launch(make_root(tmp_path, ECHO)) as replica:
        maps = Path(f"/proc/{replica.process.pid}/maps")
        assert replica.get("/metrics")[0] == 200 and replica.get("/v2", replica.http)[0] == 200
        assert replica.get("/nowhere")[0] == 404 and replica.get("/drain")[0] == 405
        assert "/aiohttp/" not in maps.read_text()
        for address, path, status in ((replica.http, "/score", 200), (replica.admin, "/spread", 202)):
            connection = HTTPConnection(address, timeout=20)
            connection.request("POST", path, iter([b'{"a":', b" 1}"]), encode_chunked=True,
                               headers={"Transfer-Encoding": "chunked"})
            with connection.getresponse() as answer:
                assert answer.status == status
                assert status == 202 or answer.read() == b'{"a":1}'
            connection.close()
        assert "/aiohttp/" in maps.read_text()


def test_what_it_may_import() -> None:
    """An image holds neither the control plane nor its libraries; the start needs the standard library only."""
    bare = "import sys; sys.path.insert(0, sys.argv[1]); import modelyard.scoring.{}, modelyard.core.errors"
    for module in ("settings", "image", "context", "launch"):
        subprocess.run([*command(SERVICES)[:3], "-c", bare.format(module), str(SERVICES)], check=True, timeout=30)
    heavy = ("import sys, modelyard.scoring.serve, modelyard.scoring.runner_score, modelyard.capture\n"
             "bad = {'aiohttp', 'pydantic', 'pyarrow', 'numpy', 'pandas', 'sklearn', 'modelyard.kernel',\n"
             "       'modelyard.client', 'modelyard.telemetry', 'modelyard.settings',\n"
             "       'modelyard.core.specs'} & set(sys.modules)\n"
             "assert not bad, bad")
    subprocess.run([sys.executable, "-c", heavy], check=True, timeout=60)
