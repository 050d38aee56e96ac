"""The user's journey, all-in-one and one process a service, through the same URLs: register, build, deploy, score,
capture, watch, upgrade, roll back, refuse to delete what is used, take all away."""

import hashlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from modelyard import Client
from modelyard.wire import inference_pb2 as pb
from modelyard.wire.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.e2e import models
from tests.e2e.yard import Yard, until

pytestmark = pytest.mark.slow

FLOWER = [5.1, 3.5, 1.4, 0.2]
RETRY = [("grpc.service_config", json.dumps({"methodConfig": [{
    "name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.05s", "maxBackoff": "1s",
                                  "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}))]


def upload(yard: Yard, raw: bytes) -> str:
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    answer = yard.call("PUT", f"/v1/artifacts/{digest}", raw)
    assert answer.status in (200, 201), answer.body
    return digest


def register(yard: Yard, path: Path, **fields: Any) -> dict[str, Any]:
    body = {"artifact": upload(yard, path.read_bytes()), "filename": path.name, **fields}
    answer = yard.call("POST", "/v1/models", body)
    assert answer.status == 201, answer.body
    return answer.json


def build(yard: Yard, seconds: int = 180, **fields: Any) -> dict[str, Any]:
    answer = yard.call("POST", "/v1/images", fields)
    assert answer.status == 202, answer.body
    path = f"/v1/images/{answer.json['id']}"
    return until(lambda: (i := yard.call("GET", path + "?wait=20").json)["phase"] in ("ready", "failed") and i, seconds)


def healthy(yard: Yard, name: str, generation: int, seconds: int = 60) -> dict[str, Any]:
    def look() -> Any:
        d = yard.call("GET", f"/v1/deployments/{name}").json
        return d["phase"] in ("healthy", "failed", "degraded") and d["observed_generation"] == generation and d

    found = until(look, seconds, why=f"{name} generation {generation}")
    assert found["phase"] == "healthy", found
    return found


@pytest.fixture(scope="module")
def iris(yard: Yard, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """iris:1 (a poor one) and iris:2, an image of each by its own flavour, and a healthy deployment of the first."""
    folder = tmp_path_factory.mktemp("models")
    ones = [register(yard, models.save_iris(folder / f"iris{n}.skops", n), name="iris", framework="scikit-learn",
                     tags={"team": "flora"}, properties={"max_iter": str(n)}) for n in (2, 200)]
    images = [build(yard, name="iris-scorer", models=[m["id"]]) for m in ones]
    assert [i["phase"] for i in images] == ["ready", "ready"], images
    answer = yard.call("POST", "/v1/deployments", {
        "name": "iris", "image": images[0]["id"], "replicas": 2, "capture": {"enabled": True}})
    assert answer.status == 202, answer.body
    return {"models": ones, "images": images, "deployment": healthy(yard, "iris", 1)}


def infer(stub: GRPCInferenceServiceStub, rows: Any, typed: bool = False, name: str = "iris") -> pb.ModelInferResponse:
    x = np.asarray(rows, np.float32)
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=x.shape)
    request = pb.ModelInferRequest(model_name=name, inputs=[tensor])
    if typed:
        request.inputs[0].contents.fp32_contents.extend(x.ravel().tolist())
    else:
        request.raw_input_contents.append(x.tobytes())
    return stub.ModelInfer(request, timeout=20)


def test_registered(yard: Yard, iris: dict[str, Any]) -> None:
    assert [m["id"] for m in iris["models"]] == ["iris:1", "iris:2"]
    newest = yard.call("GET", "/v1/models/iris")
    assert newest.json["id"] == "iris:2" and newest.headers["content-location"].endswith("iris:2")
    found = yard.call("GET", "/v1/models?tag=team=flora&property=max_iter=2").json["items"]
    assert [m["id"] for m in found] == ["iris:1"]


def test_scores_on_every_door(yard: Yard, iris: dict[str, Any]) -> None:
    ends = iris["deployment"]["endpoints"]
    with grpc.insecure_channel(ends["grpc"], RETRY) as channel:
        stub = GRPCInferenceServiceStub(channel)
        raw, typed = infer(stub, [FLOWER, FLOWER]), infer(stub, [FLOWER], typed=True)
        assert raw.outputs[0].shape[0] == 2 and raw.raw_output_contents and not raw.outputs[0].contents.ByteSize()
        assert typed.outputs[0].contents.int64_contents and not typed.raw_output_contents
        assert raw.model_name and stub.ServerReady(pb.ServerReadyRequest()).ready
    client = Client(yard.url())
    service = client.deployments.get("iris")
    assert len(service.score([FLOWER, FLOWER, FLOWER])) == 3
    proxied = yard.call("POST", "/v1/deployments/iris/score", {"data": [FLOWER]})
    assert proxied.status == 200 and len(proxied.json) == 1
    client.close()


def test_upgrade_fails_no_call(yard: Yard, iris: dict[str, Any]) -> None:
    ends = iris["deployment"]["endpoints"]
    versions: dict[str, int] = {}
    failed: list[str] = []
    stop = threading.Event()

    def caller() -> None:
        with grpc.insecure_channel(ends["grpc"], RETRY) as channel:
            stub = GRPCInferenceServiceStub(channel)
            while not stop.is_set():
                try:
                    version = infer(stub, [FLOWER]).model_version
                    versions[version] = versions.get(version, 0) + 1
                except grpc.RpcError as error:
                    failed.append(f"{error.code()} {error.details()}")

    threads = [threading.Thread(target=caller) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: versions.get("1", 0) > 50, 20)
        etag = yard.call("GET", "/v1/deployments/iris").headers["etag"]
        patch = {"image": iris["images"][1]["id"]}
        changed = yard.call("PATCH", "/v1/deployments/iris", patch, headers={"if-match": etag})
        assert changed.status == 202, changed.body
        now = healthy(yard, "iris", 2)
        until(lambda: versions.get("2", 0) > 50, 30)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert failed == []
    assert now["endpoints"] == ends and now["models"] == ["iris:2"]


def test_deleting_what_is_used_is_refused(yard: Yard, iris: dict[str, Any]) -> None:
    refused = yard.call("DELETE", "/v1/models/iris:1")
    assert refused.status == 412 and refused.json["code"] == "in-use"
    assert {"kind": "image", "id": "iris-scorer:1", "phase": "ready"} in refused.json["blockers"]
    refused = yard.call("DELETE", "/v1/images/iris-scorer:2")
    assert refused.status == 412 and refused.json["blockers"][0]["id"] == "iris"
    assert yard.call("DELETE", "/v1/models/nobody:1").status == 204


def test_broken_candidate_degrades_and_rolls_back(yard: Yard, iris: dict[str, Any]) -> None:
    score = upload(yard, b"def init():\n    raise RuntimeError('no such luck')\n\ndef run(data):\n    return data\n")
    broken = build(yard, name="broken", models=["iris:2"], score=score)
    assert broken["phase"] == "ready", broken
    before = yard.call("GET", "/v1/deployments/iris").json["generation"]
    patch = {"image": "broken:1", "progress_deadline_s": 6}
    assert yard.call("PATCH", "/v1/deployments/iris", patch).status == 202
    bad = until(lambda: (d := yard.call("GET", "/v1/deployments/iris").json)["phase"] == "degraded" and d, 40)
    condition = next(c for c in bad["conditions"] if c["type"] == "Progressing")
    assert condition["status"] == "False" and "no such luck" in condition["message"]
    assert yard.call("POST", "/v1/deployments/iris/score", {"data": [FLOWER]}).status == 200
    rolled = yard.call("POST", "/v1/deployments/iris/rollback", {})
    assert rolled.status == 202 and rolled.json["generation"] == before + 2
    assert healthy(yard, "iris", before + 2)["models"] == ["iris:2"]
    history = yard.call("GET", "/v1/deployments/iris/history").json["items"]
    assert len(history) >= 4


def test_every_call_is_captured_and_counted(yard: Yard, iris: dict[str, Any]) -> None:
    for _ in range(20):
        assert yard.call("POST", "/v1/deployments/iris/score", {"data": [FLOWER]}).status == 200
    assert yard.call("POST", "/v1/deployments/iris/score", {"data": "not rows"}).status == 400

    def counted() -> Any:
        windows = yard.call("GET", "/v1/telemetry/iris").json["windows"]
        return sum(sum(w["errors"].values()) for w in windows) >= 1 and windows

    windows = until(counted, 30)
    assert all(w["latency_ms"]["p50"] <= w["latency_ms"]["p99"] for w in windows if w["requests"])
    verify = until(lambda: (v := yard.call("GET", "/v1/capture/iris/verify").json) and not any(
        p["state"] == "gaps" for p in v["processes"]) and v, 20)
    client = Client(yard.url())
    table = client.capture("iris").read()
    assert verify and table.num_rows >= 21
    assert {"prediction_id", "status", "latency_ms", "model", "sequence"} <= set(table.column_names)
    assert {"OK", "INVALID_ARGUMENT"} <= set(table.column("status").to_pylist())
    client.close()


def test_events_tell_the_story(yard: Yard, iris: dict[str, Any]) -> None:
    lines = yard.call("GET", "/v1/events?after=beginning&follow=false").body.decode().splitlines()
    events = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    seen: dict[str, list[int]] = {}
    for event in events:
        seen.setdefault(event["subject"], []).append(int(event["sequence"]))
    types = {event["type"] for event in events}
    assert {"model.registered.v1", "image.requested.v1", "image.built.v1", "deployment.requested.v1",
            "deployment.ready.v1", "deployment.updated.v1"} <= types
    assert sorted(set(seen["iris"])) == list(range(1, max(seen["iris"]) + 1))


def test_log_and_killed_replica(yard: Yard, iris: dict[str, Any]) -> None:
    before = set(yard.replicas())
    log = yard.call("GET", "/v1/deployments/iris/log?tail=50")
    assert log.status == 200
    servers = [pid for pid in before if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()
               and b"launch.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(servers) >= 2
    os.kill(servers[0], signal.SIGKILL)
    assert yard.call("POST", "/v1/deployments/iris/score", {"data": [FLOWER]}).status == 200
    until(lambda: yard.call("GET", "/v1/deployments/iris").json["replicas_ready"] == 2
          and servers[0] not in yard.replicas(), 30)


def test_take_all_away(yard: Yard, iris: dict[str, Any]) -> None:
    assert yard.call("DELETE", "/v1/deployments/iris?wait=30").status in (200, 202)
    until(lambda: yard.call("GET", "/v1/deployments/iris").status == 404, 40)
    until(lambda: not yard.replicas(), 20)
    for image in ("iris-scorer:1", "iris-scorer:2", "broken:1"):
        until(lambda image=image: yard.call("DELETE", f"/v1/images/{image}").status in (200, 202, 204), 20)
    for model in ("iris:1", "iris:2"):
        until(lambda model=model: yard.call("DELETE", f"/v1/models/{model}").status in (200, 204), 20)
    assert yard.call("GET", "/v1/models").json["items"] == []
    rows = yard.call("GET", "/v1/capture/iris").json["items"]
    assert rows, "captured data outlives its deployment"
