"""The event stream and the dead letters: what a person sees of the bus."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.core.events import Fact, announce
from modelyard.kernel import feed
from tests.unit.kernel.garden import Plant, Soil, Yard, yard


async def publish(here: Yard, subject: str, topic: str = "model.registered", workspace: str = "default") -> None:
    _, events = announce(Plant(id=subject, name=subject, workspace=workspace), "garden", Fact(topic))
    await here.bus.publish(events[0])


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(id, event) of each message."""
    found = []
    for block in text.split("\n\n"):
        parts = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in parts:
            found.append((parts["id"], json.loads(parts["data"])))
    return found


async def listed(here: Yard, query: str, **headers: str) -> list[tuple[str, dict[str, Any]]]:
    named = {k.replace("_", "-"): v for k, v in headers.items()}
    status, head, text = await here.call("GET", f"/v1/events?follow=false&{query}", headers=named)
    assert status == 200 and head["content-type"] == "text/event-stream"
    return events_of(text)


async def test_replay_filter_and_resume(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        for n in range(250):
            await publish(here, f"iris:{n}", ("model.registered", "image.built", "model.updated")[n % 3])
        everything = await listed(here, "after=beginning")
        assert [e["subject"] for _, e in everything] == [f"iris:{n}" for n in range(250)]
        assert everything[0][1]["specversion"] == "1.0" and everything[0][1]["type"] == "model.registered.v1"
        assert await listed(here, "") == [] == await listed(here, "after=end")
        cursor = everything[99][0]
        assert await listed(here, f"after={cursor}") == everything[100:]
        assert await listed(here, "after=beginning", last_event_id=cursor) == everything[100:]
        assert len(await listed(here, "after=beginning&limit=3")) == 3
        assert {e["type"] for _, e in await listed(here, "after=beginning&types=model.*")} == {
            "model.registered.v1", "model.updated.v1"}
        assert len(await listed(here, "after=beginning&types=image.built,model.updated")) == 166
        assert len(await listed(here, "after=beginning&types=image.built&types=*.updated")) == 166
        assert [e["subject"] for _, e in await listed(here, "after=beginning&subject=iris:7")] == ["iris:7"]
        assert len(await listed(here, "after=beginning&subject=iris:1?")) == 10


@pytest.mark.parametrize(("query", "field"), [
    ("types=model.registred", "types"), ("types=*.nothing,model.*", "types"), ("follow=maybe", "follow"),
    ("limit=0", "limit"), ("limit=x", "limit"), ("kind=model", "kind"),
])
async def test_bad_parameters(tmp_path: Path, query: str, field: str) -> None:
    async with yard(tmp_path) as here:
        status, _, body = await here.call("GET", f"/v1/events?{query}")
        assert status == 422 and [e["field"] for e in body["errors"]] == [field]


async def test_a_bad_cursor_is_a_problem(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        for how in ({"params": {"after": "yesterday"}}, {"headers": {"last-event-id": "yesterday"}}):
            status, _, body = await here.call("GET", "/v1/events", **how)
            assert (status, body["code"]) == (422, "invalid")


async def test_events_arrive_as_they_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "HEARTBEAT_S", 0.1)
    async with yard(tmp_path) as here, here.http.get(here.url + "/v1/events?types=model.*") as answer:
        await publish(here, "iris:1")  # after the head: it is in the stream although `after` is `end`
        text = ""
        while "iris:1" not in text:
            text += (await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5)).decode()
        await publish(here, "iris:2", "image.built")
        await publish(here, "iris:3", workspace="other")
        beats = [(await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5)).decode() for _ in range(4)]
        assert all(beat.startswith(":") for beat in beats) and not events_of("".join(beats))
        began = time.monotonic()
        await publish(here, "iris:4")
        while "iris:4" not in text:
            text += (await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5)).decode()
        assert time.monotonic() - began < 1
        assert [e["subject"] for _, e in events_of(text)] == ["iris:1", "iris:4"]


async def test_many_listeners_and_their_end(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        answers = [await here.http.get(here.url + "/v1/events") for _ in range(30)]
        await publish(here, "iris:1")
        for answer in answers:
            while b"iris:1" not in await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5):
                pass
        for answer in answers[:15]:
            answer.close()
        began = time.monotonic()
        await here.server.stop()
        assert time.monotonic() - began < 5
        for answer in answers[15:]:
            assert (await answer.content.read()).strip().startswith(b":") or answer.content.at_eof()


async def test_dead_letters_of_all_services_and_the_way_back(tmp_path: Path) -> None:
    soil = Soil(refuse_events=True)
    async with (yard(tmp_path, ["garden"], soil=soil, work=True) as garden,
                yard(tmp_path, ["orchard"], urls={"garden": garden.url}) as here):
        garden.peers.urls["orchard"] = here.url
        for n in range(5):
            await publish(here, f"iris:{n}")
        items: list[dict[str, Any]] = []
        for _ in range(200):
            items = (await here.call("GET", "/v1/dead"))[2]["items"]
            if len(items) == 5:
                break
            await asyncio.sleep(0.05)
        assert {i["service"] for i in items} == {"garden"} and {i["subject"] for i in items} == {
            f"iris:{n}" for n in range(5)}
        assert all("not liked" in i["message"] for i in items)
        assert items == sorted(items, key=lambda i: i["created"], reverse=True)
        walked, after = [], ""
        for _ in range(9):
            page = (await here.call("GET", f"/v1/dead?limit=2{after}"))[2]
            walked += page["items"]
            after = f"&after={page['next']}"
            if page["next"] is None:
                break
        assert walked == items and page["unreachable"] == []
        assert (await here.call("GET", "/v1/dead?service=orchard"))[2]["items"] == []
        assert (await here.call("GET", "/v1/dead?service=nobody"))[0] == 422
        first, second = items[0]["id"], items[1]["id"]
        assert (await here.call("GET", f"/v1/dead/{first}"))[2] == items[0]
        status, _, body = await here.call("POST", f"/v1/dead/{first}/replay")
        assert (status, body["detail"]) == (422, "this event is not liked")
        soil.refuse_events = False
        for one in (here, garden):
            outcome = (await one.call("POST", f"/v1/dead/{items[one is here]['id']}/replay"))
            assert (outcome[0], outcome[2]["outcome"]) == (200, "applied")
        third = items[2]["id"]
        assert (await here.call("DELETE", f"/v1/dead/{third}"))[2]["outcome"] == "dropped"
        assert (await here.call("DELETE", f"/v1/dead/{third}"))[0] == 204
        for gone in (first, second, third, "nothing"):
            assert (await here.call("GET", f"/v1/dead/{gone}"))[0] == 404
            assert (await here.call("POST", f"/v1/dead/{gone}/replay"))[0] == 404
        await garden.server.stop()
        page = (await here.call("GET", "/v1/dead"))[2]
        assert page["items"] == [] and [u["service"] for u in page["unreachable"]] == ["garden"]
        assert (await here.call("GET", f"/v1/dead/{first}"))[0] == 503
