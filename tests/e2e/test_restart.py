"""Stopping and starting: what was there is there again, on the same ports, and nobody loses a call's record."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_journey import build, healthy, upload
from tests.e2e.yard import Yard, until

pytestmark = pytest.mark.slow

SCORE = b"def run(data):\n    return {'sum': sum(data['data'])}\n"


def deploy(yard: Yard, name: str = "adder") -> dict[str, Any]:
    image = build(yard, name=f"{name}-image", models=[], score=upload(yard, SCORE))
    assert image["phase"] == "ready", image
    yard.call("POST", "/v1/deployments", {"name": name, "image": image["id"], "capture": {"enabled": True}})
    return healthy(yard, name, 1)


def score(yard: Yard, name: str = "adder") -> Any:
    answer = yard.call("POST", f"/v1/deployments/{name}/score", {"data": [1, 2, 3]})
    return answer.json if answer.status == 200 else None


@pytest.fixture
def stopped() -> Iterator[list[Yard]]:
    yards: list[Yard] = []
    yield yards
    for yard in yards:
        yard.stop()


def test_all_in_one_comes_back_as_it_was(tmp_path: Path, stopped: list[Yard]) -> None:
    yard = Yard.start("all-in-one", tmp_path / "data")
    stopped.append(yard)
    before = deploy(yard)
    assert score(yard) == {"sum": 6}
    assert yard.stop() == [], "Ctrl-C stops replicas too"
    again = Yard.start("all-in-one", tmp_path / "data")
    stopped.append(again)
    until(lambda: score(again) == {"sum": 6}, 30, why="the deployment serves again")
    after = again.call("GET", "/v1/deployments/adder").json
    assert after["endpoints"] == before["endpoints"] and after["generation"] == 1


def test_sigkill_of_everything_loses_nothing(tmp_path: Path, stopped: list[Yard]) -> None:
    yard = Yard.start("all-in-one", tmp_path / "data")
    stopped.append(yard)
    deploy(yard)
    answered = sum(score(yard) is not None for _ in range(50))
    yard.kill("all")
    yard.restart("all")
    until(lambda: score(yard) == {"sum": 6}, 30)
    answered += 1

    def captured() -> Any:
        items = yard.call("GET", "/v1/capture/adder?limit=1000").json["items"]
        return len([i for i in items if i["status"] == "OK"]) >= answered

    until(captured, 30, why=f"{answered} captured calls")


def test_deployer_alone_leaves_replicas_serving(tmp_path: Path, stopped: list[Yard]) -> None:
    yard = Yard.start("apart", tmp_path / "data")
    stopped.append(yard)
    before = deploy(yard)
    replicas = set(yard.replicas())
    assert replicas
    yard.processes["deployer"].terminate()
    yard.processes["deployer"].wait(30)
    request = urllib.request.Request(before["endpoints"]["rest"] + "/score", b'{"data": [4, 5]}',
                                     {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.read() == b'{"sum":9}'
    yard.restart("deployer")
    until(lambda: yard.call("GET", "/v1/deployments/adder").json["phase"] == "healthy", 20)
    assert set(yard.replicas()) == replicas, "adopted, not started again"
    assert yard.call("DELETE", "/v1/deployments/adder?wait=30").status in (200, 202)
    until(lambda: not yard.replicas(), 30)
