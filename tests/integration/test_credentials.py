"""Credentials that are refused under a service that runs, or from its start: one clear line for each that waits, no
traceback, /readyz tells the truth, and it goes on by itself when they are right again. Nothing acknowledged is lost."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from infra.stack.azurite import ACCOUNT, KEY, Azurite
from infra.stack.mongo import Mongo
from modelyard.core.events import event_id
from tests.backends import need
from tests.e2e.test_restart import deploy
from tests.e2e.yard import Yard, until
from tests.integration.guarded import Guarded
from tests.integration.test_fault_10_telemetry_killed import load
from tests.integration.test_readiness import begun, readiness, register
from tests.integration.test_telemetry_shared import total

pytestmark = pytest.mark.slow


class Rekeyed(Azurite):
    """An Azurite whose account's key can be another at its next start."""

    key = KEY

    def _environ(self) -> Mapping[str, str]:
        return {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{self.key}"}


def lines(yard: Yard, word: str, service: str = "registry") -> list[str]:
    """What was logged as a warning or worse, with this word in it."""
    found = []
    for line in yard.log(service).splitlines():
        body = json.loads(line) if line.startswith("{") else {"level": "error", "message": line}
        if body["level"] in ("warning", "error") and word in body["message"]:
            found.append(body["message"])
    return found


def quiet(yard: Yard, word: str, at_most: int, service: str = "registry") -> None:
    """It is said, not too often, and whoever tries again says nothing more."""
    until(lambda: lines(yard, word, service), 30, why=f"{word!r} is logged")
    counts = [0]

    def no_more() -> bool:
        readiness(yard, service)
        counts.append(len(lines(yard, word, service)))
        return counts[-1] == counts[-2]

    until(no_more, 60, every=6.0)  # every waiting part of a service tries again within 5 s
    assert len(lines(yard, word, service)) <= at_most, lines(yard, word, service)
    assert "Traceback" not in yard.log(service)


def registered(yard: Yard) -> list[str]:
    items = yard.call("GET", "/v1/models?limit=100").json["items"]
    return sorted(model["id"] for model in items)


def told(yard: Yard) -> list[str]:
    """Models whose registration is on the bus."""
    found = yard.call("GET", "/v1/events?after=beginning&follow=false&types=model.registered").body.decode()
    return sorted(json.loads(line[6:])["subject"] for line in found.splitlines() if line.startswith("data: "))


@pytest.fixture
def mongo(tmp_path: Path) -> Iterator[Mongo]:
    need("mongo")
    with Mongo(tmp_path / "mongo", password="root") as server:
        yield server


def change_password(mongo: Mongo, command: str, password: str) -> None:
    """Of the user ``yard``; whoever is connected has to come in again."""
    with MongoClient[Any](mongo.url) as root:
        root.admin.command(command, "yard", pwd=password, roles=[{"role": "readWrite", "db": "yard"}])
    mongo.stop()
    mongo.start()


def test_mongo_refuses_the_password(tmp_path: Path, mongo: Mongo) -> None:
    change_password(mongo, "createUser", "wrong at first")
    env = {"MODELYARD_STORE": mongo.url.replace("root:root", "yard:yes").replace("/?", "/yard?")}
    yard = begun(tmp_path / "data", ("registry",), env)
    try:
        status, why = readiness(yard)
        assert status == 503 and "refuses the user or the password" in why and "yes" not in why
        quiet(yard, "refuses the user", 6)
        change_password(mongo, "updateUser", "yes")
        until(lambda: readiness(yard) == (200, "ok"), 30, why="ready by itself")
        assert register(yard).json["id"] == "iris:1"

        change_password(mongo, "updateUser", "another")
        until(lambda: readiness(yard)[0] == 503, 20)
        refused = yard.call("POST", "/v1/models", {"name": "iris", "artifact": "sha256:" + "0" * 64}, timeout=30)
        assert refused.status == 503 and "refuses the user or the password" in refused.json["detail"]
        quiet(yard, "refuses the user", 12)
        change_password(mongo, "updateUser", "yes")
        until(lambda: readiness(yard) == (200, "ok"), 30, why="ready again by itself")
        assert register(yard).json["id"] == "iris:2"
        until(lambda: told(yard) == registered(yard) == ["iris:1", "iris:2"], 20)
    finally:
        assert yard.stop() == []


def test_mongo_takes_a_right_away(tmp_path: Path, mongo: Mongo) -> None:
    """Reading goes on being allowed, so that only writing tells."""
    change_password(mongo, "createUser", "yes")
    yard = begun(tmp_path / "data", ("registry",), {
        "MODELYARD_STORE": mongo.url.replace("root:root", "yard:yes").replace("/?", "/yard?")})
    try:
        until(lambda: readiness(yard) == (200, "ok"), 30)
        assert register(yard).status == 201
        with MongoClient[Any](mongo.url) as root:
            root.admin.command("updateUser", "yard", roles=[{"role": "read", "db": "yard"}])
            until(lambda: readiness(yard)[0] == 503, 20, why="who may only read is not ready")
            assert "grant it the role readWrite" in readiness(yard)[1]
            assert register(yard).status == 503
            quiet(yard, "does not let this user", 6)
            root.admin.command("updateUser", "yard", roles=[{"role": "readWrite", "db": "yard"}])
        until(lambda: readiness(yard) == (200, "ok"), 30)
        assert register(yard).json["id"] == "iris:2"
        until(lambda: told(yard) == registered(yard), 20)
    finally:
        assert yard.stop() == []


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[Guarded]:
    need("kafka")
    with Guarded(tmp_path / "kafka") as server:
        yield server


def test_kafka_refuses_the_password(tmp_path: Path, kafka: Guarded) -> None:
    """What is registered meanwhile waits in the outbox, and is told of afterwards."""
    yard = begun(tmp_path / "data", ("registry",), {
        "MODELYARD_BUS": f"kafka://yard:p%40ss@127.0.0.1:{kafka.sasl}/own?replication=1&partitions=2"})
    try:
        until(lambda: readiness(yard) == (200, "ok"), 60)
        assert register(yard).status == 201
        until(lambda: told(yard) == ["iris:1"], 30)
        kafka.stop()
        kafka.password = "another"
        kafka.start()
        until(lambda: readiness(yard) == (200, "degraded"), 30)
        checks = yard.call("GET", "/readyz").json["checks"]
        assert "refuses the credentials" in checks["bus"] and "p@ss" not in json.dumps(checks)
        assert [register(yard).status for _ in range(5)] == [201] * 5, "the store is there"
        quiet(yard, "refuses the credentials", 6)
        kafka.stop()
        kafka.password = "p@ss"
        kafka.start()
        until(lambda: readiness(yard) == (200, "ok"), 30)
        until(lambda: told(yard) == registered(yard), 60, why="nothing is lost")
        assert len(registered(yard)) == 6
    finally:
        assert yard.stop() == []


def test_kafka_topics_are_deleted_under_a_service(tmp_path: Path, kafka: Guarded) -> None:
    """They are made anew by whoever uses them next, and what is committed from then on arrives."""
    yard = begun(tmp_path / "data", ("registry",), {
        "MODELYARD_BUS": f"kafka://yard:p%40ss@127.0.0.1:{kafka.sasl}/own?replication=1&partitions=2"})
    try:
        until(lambda: readiness(yard) == (200, "ok"), 60)
        assert register(yard).status == 201
        until(lambda: told(yard) == ["iris:1"], 30)
        kafka.delete(*(every := kafka.topics("own.")))
        until(lambda: not set(kafka.topics("own.")) & {"own.model.registered"} or len(told(yard)) == 0, 30)
        assert register(yard).json["id"] == "iris:2"
        until(lambda: "iris:2" in told(yard), 60, why="the topic is made again")
        assert "own.model.registered" in every and "Traceback" not in yard.log("registry")
        until(lambda: readiness(yard) == (200, "ok"), 30)
    finally:
        assert yard.stop() == []


def test_azure_refuses_the_key(tmp_path: Path) -> None:
    need("azure")
    other = base64.b64encode(event_id().encode()).decode()
    with Rekeyed(tmp_path / "azure") as azurite:
        yard = begun(tmp_path / "data", ("registry", "telemetry"), {"MODELYARD_BLOBS": f"{azurite.url}/credentials"})
        try:
            until(lambda: readiness(yard) == (200, "ok"), 30)
            assert register(yard).status == 201
            azurite.stop()
            azurite.key = other
            azurite.start()
            until(lambda: readiness(yard) == (200, "degraded"), 30)
            assert "refuses the credentials" in yard.call("GET", "/readyz").json["checks"]["blobs"]
            data = b"more weights"
            name = f"/v1/artifacts/sha256:{hashlib.sha256(data).hexdigest()}"
            refused = yard.call("PUT", name, data)
            assert refused.status == 503 and "credentials" in refused.json["detail"], refused
            assert KEY not in refused.body.decode() and "Traceback" not in yard.log("registry") + yard.log("telemetry")
            azurite.stop()
            azurite.key = KEY
            azurite.start()
            until(lambda: readiness(yard) == (200, "ok"), 30)
            assert yard.call("PUT", name, data).status == 201
            assert yard.call("GET", "/v1/models/iris:1/content").body == b"weights"
        finally:
            assert yard.stop() == []


def test_captured_calls_outlast_a_key_that_is_refused(tmp_path: Path) -> None:
    """Scoring never notices; what it wrote down meanwhile arrives when the key is right again."""
    need("azure")
    with Rekeyed(tmp_path / "azure") as azurite:
        yard = Yard.start("apart", tmp_path / "data", MODELYARD_BLOBS=f"{azurite.url}/captured")
        try:
            url = deploy(yard)["endpoints"]["rest"]
            assert load(url, 40) == 40
            until(lambda: total(yard, "adder") == 40, 30)
            azurite.stop()
            azurite.key = base64.b64encode(event_id().encode()).decode()
            azurite.start()
            assert load(url, 40) == 40
            quiet(yard, "refuses the credentials", 4, "telemetry")
            assert len(lines(yard, "capture grant", "deployer")) <= 1
            assert total(yard, "adder") == 40 and yard.call("GET", "/v1/deployments/adder").json["phase"] == "healthy"
            azurite.stop()
            azurite.key = KEY
            azurite.start()
            until(lambda: total(yard, "adder") == 80, 60, why="every call is counted once")
            assert yard.call("DELETE", "/v1/deployments/adder?wait=30").status in (200, 202)
            assert not [name for name in yard.ports if "Traceback" in yard.log(name)]
        finally:
            yard.stop()
