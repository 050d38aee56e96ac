"""Fault 10: telemetry and the stream worker are killed (-9) three times over 4,000 scored calls, on their own Kafka.

Every call is counted once: in the figures that the captured data give, in the settled windows, and in the live view.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from infra.stack import server_class
from tests.backends import need
from tests.e2e.test_restart import deploy
from tests.e2e.yard import SERVICES, Yard, until

pytestmark = [pytest.mark.slow, pytest.mark.fault]
CALLS, KILLS, CLIENTS = 4000, 3, 4
BODY = json.dumps({"data": [1, 2, 3]})


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    """Every service and the stream worker apart, with Kafka between them."""
    need("kafka")
    with server_class("kafka")(tmp_path / "kafka") as kafka:
        bus = f"{kafka.url}/yard?session_s=6&partitions=4"
        opened = Yard.start("apart", tmp_path / "data", (*SERVICES, "stream"), MODELYARD_BUS=bus)
        yield opened
        opened.call("DELETE", "/v1/deployments/adder?wait=30")
        opened.stop()


def score(url: str, calls: int) -> int:
    """Calls one after the other on a kept connection; how many were answered with 200."""
    connection, done = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20), 0
    for _ in range(calls):
        connection.request("POST", "/score", BODY, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        done += answer.status == 200 and answer.read() == b'{"sum":6}'
    connection.close()
    return done


def load(url: str, calls: int) -> int:
    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(lambda _: score(url, calls // CLIENTS), range(CLIENTS)))


def windows(yard: Yard, query: str = "") -> list[dict[str, Any]]:
    answer = yard.call("GET", f"/v1/telemetry/adder{query}", service="telemetry")
    return list(answer.json["windows"]) if answer.status == 200 else []


def total(found: list[dict[str, Any]]) -> int:
    requests = sum(w["requests"] for w in found)
    assert requests <= CALLS, f"more than there were: {found}"
    return requests


def test_every_call_is_counted_once(yard: Yard, record_property: pytest.RecordProperty) -> None:
    url = deploy(yard)["endpoints"]["rest"]
    assert total(windows(yard)) == 0
    began, answered = time.monotonic(), 0
    for _ in range(KILLS):
        answered += load(url, CALLS // (KILLS + 1))
        until(lambda: windows(yard), 40, why="something was taken in before the kill")
        for name in ("telemetry", "stream"):
            yard.kill(name)
        answered += load(url, CALLS // (KILLS + 1) // KILLS)
        for name in ("telemetry", "stream"):
            yard.launch(name)
        yard.wait_ready("telemetry")
    answered += load(url, CALLS - answered)
    assert answered == CALLS
    called = time.monotonic() - began
    until(lambda: total(windows(yard)) == CALLS, 90, why="the captured data give every call")
    counted = time.monotonic() - began
    until(lambda: total(windows(yard, "?live=true")) == CALLS, 60, why="so does the live view")
    shown = time.monotonic() - began
    until(lambda: not any(w["provisional"] for w in windows(yard, "?live=true")), 120, every=0.5, why="all settled")
    settled = windows(yard, "?live=true")
    assert total(settled) == total(windows(yard)) == CALLS and sum(len(w["errors"]) for w in settled) == 0
    figures = {"calls": answered, "kills": KILLS, "called_s": round(called, 1), "counted_s": round(counted, 1),
               "live_s": round(shown, 1), "settled_s": round(time.monotonic() - began, 1)}
    record_property("figures", figures)
    print(figures)
