"""What is wrong with a distributed yard's settings, named by ``modelyard doctor`` in one line each, with the fix."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.stack.mongo import Mongo
from infra.stack.registry import Registry
from modelyard.adapters import urls
from tests.backends import MATRIX, need, url_of
from tests.e2e.yard import distributed

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


def test_kafka_topics_with_other_partitions(tmp_path: Path) -> None:
    url = url_of(MATRIX["bus"][1], tmp_path)

    async def declare() -> None:
        bus = await urls.open_bus(url)
        await bus.read([], "end")
        await bus.close()

    asyncio.run(declare())
    _, rows = doctor(tmp_path / "none", MODELYARD_BUS=url.replace("partitions=4", "partitions=5"))
    assert not rows["bus"]["ok"] and "partitions" in rows["bus"]["fix"], rows["bus"]


def test_azure_key(tmp_path: Path) -> None:
    url = url_of(MATRIX["blobs"][1], tmp_path).replace("Eby8", "AAAA")
    _, rows = doctor(tmp_path / "none", MODELYARD_BLOBS=url)
    assert not rows["blobs"]["ok"] and "AZURE_STORAGE_KEY" in rows["blobs"]["fix"], rows["blobs"]


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
