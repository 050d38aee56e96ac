"""Fault 8: the blob store is frozen for 120 s under 200 scored calls a second, and the grant to write there lapses
again and again. No call fails, and in the end each is captured once. On an Azurite of the test's own."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from infra.stack.azurite import Azurite
from modelyard import Client
from tests.backends import need
from tests.e2e.test_restart import deploy
from tests.e2e.yard import Yard, until
from tests.integration import short_grants

pytestmark = [pytest.mark.slow, pytest.mark.fault]
RATE, CLIENTS = 200, 8
RENEWED_S, FROZEN_S, DRAINED_S = 4 * short_grants.GRANT_S, 120, 240
BODY = json.dumps({"data": [1, 2, 3]})


class Load:
    """Calls at a steady rate on kept connections; every call has an id of its own."""

    def __init__(self, url: str) -> None:
        self.netloc = urlsplit(url).netloc
        self.stopping = threading.Event()
        self.answered: list[str] = []
        self.failed: list[str] = []
        self.threads = [threading.Thread(target=self._call, args=(n,)) for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _call(self, client: int) -> None:
        connection = http.client.HTTPConnection(self.netloc, timeout=20)
        began = time.monotonic()
        for n in range(10**6):
            if self.stopping.wait(max(0.0, began + n * CLIENTS / RATE - time.monotonic())):
                break
            name = f"call-{client}-{n}"
            try:
                connection.request("POST", "/score", BODY, {"Content-Type": "application/json", "X-Request-Id": name})
                answer = connection.getresponse()
                right = answer.read() == b'{"sum":6}' and answer.status == 200
                (self.answered if right else self.failed).append(name)
            except (OSError, http.client.HTTPException) as exc:
                self.failed.append(f"{name} {exc!r}")
                connection.close()
        connection.close()

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def azurite(tmp_path: Path) -> Iterator[Azurite]:
    need("azure")
    with Azurite(tmp_path / "azurite") as server:
        yield server


def captured(yard: Yard) -> Counter[str]:
    """How often each call of the load is in what a reader of the captured data gets."""
    with Client(yard.url()) as client:
        table = client.capture("adder").read()
    return Counter(name for name in table["request_id"].to_pylist() if name.startswith("call-"))


def test_no_call_fails_and_none_is_lost(tmp_path: Path, azurite: Azurite,
                                        record_property: pytest.RecordProperty) -> None:
    yard = Yard.start("all-in-one", tmp_path / "data", program=(short_grants.__file__,),
                      MODELYARD_BLOBS=f"{azurite.url}/yard?timeout_s=5")
    try:
        load = Load(deploy(yard)["endpoints"]["rest"])
        try:
            time.sleep(RENEWED_S)
            renewed = len(load.answered)
            azurite.freeze()
            time.sleep(FROZEN_S)
            azurite.thaw()
            thawed = time.monotonic()
        finally:
            load.stop()
        assert load.failed == []
        assert len(load.answered) > 0.8 * RATE * (RENEWED_S + FROZEN_S)
        until(lambda: len(captured(yard)) == len(load.answered), DRAINED_S, every=2.0, why="the backlog is drained")
        drained = time.monotonic() - thawed
        seen = captured(yard)
        figures = {"answered": len(load.answered), "before the frost": renewed, "missing": len(
            set(load.answered) - seen.keys()), "doubled": sum(n > 1 for n in seen.values()),
            "drained_s": round(drained, 1)}
        record_property("figures", figures)
        print(figures)
        assert figures["missing"] == figures["doubled"] == 0
        log = (next(yard.data.rglob("shipper.log"))).read_text()
        assert "lapsed" not in log.partition("does not answer")[0], "renewed before it lapses, while the store answers"
    finally:
        yard.stop()
