"""What is wrong with a distributed yard's settings, named by ``modelyard doctor`` in one line each, with the fix."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from infra.stack.mongo import Mongo
from infra.stack.registry import Registry
from modelyard.adapters import urls
from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.targets_process import ProcessTarget
from modelyard.ports.targets import Workload
from tests import handmade
from tests.backends import MATRIX, need, url_of
from tests.e2e.yard import distributed, until
from tests.integration.guarded import Guarded

pytestmark = pytest.mark.slow
NOBODY = "127.0.0.1:9"


def doctor(data: Path, **env: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the rows by what they are about."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith("MODELYARD_")}
    settings |= {"MODELYARD_DATA": str(data), "MODELYARD_URL": f"http://{NOBODY}", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-m", "modelyard", "doctor", "--output", "json"], capture_output=True,
                          text=True, timeout=120, env={**settings, **env}, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {row["check"]: row for row in json.loads(done.stdout)}


async def declared(url: str) -> None:
    """All topics are there."""
    bus = await urls.open_bus(url)
    await bus.read([], "end")
    await bus.close()


def test_what_is_right_is_said_too(tmp_path: Path) -> None:
    _, rows = doctor(tmp_path / "none", **distributed(tmp_path))
    assert {name: rows[name]["ok"] for name in ("store", "bus", "blobs", "images")} == dict.fromkeys(
        ("store", "bus", "blobs", "images"), True), rows
    assert not (tmp_path / "none").exists(), "looking makes nothing"
    assert "Eby8" not in json.dumps(rows)


def test_nothing_answers(tmp_path: Path) -> None:
    code, rows = doctor(
        tmp_path / "none", MODELYARD_STORE=f"mongodb://{NOBODY}/yard?replicaSet=rs0",
        MODELYARD_BUS=f"kafka://{NOBODY}", MODELYARD_BLOBS=f"azure://a:c2VjcmV0@{NOBODY}/a/yard",
        MODELYARD_IMAGES=f"oci://{NOBODY}", MODELYARD_TARGETS="docker=docker:///no/such.sock")
    assert code == 1
    for name, words in {"store": ["MongoDB", "running"], "bus": ["Kafka", "127.0.0.1:9"], "blobs": ["Azurite"],
                        "images": ["127.0.0.1:9"], "target docker": ["/no/such.sock"]}.items():
        row = rows[name]
        assert not row["ok"] and all(word in row["fix"] for word in words), row
        assert "\n" not in row["fix"] and "c2VjcmV0" not in json.dumps(row)


def test_wrong_urls_are_settings_that_are_wrong(tmp_path: Path) -> None:
    for name, url in {"STORE": "mongodb:///x", "BUS": "kafka://host:port", "BLOBS": "azure://host", "IMAGES": "oci://",
                      "TARGETS": "x=moon://base"}.items():
        code, rows = doctor(tmp_path / "none", **{f"MODELYARD_{name}": url})
        wrong = [row for row in rows.values() if not row["ok"] and row["check"] not in ("yard",)]
        assert code == 1 and len(wrong) == 1, (name, rows)


@pytest.mark.parametrize(("options", "change", "words"), [
    ({"replica_set": False}, lambda url: url, ["replica set", "--replSet"]),
    ({}, lambda url: url.replace("rs0", "rs9"), ["replica set 'rs0'", "replicaSet=rs0"]),
    ({"password": "right"}, lambda url: url.replace("right", "wrong"), ["password"]),
])
def test_mongo(tmp_path: Path, options: dict[str, Any], change: Callable[[str], str], words: list[str]) -> None:
    need("mongo")
    with Mongo(tmp_path / "mongo", **options) as mongo:
        _, rows = doctor(tmp_path / "none", MODELYARD_STORE=change(mongo.url).replace("/?", "/yard?"))
    row = rows["store"]
    assert not row["ok"] and all(word in row["fix"] for word in words), row
    assert "wrong" not in json.dumps(row)


def test_mongo_user_who_may_only_read(tmp_path: Path) -> None:
    need("mongo")
    with Mongo(tmp_path / "mongo", password="right") as mongo, MongoClient[Any](mongo.url) as root:
        root.admin.command("createUser", "reader", pwd="books", roles=[{"role": "read", "db": "yard"}])
        root.admin.command("createUser", "writer", pwd="books", roles=[{"role": "readWrite", "db": "yard"}])
        found = {}
        for user in ("reader", "writer"):
            url = mongo.url.replace("root:right", f"{user}:books").replace("/?", "/yard?")
            found[user] = doctor(tmp_path / "none", MODELYARD_STORE=url)[1]["store"]
    row = found["reader"]
    assert not row["ok"] and "grant it the role readWrite" in row["fix"] and "'yard'" in row["fix"], row
    assert "\n" not in row["fix"] and found["writer"]["ok"], found


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    need("kafka")
    with Guarded(tmp_path_factory.mktemp("kafka")) as server:
        yield server


def test_kafka_user_who_may_not(tmp_path: Path, guarded: Guarded) -> None:
    """From nothing to everything, a right at a time: each that is missing is named, with the topics that it would
    take."""
    def row(user: str = "guest:guest") -> dict[str, Any]:
        url = f"kafka://{user}@127.0.0.1:{guarded.sasl}/doctor?replication=1"
        found: dict[str, Any] = doctor(tmp_path / "none", MODELYARD_BUS=url)[1]["bus"]
        assert found["ok"] or "\n" not in found["fix"]
        return found

    assert "refuses the credentials" in row("guest:wrong")["fix"]
    assert "grant guest Read, Write" in row()["fix"]
    guarded.allow("guest", "topic", "*", "read", "write", "describe", "describe-configs")
    told = row()["fix"]
    assert "topics doctor.model.registered" in told and "are missing" in told and "grant Create" in told, told
    guarded.allow("guest", "topic", "*", "create")
    assert "grant guest Read" in (told := row()["fix"]) and "groups" in told, told
    guarded.allow("guest", "group", "*", "read")
    assert row()["ok"], row()
    assert guarded.topics("doctor.") == [], "looking makes nothing"


def test_kafka_topics_that_somebody_deleted(tmp_path: Path, guarded: Guarded) -> None:
    """Whoever may make them makes them anew, so there is nothing to mend; for who may not, they are named."""
    url = f"kafka://yard:p%40ss@127.0.0.1:{guarded.sasl}/gone?replication=1"
    guarded.allow("stranger", "topic", "gone.*", "read", "write", "describe", "describe-configs")
    guarded.allow("stranger", "group", "*", "read")
    asyncio.run(declared(url))
    assert doctor(tmp_path / "none", MODELYARD_BUS=url.replace("yard:p%40ss", "stranger:stranger"))[1]["bus"]["ok"]
    guarded.delete("gone.image.built")
    until(lambda: "gone.image.built" not in guarded.topics("gone."), 20)
    told = doctor(tmp_path / "none", MODELYARD_BUS=url.replace("yard:p%40ss", "stranger:stranger"))[1]["bus"]
    assert not told["ok"] and "gone.image.built" in told["fix"] and "6 partitions" in told["fix"], told
    assert doctor(tmp_path / "none", MODELYARD_BUS=url)[1]["bus"]["ok"]


def test_kafka_topics_with_other_partitions(tmp_path: Path) -> None:
    url = url_of(MATRIX["bus"][1], tmp_path)
    asyncio.run(declared(url))
    _, rows = doctor(tmp_path / "none", MODELYARD_BUS=url.replace("partitions=4", "partitions=5"))
    assert not rows["bus"]["ok"] and "partitions" in rows["bus"]["fix"], rows["bus"]


def test_azure_key(tmp_path: Path) -> None:
    url = url_of(MATRIX["blobs"][1], tmp_path).replace("Eby8", "AAAA")
    _, rows = doctor(tmp_path / "none", MODELYARD_BLOBS=url)
    assert not rows["blobs"]["ok"] and "AZURE_STORAGE_KEY" in rows["blobs"]["fix"], rows["blobs"]


def test_azure_container_that_cannot_be(tmp_path: Path) -> None:
    url = url_of(MATRIX["blobs"][1], tmp_path)
    _, rows = doctor(tmp_path / "none", MODELYARD_BLOBS=f"{url.rpartition('/')[0]}/Not_A_Name")
    assert not rows["blobs"]["ok"] and "3 to 63 lower-case letters" in rows["blobs"]["fix"], rows
    other = url.replace("devstoreaccount1", "nobody-here")
    row = doctor(tmp_path / "none", MODELYARD_BLOBS=other)[1]["blobs"]
    assert not row["ok"] and "account" in row["fix"] and "\n" not in row["fix"], row


def test_azure_sas_in_place_of_a_key(tmp_path: Path) -> None:
    url = url_of(MATRIX["blobs"][1], tmp_path)
    bare = f"azure://{url.rpartition('@')[2]}"
    for end, words in {"2020-01-01T00:00:00Z": "that expired at 2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z": "SAS,"
                       }.items():
        connection = f"BlobEndpoint=http://127.0.0.1;SharedAccessSignature=sv=2022-11-02&ss=b&se={end}&sig=c2VjcmV0"
        _, rows = doctor(tmp_path / "none", MODELYARD_BLOBS=bare, AZURE_STORAGE_CONNECTION_STRING=connection)
        row = rows["blobs"]
        assert not row["ok"] and words in row["fix"] and "AccountKey=" in row["fix"], row
        assert "c2VjcmV0" not in json.dumps(rows)


async def test_a_grant_that_expired_under_captured_calls(tmp_path: Path) -> None:
    """A deployment goes on scoring while its deployer is down: its grant lapses, and captured calls wait."""
    url, data = url_of(MATRIX["blobs"][1], tmp_path), tmp_path / "data"
    images, grants = LayoutImages(data / "images"), await urls.open_grants(url)
    target = ProcessTarget("local", images, data)
    work = Workload(
        workspace="default", name="iris", generation=1, image="scorer:1", repo="scorer", replicas=1, models=(),
        digest=await handmade.image(images, "scorer", "1", handmade.ECHO), ports={}, capture={"enabled": True},
        limits={}, grant=await grants.lend("default", "iris", 1))
    try:
        await target.apply(work)
        async with asyncio.timeout(60):
            while (seen := await target.observe("default", "iris")).serving != 1:
                await asyncio.sleep(0.1)
            run, log = data / "run/default/iris", data / "run/default/iris/logs/shipper.log"
            await asyncio.to_thread(score, seen.endpoints["rest"])
            while not log.exists() or b"cannot ship" not in log.read_bytes():
                await asyncio.sleep(0.2)
        for segment in run.glob("spool/*.seg"):
            os.utime(segment, (0, 0))  # it waits for long
        _, rows = await asyncio.to_thread(doctor, data, MODELYARD_BLOBS=url)
        row = rows["capture iris"]
        assert not row["ok"] and "lapsed or was revoked" in row["fix"] and "modelyard serve" in row["fix"], row
        await target.apply(replace(work, grant=await grants.lend("default", "iris", 60)))
        async with asyncio.timeout(60):
            while [*run.glob("spool/*.seg")]:
                await asyncio.sleep(0.2)
        _, rows = await asyncio.to_thread(doctor, data, MODELYARD_BLOBS=url)
        assert "capture iris" not in rows
    finally:
        await target.apply(replace(work, grant=await grants.lend("default", "iris", 60)))
        await target.remove("default", "iris")
        await grants.close()


def score(url: str) -> None:
    call = urllib.request.Request(f"{url}/score", b'{"data": [1]}', {"content-type": "application/json"})
    with urllib.request.urlopen(call, timeout=20) as answer:
        assert answer.status == 200


def test_registry_that_wants_a_password(tmp_path: Path) -> None:
    need("registry")
    some = "yard:$2y$05$MCqPCLWZkQ5TWMG3sCkUSe9DHDzfPH4nTkTgYRA3ZrDQ7ri1mjbBy\n"
    with Registry(tmp_path / "registry", htpasswd=some) as registry:
        _, rows = doctor(tmp_path / "none", MODELYARD_IMAGES=registry.url, DOCKER_CONFIG=str(tmp_path))
    assert not rows["images"]["ok"] and "docker login" in rows["images"]["fix"], rows["images"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a user who may not use the socket needs root")
def test_docker_socket_that_is_not_ours(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listening:
        path = Path("/tmp") / f"modelyard-doctor-{os.getpid()}.sock"
        listening.bind(str(path))
        try:
            _, rows = doctor(tmp_path / "none", MODELYARD_TARGETS=f"docker=docker://{path}")
        finally:
            path.unlink()
    assert not rows["target docker"]["ok"] and str(path) in rows["target docker"]["fix"], rows["target docker"]
