"""Two telemetry services on one Kafka and one MongoDB share the work, and take in every segment once."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends import MATRIX, url_of
from tests.e2e.test_journey import healthy
from tests.e2e.test_restart import deploy
from tests.e2e.yard import Yard, until
from tests.integration.test_fault_10_telemetry_killed import load

pytestmark = pytest.mark.slow
NAMES = ("adder", "adder-two", "adder-three", "adder-four")
CALLS = 200


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    env = {f"MODELYARD_{port.upper()}": url_of(MATRIX[port][1], tmp_path) for port in ("store", "bus")}
    opened = Yard.start("apart", tmp_path / "data", MODELYARD_BLOBS=f"file://{tmp_path}/data/blobs",
                        MODELYARD_SERVICE_TOKEN="of this yard", **env)
    yield opened
    for name in NAMES:
        opened.call("DELETE", f"/v1/deployments/{name}?wait=30")
    opened.stop()


@pytest.fixture
def second(yard: Yard, tmp_path: Path) -> Iterator[Yard]:
    """Another telemetry service, with a data folder and a port of its own."""
    opened = Yard.start("apart", tmp_path / "data-two", ("telemetry",), **{
        name: value for name, value in yard.env.items() if name in (
            "MODELYARD_STORE", "MODELYARD_BUS", "MODELYARD_BLOBS", "MODELYARD_SERVICE_TOKEN")})
    yield opened
    opened.stop()


def total(yard: Yard, name: str) -> int:
    answer = yard.call("GET", f"/v1/telemetry/{name}", service="telemetry")
    requests = sum(w["requests"] for w in answer.json["windows"]) if answer.status == 200 else 0
    assert requests <= 2 * CALLS
    return requests


def steps(yard: Yard) -> int:
    text = yard.call("GET", "/metrics", service="telemetry").body.decode()
    return len(re.findall(r'modelyard_loop_seconds_count\{.*loop="ingest".*\} [1-9]', text))


def test_each_segment_is_taken_in_once_by_either(yard: Yard, second: Yard) -> None:
    image = deploy(yard)["image"]
    for name in NAMES[1:]:
        yard.call("POST", "/v1/deployments", {"name": name, "image": image, "capture": {"enabled": True}})
    urls = {name: healthy(yard, name, 1)["endpoints"]["rest"] for name in NAMES}
    assert all(load(url, CALLS) == CALLS for url in urls.values())
    for one in (yard, second):
        until(lambda one=one: [total(one, n) for n in NAMES] == [CALLS] * len(NAMES), 60, why="both give every call")
    assert steps(yard) and steps(second), "both work"
    second.kill("telemetry")
    assert all(load(url, CALLS) == CALLS for url in urls.values())
    until(lambda: [total(yard, n) for n in NAMES] == [2 * CALLS] * len(NAMES), 90, why="one goes on alone")
    told = _closed(yard)
    assert told and max(told.values()) == 1, "one event a segment"


def _closed(yard: Yard) -> Counter[str]:
    """Segments told of, by how many different events."""
    done = yard.cli("events", "list", "--type", "capture.closed", "--output", "json")
    return Counter(subject for _, subject in {(event["id"], event["subject"]) for event in json.loads(done.stdout)})


def test_two_on_one_folder_are_refused_with_what_to_do(tmp_path: Path) -> None:
    one = Yard.start("apart", tmp_path / "data", ("telemetry",))
    try:
        done = one.cli("serve", "telemetry", "--port", "0", check=False)
    finally:
        one.stop()
    assert done.returncode == 1
    assert "already runs telemetry" in done.stderr and "--data" in done.stderr
