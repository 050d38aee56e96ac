"""Live windows: pure arithmetic, and the way to a user."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from modelyard.core.documents import rfc3339
from modelyard.core.errors import Invalid
from modelyard.core.events import Envelope
from modelyard.kernel.guard import Guard
from modelyard.kernel.server import Server
from modelyard.telemetry import live
from modelyard.telemetry.live_site import Site
from tests.unit.telemetry.bench import bench

START = 1_795_694_400
GOLDEN = Path(__file__).parents[1] / "golden" / "events"
Cells = list[list[Any]]


def event(topic: str, subject: str, data: dict[str, Any], sequence: int = 1) -> Envelope:
    return Envelope(id="1", source="/modelyard/telemetry", type=f"{topic}.v1", subject=subject, time=datetime.now(UTC),
                    sequence=f"{sequence:020d}", partitionkey="default/iris", data={"deployment": "iris", **data})


def closed(segment: int, cells: Cells, sequence: int = 1, image: str = "i:1") -> Envelope:
    return event("capture.closed", f"iris:r:{segment}", {"image": image, "cells": cells}, sequence)


def settled(requests: int, sequence: int = 1) -> Envelope:
    start, end = (rfc3339(datetime.fromtimestamp(START + n, UTC)) for n in (0, 60))
    return event("telemetry.window", "iris:w", {
        "image": "i:1", "model": "m:1", "start": start, "end": end, "requests": requests, "errors": {},
        "latency_ms": {"p50": 1.0, "p90": 1.0, "p99": 1.0}}, sequence)


def fold(*events: Envelope) -> dict[str, live.Value]:
    kept: dict[str, live.Value] = {}
    for one in events:
        for key, (_, patch) in live.patches(one).items():
            folded = live.fold(kept.get(key), patch)
            if folded is not None:
                kept[key] = json.loads(json.dumps(folded))  # it is kept as JSON
    return kept


def shown(*events: Envelope) -> list[tuple[str, int, bool]]:
    return [(w["start"], w["requests"], w["provisional"])
            for _, value in sorted(fold(*events).items()) for w in live.answers("iris", value)]


def one(calls: int, slot: int = START) -> Cells:
    return [[slot, "m:1", "OK", {"100": calls}]]


def test_a_segment_counts_in_each_window_that_it_touches() -> None:
    found = fold(closed(1, [*one(2), *one(3, START + 50), *one(4, START + 60)]))
    assert sorted(found) == [f"default/iris@{START}", f"default/iris@{START + 60}"]
    assert [w["requests"] for value in found.values() for w in live.answers("iris", value)] == [5, 4]


def test_statuses_and_latency_are_told_as_settled_windows_tell_them() -> None:
    (value,) = fold(closed(1, [*one(9), [START, "m:1", "INTERNAL", {"-1": 1}]])).values()
    (window,) = live.answers("iris", value)
    assert (window["requests"], window["errors"], window["provisional"]) == (10, {"INTERNAL": 1}, True)
    assert 0 < window["latency_ms"]["p50"] <= window["latency_ms"]["p99"]


def test_repeats_and_every_order_come_to_the_same() -> None:
    events = [closed(1, one(2)), closed(2, one(3)), settled(4), settled(5, 2)]
    wanted = shown(*events)
    assert wanted[0][1:] == (5, False)
    for order in itertools.permutations(events):
        assert shown(*order, *order) == wanted


def test_what_was_known_changes_nothing() -> None:
    (value,), ((_, patch),) = fold(closed(1, one(2))).values(), live.patches(closed(1, one(2))).values()
    assert live.fold(value, patch) is None


def test_an_older_event_does_not_undo_a_newer_one() -> None:
    assert shown(closed(1, one(7), 2), closed(1, one(2), 1))[0][1] == 7


def test_calls_that_come_after_settling_make_it_provisional_again() -> None:
    assert shown(settled(2), closed(1, one(2)))[0][1:] == (2, False)
    assert shown(settled(2), closed(1, one(2)), closed(2, one(1)))[0][1:] == (3, True)


def test_images_are_apart() -> None:
    assert [n for _, n, _ in shown(closed(1, one(2)), closed(2, one(3), image="i:2"))] == [2, 3]


def test_an_event_of_an_older_release_says_nothing_of_windows() -> None:
    old = Envelope.decode((GOLDEN / "capture.closed.v1.json").read_bytes())
    assert "cells" not in old.data and live.patches(old) == {}


def test_the_sample_with_cells_is_understood() -> None:
    new = Envelope.decode((GOLDEN / "capture.closed.v1.cells.json").read_bytes())
    assert [w["requests"] for v in fold(new).values() for w in live.answers("iris", v)] == [1, 1]


@pytest.mark.parametrize("data", [{"cells": "x"}, {"cells": [[1]]}, {"cells": [[1, "m", "OK", 3]]}, {"cells": 7},
                                  {"cells": [["x", "m", "OK", {}]]}, {"cells": [[1, "m", "OK", {"a": 1}]]}])
def test_nonsense_is_invalid(data: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="does not say"):
        live.patches(event("capture.closed", "iris:r:1", {"image": "i:1", **data}))


def test_a_window_is_live_for_a_quarter_of_an_hour() -> None:
    assert not live.expired(START, START + 60 + 899)
    assert live.expired(START, START + 60 + 900)


class Held:
    """The windows that some worker holds."""

    ready = True

    def __init__(self, owner: str | None, found: list[dict[str, Any]]) -> None:
        self._owner, self._found = owner, found

    def owner(self, workspace: str, deployment: str) -> str | None:
        return self._owner

    def show(self, workspace: str, deployment: str) -> list[dict[str, Any]]:
        return self._found


async def test_live_windows_reach_the_user_through_any_worker(tmp_path: Path) -> None:
    found = [w for v in fold(closed(1, one(2))).values() for w in live.answers("iris", v)]
    async with bench(tmp_path) as here:
        await here.deployed()
        token = here.ctx.peers.headers("default")["x-modelyard-service-token"]
        sites = [Site(token), Site(token)]
        servers = [Server(site.application(Guard(service_token=token))) for site in sites]
        try:
            for site, server in zip(sites, servers, strict=True):
                site.url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
            here.ctx.peers.urls["stream"] = sites[0].url
            path = f"{here.url}/v1/telemetry/iris?live=true"
            async with here.http.get(path) as answer:
                assert answer.status == 503 and "Kafka was not reached" in await answer.text()
            sites[0].windows, sites[1].windows = Held(sites[1].url, []), Held(sites[1].url, found)
            async with here.http.get(path) as answer:
                assert (answer.status, await answer.json()) == (200, {"windows": found})
            sites[1].windows = Held(None, [])
            async with here.http.get(path) as answer:
                assert answer.status == 503 and "shared out" in await answer.text()
            async with here.http.get(path + "&window=1h") as answer:
                assert answer.status == 422
        finally:
            for server, site in zip(servers, sites, strict=True):
                await server.stop()
                await site.peers.close()
