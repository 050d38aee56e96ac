"""Deployments over HTTP: what callers get, what loops and handlers make of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from modelyard.core.events import Envelope, event_id
from modelyard.deployer.converge import sweep, workload
from modelyard.deployer.handlers import on_image_done
from modelyard.deployer.model import Deployment, Sweep
from modelyard.image_builder.model import Image
from modelyard.kernel.idempotency import Request
from tests import handmade
from tests.unit.deployer.conftest import Desk, desk_on

pytestmark = pytest.mark.slow  # real programs are started and stopped

TOPICS = [f"deployment.{what}" for what in ("requested", "ready", "failed", "updated", "deleted")]
IRIS = {"name": "iris", "image": "scorer:1"}
VERSION = "def run(data):\n    return {'version': %d}\n"


async def topics(desk: Desk, subject: str = "iris") -> list[str]:
    """What was told of a deployment, in its order."""
    async with asyncio.timeout(10):
        while await desk.context("deployer").store.pending(1):
            await asyncio.sleep(0.02)
    told, _ = await desk.node.parts.bus.read(TOPICS, "beginning", 1000, 0)
    mine = sorted((e for _, e in told if e.subject == subject), key=lambda e: e.sequence)
    assert [int(e.sequence) for e in mine] == list(range(1, len(mine) + 1))
    return [e.topic for e in mine]


async def test_the_whole_life_of_a_deployment(desk: Desk) -> None:
    await desk.image(1, VERSION % 1)
    await desk.image(2, VERSION % 2)
    await desk.image(3, handmade.BROKEN)
    asked = await desk.call("POST", "/v1/deployments", {**IRIS, "image": "scorer:1", "replicas": 1})
    assert (asked.status, asked.headers["etag"], asked.headers["location"]) == (202, '"1"', "/v1/deployments/iris")
    one = await desk.healthy(1)
    assert (one["models"], one["replicas_ready"], one["serving"]) == (["iris:1"], 1, 1)
    assert not {"ports", "history", "holds", "revision", "grant_until"} & set(one)
    assert (await desk.call("POST", "/v1/deployments/iris/score", {"data": 1})).body == {"version": 1}

    blocked = await desk.call("DELETE", "/v1/images/scorer:1")
    assert blocked.status == 412 and blocked.body["blockers"][0]["id"] == "iris"

    changed = await desk.call("PATCH", "/v1/deployments/iris", {"image": "scorer:2"}, **{"If-Match": '"1"'})
    assert (changed.status, changed.body["generation"]) == (202, 2)
    stale = await desk.call("PATCH", "/v1/deployments/iris", {"replicas": 5}, **{"If-Match": '"1"'})
    assert (stale.status, stale.body["code"]) == (412, "stale")
    two = await desk.healthy(2)
    assert two["endpoints"] == one["endpoints"]
    assert (await desk.call("POST", "/v1/deployments/iris/score", {"data": 1})).body == {"version": 2}
    same = await desk.call("PATCH", "/v1/deployments/iris", {"image": "scorer:2"})
    assert (same.status, same.body["generation"]) == (200, 2)

    await desk.call("PATCH", "/v1/deployments/iris", {"image": "scorer:3"})
    bad = await desk.until(lambda d: d["phase"] == "degraded" and d["observed_generation"] == 3)
    assert (bad["serving"], bad["replicas_ready"]) == (2, 1)
    assert "the weights are not here" in next(c for c in bad["conditions"] if c["type"] == "Progressing")["message"]
    back = await desk.call("POST", "/v1/deployments/iris/rollback", {})
    assert (back.status, back.body["generation"], back.body["image"]) == (202, 4, "scorer:2")
    await desk.healthy(4)
    past = (await desk.get(more="/history"))["items"]
    assert [(p["generation"], p["image"], p["healthy"]) for p in past] == [
        (4, "scorer:2", True), (3, "scorer:3", False), (2, "scorer:2", True), (1, "scorer:1", True)]
    log = await desk.call("GET", "/v1/deployments/iris/log?tail=200")
    assert log.status == 200 and "the weights are not here" in log.body

    gone = await desk.call("DELETE", "/v1/deployments/iris?wait=30")
    assert gone.status == 200 and (await desk.call("DELETE", "/v1/deployments/iris")).status == 204
    assert await topics(desk) == [
        "deployment.requested", "deployment.ready", "deployment.updated", "deployment.ready", "deployment.updated",
        "deployment.failed", "deployment.updated", "deployment.ready", "deployment.deleted"]
    assert (await desk.call("DELETE", "/v1/images/scorer:1")).status == 202, "nothing holds it any more"


async def test_a_name_is_taken_until_it_is_deleted_and_its_events_go_on(desk: Desk) -> None:
    await desk.image(1)
    assert (await desk.call("POST", "/v1/deployments", IRIS)).status == 202
    taken = await desk.call("POST", "/v1/deployments", IRIS)
    assert (taken.status, taken.body["code"]) == (409, "name-taken")
    await desk.call("DELETE", "/v1/deployments/iris")
    await desk.gone()
    again = await desk.call("POST", "/v1/deployments", IRIS)
    assert (again.status, again.body["generation"]) == (202, 1)
    await desk.healthy(1)
    assert (await topics(desk))[-3:] == ["deployment.deleted", "deployment.requested", "deployment.ready"]


async def test_put_creates_and_replaces(desk: Desk) -> None:
    await desk.image(1)
    created = await desk.call("PUT", "/v1/deployments/iris", {**IRIS, "tags": {"team": "flora"}, "description": "x"})
    assert (created.status, created.body["generation"]) == (202, 1)
    same = await desk.call("PUT", "/v1/deployments/iris", created.body)
    assert (same.status, same.body["generation"]) == (200, 1), "what GET answers can be put back"
    replaced = await desk.call("PUT", "/v1/deployments/iris", IRIS)
    assert (replaced.status, replaced.body["tags"], replaced.body["description"]) == (202, {}, "")
    other = await desk.call("PUT", "/v1/deployments/other", IRIS)
    assert (other.status, other.body["errors"][0]["field"]) == (422, "name")


async def test_what_is_wrong_is_said_with_its_field(desk: Desk) -> None:
    await desk.image(1)
    for body, field in (
        ({**IRIS, "image": "nothing:1"}, "image"), ({**IRIS, "image": "nothing"}, "image"),
        ({**IRIS, "target": "moon"}, "target"), ({**IRIS, "replicas": 0}, "replicas"),
        ({**IRIS, "replicas": -1}, "replicas"), ({**IRIS, "autoscale": {"min": 1}}, "autoscale"),
        ({**IRIS, "resources": {"memory": "much"}}, "resources.memory"), ({**IRIS, "colour": "red"}, "colour"),
        ({"name": "Iris!", "image": "scorer:1"}, "name"), ({**IRIS, "tags": {"a": 1}}, "tags.a"),
        ({"name": "iris", "traffic": [{"image": "scorer:1", "weight": 1}] * 2}, "traffic"),
    ):
        answer = await desk.call("POST", "/v1/deployments", body)
        assert (answer.status, answer.headers["content-type"]) == (422, "application/problem+json"), body
        assert field in [e["field"] for e in answer.body["errors"]], answer.body
    assert "local" in (await desk.call("POST", "/v1/deployments", {**IRIS, "target": "moon"})).body["detail"]
    assert (await desk.call("GET", "/v1/deployments")).body["items"] == []
    one = await desk.call("POST", "/v1/deployments",
                          {"name": "iris", "traffic": [{"image": "scorer", "weight": 100}]})
    assert (one.status, one.body["image"]) == (202, "scorer:1")
    moved = await desk.call("PATCH", "/v1/deployments/iris", {"name": "other"})
    assert moved.status == 422


async def test_deployments_are_found_by_model_image_target_and_tag(desk: Desk) -> None:
    for version in (1, 2):
        await desk.image(version)
        await desk.call("POST", "/v1/deployments", {
            "name": f"iris-{version}", "image": f"scorer:{version}", "tags": {"n": str(version), "all": "yes"}})

    async def found(query: str) -> list[str]:
        return sorted(d["id"] for d in (await desk.call("GET", f"/v1/deployments?{query}")).body["items"])

    both = ["iris-1", "iris-2"]
    assert await found("model=iris") == await found("image=scorer") == await found("target=local") == both
    assert await found("tag=all&limit=10") == both
    assert await found("model=iris:2") == await found("image=scorer:2") == await found("tag=n=2") == ["iris-2"]
    assert await found("model=iris:3") == await found("tag=n=2&tag=all=no") == []
    assert (await desk.call("GET", "/v1/deployments?colour=red")).status == 422


async def test_a_deployment_waits_for_its_image_and_goes_on_when_it_is_built(desk: Desk) -> None:
    building = await desk.image(1, phase="building")
    asked = await desk.call("POST", "/v1/deployments", IRIS)
    assert asked.body["phase"] == "pending"
    waiting = await desk.call("GET", "/v1/deployments/iris?wait=0.3")
    assert waiting.body["phase"] == "pending"
    ctx = desk.context("image-builder")
    digest = await handmade.image(ctx.images, "scorer", "1")
    await ctx.change(Image, building.id, lambda d: (d.evolve(phase="ready", digest=digest), ()))
    await desk.healthy(1)


async def test_an_image_that_fails_fails_its_deployment(desk: Desk) -> None:
    building = await desk.image(1, phase="building")
    await desk.call("POST", "/v1/deployments", IRIS)
    ctx = desk.context("image-builder")
    await ctx.change(Image, building.id, lambda d: (d.evolve(phase="failed", reason="score.py:3: no run"), ()))
    bad = await desk.until(lambda d: d["phase"] == "failed")
    assert "score.py:3: no run" in bad["conditions"][-1]["message"] + str(bad["conditions"])
    assert (await desk.call("POST", "/v1/deployments/iris/score", {})).status == 503


async def test_news_of_an_image_makes_the_loop_look_and_repeats_change_nothing(desk: Desk) -> None:
    await desk.image(1, phase="building")
    await desk.call("POST", "/v1/deployments", IRIS)
    ctx = desk.context("deployer")
    event = Envelope(id=event_id(), source="/modelyard/image-builder", type="image.built.v1", subject="scorer:1",
                     time=ctx.now(), partitionkey="default/scorer:1", sequence="1".zfill(20), data={})
    await on_image_done(ctx, event)
    await on_image_done(ctx, event)
    doc = await ctx.store.get(Deployment, "iris")
    assert doc is not None and doc.generation == 1


async def test_rollback_to_what_is_gone_is_refused(desk: Desk) -> None:
    for version in (1, 2):
        await desk.image(version)
    await desk.call("POST", "/v1/deployments", IRIS)
    nothing = await desk.call("POST", "/v1/deployments/iris/rollback", {})
    assert (nothing.status, nothing.body["code"]) == (409, "nothing-to-roll-back-to")
    assert (await desk.call("POST", "/v1/deployments/iris/rollback", {"generation": 9})).status == 404
    await desk.call("PATCH", "/v1/deployments/iris", {"image": "scorer:2"})
    await desk.healthy(2)
    await desk.call("PATCH", "/v1/deployments/iris", {"description": "so that 2 is the last healthy one"})
    await desk.healthy(3)

    async def released() -> bool:
        return (await desk.call("DELETE", "/v1/images/scorer:1")).status == 202

    async with asyncio.timeout(20):
        while not await released():
            await asyncio.sleep(0.1)
    async with asyncio.timeout(20):
        while (await desk.call("GET", "/v1/images/scorer:1")).status != 404:
            await asyncio.sleep(0.1)
    refused = await desk.call("POST", "/v1/deployments/iris/rollback", {"generation": 1})
    assert (refused.status, refused.body["code"]) == (409, "image-gone")
    assert (await desk.get())["generation"] == 3


async def test_one_of_fifty_writers_with_one_etag_wins(desk: Desk) -> None:
    await desk.image(1)
    await desk.call("POST", "/v1/deployments", IRIS)
    answers = await asyncio.gather(*(
        desk.call("PATCH", "/v1/deployments/iris", {"tags": {"n": str(n)}}, **{"If-Match": '"1"'}) for n in range(50)))
    assert sorted(a.status for a in answers) == [202] + [412] * 49


async def test_an_idempotency_key_creates_once(desk: Desk) -> None:
    await desk.image(1)
    answers = [await desk.call("POST", "/v1/deployments", IRIS, **{"Idempotency-Key": "k-1"}) for _ in range(3)]
    assert [a.status for a in answers] == [202] * 3 and len({str(a.body) for a in answers}) == 1


async def test_a_retry_after_a_deletion_creates_nothing_again(desk: Desk) -> None:
    """The answer was not kept (its process died), and the deployment was deleted before the caller asked again."""
    await desk.image(1)
    asked = await desk.call("POST", "/v1/deployments", IRIS, **{"Idempotency-Key": "k-1"})
    assert (await desk.call("DELETE", "/v1/deployments/iris?wait=30")).status in (200, 202)
    ctx, key = desk.context("deployer"), hashlib.sha256(b"k-1").hexdigest()
    kept = await ctx.store.get(Request, key)
    assert kept is not None and kept.status == 202
    await ctx.store.commit(kept.evolve(status=0, body="", until=ctx.now()))
    again = await desk.call("POST", "/v1/deployments", IRIS, **{"Idempotency-Key": "k-1"})
    assert (again.status, again.body["created"], again.body["phase"]) == (202, asked.body["created"], "deleting")
    assert (await desk.call("GET", "/v1/deployments/iris")).status == 404


async def test_what_belongs_to_no_deployment_is_removed(desk: Desk) -> None:
    await desk.image(1)
    await desk.call("POST", "/v1/deployments", IRIS)
    one = await desk.healthy(1)
    ctx = desk.context("deployer")
    doc = await ctx.store.get(Deployment, "iris")
    assert doc is not None
    stray = doc.evolve(id="stray", ports={})
    grant = await ctx.grants.lend("default", "stray", 60)
    await ctx.targets["local"].apply(workload(stray, doc.image_digest or "", grant))
    assert ("default", "stray") in await ctx.targets["local"].list()
    await sweep(ctx, Sweep(id="sweep"))
    assert await ctx.targets["local"].list() == [("default", "iris")]
    assert (await desk.get())["endpoints"] == one["endpoints"]


async def served(desk: Desk) -> None:
    async with asyncio.timeout(30):
        while (await desk.call("POST", "/v1/deployments/iris/score", {"data": 1})).status != 200:
            await asyncio.sleep(0.1)


def pids(data: Path, what: str) -> list[int]:
    """Processes of one kind that run from this data folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().decode() if entry.name.isdigit() else ""
        except OSError:
            continue
        if str(data) in line and what in line:
            found.append(int(entry.name))
    return sorted(found)


async def test_whatever_is_killed_by_hand_comes_back(desk: Desk, tmp_path: Path) -> None:
    await desk.image(1)
    await desk.call("POST", "/v1/deployments", IRIS)
    one = await desk.healthy(1)
    for what in ("modelyard.supervisor", "serve", "ship"):
        before = pids(tmp_path, what)
        assert before, what
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            while not pids(tmp_path, what) or set(pids(tmp_path, what)) & set(before):
                await asyncio.sleep(0.05)
        await served(desk)
        assert (await desk.healthy(1))["endpoints"] == one["endpoints"]
    assert (await topics(desk)).count("deployment.ready") == 1


async def test_started_again_everything_serves_on_the_same_ports(tmp_path: Path) -> None:
    async with desk_on(tmp_path) as desk:
        await desk.image(1)
        await desk.call("POST", "/v1/deployments", {**IRIS, "replicas": 2})
        before = await desk.healthy(1)
    assert pids(tmp_path, "launch.py") == []
    async with desk_on(tmp_path) as desk:
        await served(desk)
        after: dict[str, Any] = await desk.healthy(1)
        assert after["endpoints"] == before["endpoints"]
