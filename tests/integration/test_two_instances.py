"""Two instances of every service on one Kafka, MongoDB, blob store and registry: they share the work, a death loses
nothing, and it does not matter which of them is asked."""

from __future__ import annotations

import json
import os
import re
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.test_journey import build, healthy, upload
from tests.e2e.yard import Yard, distributed, until

pytestmark = pytest.mark.slow
SCORE = b"def run(data):\n    return sum(data['data'])\n"
IMAGES, WEIGHTS, LARGE = 10, 4 << 20, 192 << 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Yard, Yard]]:
    """Each has its own data folder and runs replicas in a place of its own."""
    folder = tmp_path_factory.mktemp("pair")
    env = distributed(folder) | {"MODELYARD_SERVICE_TOKEN": "between these two"}
    yards: list[Yard] = []
    try:
        for name in ("left", "right"):
            yards.append(Yard.start("apart", folder / name, MODELYARD_TARGETS=f"{name}=process://", **env))
        yield yards[0], yards[1]
        for name in ("l-one", "l-two", "r-one", "r-two"):
            yards[name[0] == "r"].call("DELETE", f"/v1/deployments/{name}?wait=30")
    finally:
        left = [pid for yard in reversed(yards) for pid in yard.stop()]
    assert left == []


def events(yard: Yard, query: str) -> list[dict[str, Any]]:
    """What is on the bus up to now."""
    body = yard.call("GET", f"/v1/events?after=beginning&follow=false&{query}").body.decode()
    return [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]


def model(yard: Yard, name: str, size: int = WEIGHTS) -> str:
    """Of its own bytes, which take a while to pack."""
    answer = yard.call("POST", "/v1/models", {"name": name, "artifact": upload(yard, os.urandom(size))})
    assert answer.status == 201, answer.body
    return str(answer.json["id"])


def built_by(yard: Yard) -> int:
    """Builds that this instance finished since it was started."""
    text = yard.call("GET", "/metrics", service="image-builder").body.decode()
    found = re.search(r'modelyard_loop_seconds_count\{[^}]*loop="build",outcome="ok"[^}]*\} ([0-9.]+)', text)
    return int(float(found[1])) if found else 0


def test_two_builders_share_the_images_and_one_is_killed(pair: tuple[Yard, Yard]) -> None:
    left, right = pair
    models = [model(pair[n % 2], f"packed-{n}") for n in range(IMAGES)]
    score = upload(left, SCORE)
    asked = [pair[n % 2].call("POST", "/v1/images", {"name": f"packed-{n}", "models": [models[n]], "score": score})
             for n in range(IMAGES)]
    assert [answer.status for answer in asked] == [202] * IMAGES
    ids = [answer.json["id"] for answer in asked]

    def phases() -> Counter[str]:
        return Counter(left.call("GET", f"/v1/images/{id}").json["phase"] for id in ids)

    until(lambda: built_by(left) and built_by(right), 90, why="both build")
    right.kill("image-builder")
    in_the_middle = phases()
    until(lambda: phases() == {"ready": IMAGES}, 120, why="what the dead one had begun is built by the other")
    right.restart("image-builder")
    until(lambda: {event["subject"] for event in events(right, "types=image.built")} >= set(ids), 30)
    told = {event["id"]: event["subject"] for event in events(left, "types=image.*") if event["subject"] in ids}
    assert Counter(told.values()) == dict.fromkeys(ids, 2), "asked for once and built once, each"
    logs = [right.call("GET", f"/v1/images/{id}/log").body.decode() for id in ids]
    # The dead one may have told of a build that it could not commit any more: the other then built it once more.
    assert {log.count(" built sha256:") for log in logs} <= {1, 2}
    assert all(left.call("GET", f"/v1/images/{id}/log").body.decode() == log for id, log in zip(ids, logs, strict=True))
    print(f"when one was killed: {dict(in_the_middle)}")


def test_each_deployer_sees_to_its_own_target(pair: tuple[Yard, Yard]) -> None:
    left, right = pair
    image = build(left, name="adder", score=upload(left, SCORE))["id"]
    for yard, target, names in ((left, "left", ("l-one", "l-two")), (right, "right", ("r-one", "r-two"))):
        for name in names:
            asked = yard.call("POST", "/v1/deployments", {"name": name, "image": image, "target": target})
            assert asked.status == 202, asked.body
    for name in ("l-one", "l-two", "r-one", "r-two"):
        docs = [healthy(yard, name, 1) for yard in pair]
        assert docs[0]["endpoints"] == docs[1]["endpoints"], "asked of either, the same"
    assert len(left.replicas()) and len(right.replicas())

    left.kill("deployer")
    changed = right.call("PATCH", "/v1/deployments/r-one", {"tags": {"a": "b"}})
    assert changed.status == 202
    healthy(right, "r-one", 2)
    urls = [right.call("GET", f"/v1/deployments/{name}").json["endpoints"]["rest"] for name in ("l-one", "l-two")]
    assert [scored(url) for url in urls] == [b"6", b"6"], "what the dead one had started goes on"
    left.restart("deployer")
    assert left.call("PATCH", "/v1/deployments/l-one", {"tags": {"a": "b"}}).status == 202
    healthy(left, "l-one", 2)
    said = [c["message"] for d in left.call("GET", "/v1/deployments").json["items"] for c in d["conditions"]]
    assert not [message for message in said if "no deployer" in message], said
    assert [scored(url) for url in urls] == [b"6", b"6"]


def test_a_target_that_nobody_has_is_told_of(pair: tuple[Yard, Yard]) -> None:
    """Its deployer is gone for good, and the other, who leaves it alone at first, says so in the end."""
    left, right = pair
    assert right.call("POST", "/v1/deployments", {"name": "x-one", "image": "adder", "target": "left"}).status == 422
    left.kill("deployer")

    def why() -> str:
        doc = right.call("GET", "/v1/deployments/l-two").json
        return " ".join(condition["message"] for condition in doc["conditions"])

    until(lambda: "no deployer that runs has the target 'left'" in why(), 60)
    left.restart("deployer")
    until(lambda: "no deployer" not in why(), 30, why="it is back, and looks after its own again")


def scored(url: str) -> bytes:
    call = urllib.request.Request(f"{url}/score", b'{"data": [1, 2, 3]}', {"content-type": "application/json"})
    with urllib.request.urlopen(call, timeout=20) as answer:
        return bytes(answer.read())


class Reading(threading.Thread):
    """Follows a stream to its end; ``began`` is what ``at_first`` said when the first bytes came."""

    def __init__(self, url: str, at_first: Any = lambda: None) -> None:
        super().__init__(daemon=True)
        self.url, self.at_first, self.body, self.began = url, at_first, b"", None
        self.start()

    def run(self) -> None:
        with urllib.request.urlopen(self.url, timeout=120) as answer:
            while part := answer.read1(65536):
                if not self.body:
                    self.began = self.at_first()
                self.body += part

    def whole(self) -> bytes:
        self.join(120)
        assert not self.is_alive(), f"{self.url} does not end"
        return self.body


def test_a_build_is_followed_through_either(pair: tuple[Yard, Yard]) -> None:
    """Log, next phase and events, asked of both while one of them builds."""
    left, right = pair
    wanted = {"name": "followed", "models": [model(left, "followed", LARGE)], "score": upload(left, SCORE)}
    answers: dict[str, list[str]] = {"left": [], "right": []}
    told = "/v1/events?after=beginning&types=image.*&subject=followed:1&limit=2"
    streams = [Reading(yard.url("image-builder") + told) for yard in pair]
    id = left.call("POST", "/v1/images", wanted).json["id"]

    def phase() -> str:
        return str(left.call("GET", f"/v1/images/{id}").json["phase"])

    def wait(name: str, yard: Yard) -> None:
        while not answers[name] or answers[name][-1] != "ready":
            answers[name].append(yard.call("GET", f"/v1/images/{id}?wait=30", service="image-builder").json["phase"])

    waits = [threading.Thread(target=wait, args=pair_) for pair_ in (("left", left), ("right", right))]
    for thread in waits:
        thread.start()
    logs = [Reading(f"{yard.url('image-builder')}/v1/images/{id}/log?follow=true", phase) for yard in pair]
    assert logs[0].whole() == logs[1].whole() != b""
    assert logs[0].body.count(b" built sha256:") == 1
    assert [log.began for log in logs] == ["building", "building"], "also the one that does not build follows it live"
    for thread in waits:
        thread.join(60)
    assert {name: told[-1] for name, told in answers.items()} == {"left": "ready", "right": "ready"}
    assert all(len(told) <= 4 for told in answers.values()), f"a wait waits: {answers}"
    seen = [[json.loads(line[6:])["id"] for line in stream.whole().decode().splitlines() if line.startswith("data: ")]
            for stream in streams]
    assert seen[0] == seen[1] and len(seen[0]) == 2
