"""Starting in any order, and telling the truth: a service waits for its store, is degraded without the bus, and two
instances share the work. On servers of the test's own."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.stack.kafka import Kafka
from infra.stack.mongo import Mongo
from infra.stack.server import free_port
from tests.backends import need
from tests.e2e.yard import Yard, until

pytestmark = pytest.mark.slow


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Mongo, Kafka]]:
    """Not started yet; their ports are known."""
    need("mongo")
    need("kafka")
    mongo, kafka = Mongo(tmp_path / "mongo", free_port()), Kafka(tmp_path / "kafka", free_port())
    yield mongo, kafka
    for server in (mongo, kafka):
        server.thaw()
        server.stop()


def settings(mongo: Mongo, kafka: Kafka) -> dict[str, str]:
    return {"MODELYARD_STORE": mongo.url.replace("?", "ready?", 1), "MODELYARD_BUS": f"{kafka.url}/ready",
            "MODELYARD_SERVICE_TOKEN": "between-the-services"}


def begun(data: Path, names: tuple[str, ...], env: dict[str, str]) -> Yard:
    """A yard whose services are started and not waited for."""
    yard = Yard.start("apart", data, (), **env)
    yard.ports |= {name: free_port() for name in names}
    for name in names:
        yard.launch(name)
    until(lambda: answers(yard, names[0]), 30, why="the process answers at all")
    return yard


def answers(yard: Yard, name: str) -> bool:
    try:
        return yard.call("GET", "/livez", service=name, timeout=5).status == 200
    except OSError:
        return False


def readiness(yard: Yard, name: str = "registry") -> tuple[int, str]:
    answer = yard.call("GET", "/readyz", service=name, timeout=10)
    return answer.status, answer.json.get("status") if answer.status == 200 else answer.json["detail"]


def register(yard: Yard, name: str = "iris", service: str = "registry") -> Any:
    digest = f"sha256:{hashlib.sha256(b'weights').hexdigest()}"
    yard.call("PUT", f"/v1/artifacts/{digest}", b"weights", service=service)
    return yard.call("POST", "/v1/models", {"name": name, "artifact": digest}, service=service, timeout=20)


def test_a_service_waits_for_what_is_missing(tmp_path: Path, servers: tuple[Mongo, Kafka]) -> None:
    mongo, kafka = servers
    yard = begun(tmp_path / "data", ("registry",), settings(mongo, kafka))
    try:
        status, told = readiness(yard)
        assert status == 503 and f"127.0.0.1:{mongo.port}" in told
        assert yard.call("GET", "/v1/models", timeout=20).status == 503
        mongo.start()
        until(lambda: readiness(yard) == (200, "degraded"), 20, why="ready without Kafka, and says what is amiss")
        assert register(yard).status == 201
        kafka.start()
        until(lambda: readiness(yard) == (200, "ok"), 30)
        until(lambda: "model.registered" in yard.call(
            "GET", "/v1/events?after=beginning&follow=false").body.decode(), 20, why="what waited is published")
        assert yard.log("registry").count("not ready, and waiting") == 1

        mongo.freeze()
        until(lambda: readiness(yard)[0] == 503, 10, why="store down is not ready within 10 s")
        assert yard.call("GET", "/livez").status == 200
        mongo.thaw()
        until(lambda: readiness(yard)[0] == 200, 15)
        kafka.kill()
        until(lambda: readiness(yard) == (200, "degraded"), 20)
        assert register(yard).json["id"] == "iris:2"
    finally:
        assert yard.stop() == []


def test_two_instances_share_the_work(tmp_path: Path, servers: tuple[Mongo, Kafka]) -> None:
    mongo, kafka = servers
    mongo.start()
    kafka.start()
    env = settings(mongo, kafka) | {"MODELYARD_BLOBS": f"file://{tmp_path}/blobs"}
    yards = [begun(tmp_path / f"data{n}", ("registry",), env) for n in range(2)]
    try:
        for yard in yards:
            until(lambda yard=yard: readiness(yard) == (200, "ok"), 30)
        both = [register(yards[n % 2], "iris").json["id"] for n in range(20)]
        assert both == [f"iris:{n}" for n in range(1, 21)]

        async def crowd() -> list[str]:
            tries = [asyncio.to_thread(register, yards[n % 2], "rose") for n in range(40)]
            return [answer.json["id"] for answer in await asyncio.gather(*tries)]

        assert sorted(asyncio.run(crowd()), key=lambda i: int(i[5:])) == [f"rose:{n}" for n in range(1, 41)]
        ended = yards[0]
        ended.kill("registry")
        assert register(yards[1], "iris").json["id"] == "iris:21"
        told = "/v1/events?after=beginning&follow=false&types=model.registered"
        until(lambda: yards[1].call("GET", told).body.count(b"model.registered.v1") >= 61, 30,
              why="what the dead instance committed is published too")
    finally:
        for yard in yards:
            yard.stop()
