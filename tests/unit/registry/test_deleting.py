"""Holds, aliases, deletion and what becomes of the bytes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from modelyard.core.errors import Conflict
from modelyard.core.events import Envelope
from modelyard.core.specs import ModelSpec
from modelyard.registry import SERVICE, artifacts, holds
from modelyard.registry.latest import settle
from modelyard.registry.model import Artifact, Model, ModelName
from modelyard.registry.register import register
from tests.unit.registry.conftest import Registry, digest

HOLDS = "/internal/v1/models/{}/holds/{}/{}"


async def held(registry: Registry, holder: str = "iris-scorer:7", kind: str = "image", phase: str = "ready") -> None:
    registry.phases.images[holder] = phase
    await registry.ask("PUT", HOLDS.format("iris:1", kind, holder), internal=True, status=200)


async def test_delete_is_one_event_and_repeats_are_204(registry: Registry) -> None:
    await registry.register(tags={"a": "b"})
    gone = await registry.ask("DELETE", "/v1/models/iris:1", status=200)
    assert gone["id"] == "iris:1"
    await registry.ask("DELETE", "/v1/models/iris:1", status=204)
    await registry.ask("DELETE", "/v1/models/rose:1", status=204)
    await registry.ask("GET", "/v1/models/iris:1", status=404)
    assert [e.topic for e in await registry.events()] == ["model.registered", "model.deleted"]
    assert (await registry.events())[1].data["tags"] == {"a": "b"}


async def test_delete_wants_a_version(registry: Registry) -> None:
    await registry.register()
    for ref in ("iris", "iris@champion"):
        assert "iris:VERSION" in (await registry.ask("DELETE", f"/v1/models/{ref}", status=422))["detail"]
    await registry.ask("GET", "/v1/models/iris:1", status=200)


async def test_a_hold_blocks_and_says_who_and_in_which_phase(registry: Registry) -> None:
    await registry.register()
    await held(registry)
    await held(registry)
    problem = await registry.ask("DELETE", "/v1/models/iris:1", status=412)
    assert problem["code"] == "in-use"
    assert problem["blockers"] == [{"kind": "image", "id": "iris-scorer:7", "phase": "ready"}]
    await registry.ask("DELETE", HOLDS.format("iris:1", "image", "iris-scorer:7"), internal=True, status=200)
    await registry.ask("DELETE", HOLDS.format("iris:1", "image", "iris-scorer:7"), internal=True, status=200)
    await registry.ask("DELETE", "/v1/models/iris:1", status=200)
    await registry.ask("DELETE", HOLDS.format("iris:1", "image", "iris-scorer:7"), internal=True, status=200)
    await registry.ask("PUT", HOLDS.format("iris:1", "image", "iris-scorer:7"), internal=True, status=404)


@pytest.mark.parametrize("phase", ["failed", "cancelled", None])
async def test_who_failed_or_is_gone_blocks_nothing(registry: Registry, phase: str | None) -> None:
    await registry.register()
    await held(registry)
    if phase is None:
        del registry.phases.images["iris-scorer:7"]
    else:
        registry.phases.images["iris-scorer:7"] = phase
    await registry.ask("DELETE", "/v1/models/iris:1", status=200)


async def test_who_cannot_be_asked_blocks(registry: Registry) -> None:
    await registry.register()
    await held(registry)
    registry.ctx.peers.urls["image-builder"] = "http://127.0.0.1:9"
    problem = await registry.ask("DELETE", "/v1/models/iris:1", status=412)
    assert problem["blockers"] == [{"kind": "image", "id": "iris-scorer:7", "phase": "unknown"}]


async def test_holds_are_for_services_and_leave_the_document_as_it_was(registry: Registry) -> None:
    doc = await registry.register()
    await registry.ask("PUT", HOLDS.format("iris:1", "image", "x:1"), status=403)
    await registry.ask("PUT", HOLDS.format("iris:1", "friend", "x:1"), internal=True, status=422)
    await registry.ask("PUT", HOLDS.format("iris", "image", "x:1"), internal=True, status=422)
    await held(registry)
    assert await registry.ask("GET", "/v1/models/iris:1") == doc
    assert len(await registry.events()) == 1


async def test_a_hold_that_comes_behind_its_release_is_not_placed(registry: Registry) -> None:
    """A builder's call may outlive the builder and the image: it changes nothing any more, seen before or not."""
    await registry.register()
    await held(registry)
    for image in ("iris-scorer:7", "never-held:1"):
        await registry.ask("DELETE", HOLDS.format("iris:1", "image", image), internal=True, status=200)
        await registry.ask("PUT", HOLDS.format("iris:1", "image", image), internal=True, status=200)
    doc = await registry.ctx.store.get(Model, "iris:1")
    assert doc is not None and doc.holds == {}
    await registry.ask("DELETE", "/v1/models/iris:1", status=200)


async def test_holds_and_deletion_at_once_end_in_one_of_the_two(registry: Registry) -> None:
    """Whoever got a hold finds the model there; whoever was told that it is gone, is right."""
    for round_ in range(30):
        doc = await registry.register(f"m{round_}")
        path = HOLDS.format(doc["id"], "image", "iris-scorer:7")
        registry.phases.images["iris-scorer:7"] = "ready"

        async def status(method: str, where: str, **how: Any) -> int:
            async with registry.http.request(method, f"http://127.0.0.1:{registry.port}{where}", **how) as answer:
                return answer.status

        token = {"x-modelyard-service-token": "a-service-token"}
        order = [status("DELETE", f"/v1/models/{doc['id']}"), status("PUT", path, headers=token)]
        got = await asyncio.gather(*(order if round_ % 2 else order[::-1]))
        deleted, hold = got if round_ % 2 else got[::-1]
        assert (deleted, hold) in ((200, 404), (412, 200)), (deleted, hold)


async def test_an_images_end_releases_its_holds(registry: Registry) -> None:
    await registry.register()
    await held(registry)
    event = Envelope(id="e-1", source="/modelyard/image-builder", type="image.deleted.v1", subject="iris-scorer:7",
                     time=registry.ctx.now(), partitionkey="default/iris-scorer:7", sequence=f"{3:020d}",
                     data={"models": ["iris:1", "gone:4"]})
    for _ in range(2):
        await SERVICE.handlers["image.deleted"](registry.ctx, event)
    await registry.ask("DELETE", "/v1/models/iris:1", status=200)


# -- aliases --------------------------------------------------------------------------------------------------------


async def test_an_alias_moves_blocks_and_is_told(registry: Registry) -> None:
    for data in (b"1", b"2"):
        await registry.register(data=data)
    path = "/v1/models/iris/aliases/champion"
    doc = await registry.ask("PUT", path, json={"version": 1}, status=200)
    assert (doc["id"], doc["aliases"], doc["generation"]) == ("iris", {"champion": 1}, 1)
    assert (await registry.ask("GET", "/v1/models/iris:1"))["aliases"] == ["champion"]
    problem = await registry.ask("DELETE", "/v1/models/iris:1", status=412)
    assert problem["blockers"] == [{"kind": "alias", "id": "iris@champion", "phase": None}]
    assert await registry.ask("PUT", path, json={"version": 1}, status=200) == doc
    moved = await registry.ask("PUT", path, json={"version": 2}, headers={"If-Match": '"1"'}, status=200)
    assert moved["aliases"] == {"champion": 2} and moved["generation"] == 2
    await registry.ask("PUT", path, json={"version": 1}, headers={"If-Match": '"1"'}, status=412)
    assert (await registry.ask("GET", "/v1/models/iris:1"))["aliases"] == []
    assert (await registry.ask("GET", "/v1/models/iris/aliases")) == moved
    await registry.ask("DELETE", "/v1/models/iris:1", status=200)
    await registry.ask("DELETE", path, status=200)
    await registry.ask("DELETE", path, status=204)
    await registry.ask("DELETE", "/v1/models/iris:2", status=200)
    told = [(e.subject, e.sequence, e.data["aliases"], e.data["previous"])
            for e in await registry.events() if e.topic == "model.aliased"]
    assert told == [("iris", f"{1:020d}", {"champion": 1}, {"aliases": {}}),
                    ("iris", f"{2:020d}", {"champion": 2}, {"aliases": {"champion": 1}}),
                    ("iris", f"{3:020d}", {}, {"aliases": {"champion": 2}})]


async def test_bad_aliases(registry: Registry) -> None:
    await registry.register()
    put = "/v1/models/iris/aliases/"
    assert (await registry.ask("PUT", put + "champion", json={"version": 7}, status=422)
            )["errors"][0]["field"] == "version"
    for body in ({"version": "1"}, {}, {"version": 1, "weight": 2}, {"version": 0}):
        await registry.ask("PUT", put + "champion", json=body, status=422)
    for alias in ("latest", "9lives", "a%20b"):
        await registry.ask("PUT", put + alias, json={"version": 1}, status=422)
    await registry.ask("PUT", "/v1/models/rose/aliases/champion", json={"version": 1}, status=404)
    await registry.ask("GET", "/v1/models/rose/aliases", status=404)
    assert (await registry.ask("GET", "/v1/models/iris/aliases", status=200))["aliases"] == {}
    assert (await registry.ask("GET", "/v1/models/iris:1"))["aliases"] == []


async def test_aliases_set_at_once_leave_one_hold_each(registry: Registry) -> None:
    for n in range(5):
        await registry.register(data=bytes([n + 1]))
    await asyncio.gather(*(registry.ask("PUT", f"/v1/models/iris/aliases/{alias}", json={"version": v}, status=200)
                           for v in range(1, 6) for alias in ("champion", "shadow")))
    names = (await registry.ask("GET", "/v1/models/iris/aliases"))["aliases"]
    for version in range(1, 6):
        doc = await registry.ask("GET", f"/v1/models/iris:{version}")
        assert doc["aliases"] == sorted(a for a, v in names.items() if v == version)


async def test_a_crash_between_hold_and_alias_blocks_for_a_minute_only(registry: Registry) -> None:
    await registry.register()
    await holds.hold(registry.ctx, "default", "iris:1", "alias", "champion")
    await registry.ask("DELETE", "/v1/models/iris:1", status=412)
    registry.later(61)
    await registry.ask("DELETE", "/v1/models/iris:1", status=200)


async def test_a_crash_behind_the_alias_is_repaired_by_its_event(registry: Registry) -> None:
    for data in (b"1", b"2"):
        await registry.register(data=data)
    for version in (1, 2):
        await registry.ask("PUT", "/v1/models/iris/aliases/champion", json={"version": version}, status=200)
    await holds.hold(registry.ctx, "default", "iris:1", "alias", "champion")       # as if the release never came
    await holds.release(registry.ctx, "default", "iris:2", "alias", "champion")    # nor the hold
    event = next(e for e in reversed(await registry.events()) if e.topic == "model.aliased")
    await SERVICE.handlers["model.aliased"](registry.ctx, event)
    assert (await registry.ask("GET", "/v1/models/iris:1"))["aliases"] == []
    assert (await registry.ask("GET", "/v1/models/iris:2"))["aliases"] == ["champion"]


# -- the latest, and the bytes ----------------------------------------------------------------------------------------


async def test_the_latest_follows_deletions_and_crashes(registry: Registry) -> None:
    for data in (b"1", b"2", b"3"):
        await registry.register(data=data)
    await registry.ask("DELETE", "/v1/models/iris:3", status=200)

    async def latest() -> list[str]:
        return [m["id"] for m in (await registry.ask("GET", "/v1/models?latest=true"))["items"]]

    assert await latest() == ["iris:2"]
    for id_, marks in (("iris:1", ("latest", "latest/iris")), ("iris:2", ())):   # as a crash might leave it
        await registry.ctx.change(Model, id_, lambda d, marks=marks: (d.evolve(marks=marks), ()))
    event = next(e for e in await registry.events() if e.topic == "model.registered")
    async with registry.another_process() as ctx:   # which does not remember that it has seen to it
        await SERVICE.handlers["model.registered"](ctx, event)
    assert await latest() == ["iris:2"]
    await settle(registry.ctx, "default", "nobody")


async def test_the_last_model_takes_its_bytes_along(registry: Registry) -> None:
    await registry.register(data=b"shared")
    await registry.register("rose", data=b"shared")
    async with registry.loops():
        await registry.ask("DELETE", "/v1/models/iris:1", status=200)
        await asyncio.sleep(0.2)
        assert await registry.ask("GET", "/v1/models/rose/content", status=200) == b"shared"
        await registry.ask("DELETE", "/v1/models/rose:1", status=200)

        async def gone() -> bool:
            return registry.blobs() == []

        await registry.until(gone)
        await registry.ask("HEAD", f"/v1/artifacts/{digest(b'shared')}", status=404)
        problem = await registry.ask("POST", "/v1/models", status=422,
                                     json={"name": "iris", "artifact": digest(b"shared")})
        assert "upload it first" in problem["detail"]
        assert (await registry.register(data=b"shared"))["id"] == "iris:2"
    assert await registry.ask("GET", "/v1/models/iris:2/content", status=200) == b"shared"


async def test_a_crash_behind_the_deletion_is_repaired_by_its_event(registry: Registry) -> None:
    await registry.register(data=b"bytes")
    await registry.ctx.change(Model, "iris:1", lambda d: (d.evolve(deleted=True), ()))
    event = (await registry.events())[0]
    await SERVICE.handlers["model.deleted"](registry.ctx, event)
    doc = await registry.ctx.store.get(Artifact, digest(b"bytes"))
    assert doc is not None and doc.fate == "doomed"


async def test_a_doomed_artifact_is_rescued_by_whoever_wants_it(registry: Registry) -> None:
    for again in ("HEAD", "PUT", "POST"):
        await registry.register(again, data=b"bytes")
        await registry.ask("DELETE", f"/v1/models/{again}:1", status=200)
        if again == "POST":
            await registry.ask("POST", "/v1/models", json={"name": "b", "artifact": digest(b"bytes")}, status=201)
        else:
            await registry.ask(again, f"/v1/artifacts/{digest(b'bytes')}", data=b"bytes" if again == "PUT" else None,
                               status=200)
        doc = await registry.ctx.store.get(Artifact, digest(b"bytes"))
        assert doc is not None and doc.fate == "kept" and doc.due is None
    async with registry.loops():
        await asyncio.sleep(0.2)
    assert await registry.ask("GET", "/v1/models/b/content", status=200) == b"bytes"


async def test_a_registration_that_came_too_late_never_was(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The purge passes the point of no return between the check of the artifact and the commit of the version."""
    name = await registry.upload(b"bytes")
    numbered = register.__globals__["_numbered"]

    async def stalled(*args: Any) -> Model:
        await registry.ctx.change(Artifact, name, lambda d: (d.evolve(fate="doomed"), ()))
        doc = await registry.ctx.store.get(Artifact, name)
        assert doc is not None
        change = await artifacts.purge(registry.ctx, doc)
        made: Model = await numbered(*args)
        await registry.ctx.change(Artifact, name, change)
        return made

    monkeypatch.setitem(register.__globals__, "_numbered", stalled)
    with pytest.raises(Conflict) as refused:
        await register(registry.ctx, "default", ModelSpec(name="iris", artifact=name), "token")
    assert refused.value.code == "being-removed" and refused.value.retryable
    assert (await registry.ask("GET", "/v1/models"))["items"] == []
    assert [e.topic for e in await registry.events()] == ["model.registered", "model.deleted"]
    monkeypatch.undo()
    await registry.upload(b"bytes")
    again = await register(registry.ctx, "default", ModelSpec(name="iris", artifact=name), "token")
    assert (again.id, again.deleted) == ("iris:2", False), "it never was, so the same request may make another"


async def test_registering_and_deleting_one_artifact_at_once_never_loses_bytes(registry: Registry) -> None:
    """Every model that was answered 201 can be downloaded until it is deleted."""
    data, counts = b"contended" * 100, {"made": 0, "told": 0}

    async def user(n: int) -> None:
        for _ in range(8):
            await registry.ask("PUT", f"/v1/artifacts/{digest(data)}", data=data)
            body = {"name": f"m{n}", "artifact": digest(data)}
            async with registry.http.post(f"http://127.0.0.1:{registry.port}/v1/models", json=body) as answer:
                doc = await answer.json()
                if answer.status != 201:   # removed between upload and registration: told so, and may try again
                    assert answer.status == 409 or "upload it first" in doc["detail"], doc
                    counts["told"] += 1
                    continue
            counts["made"] += 1
            assert await registry.ask("GET", f"/v1/models/{doc['id']}/content", status=200) == data
            await registry.ask("DELETE", f"/v1/models/{doc['id']}", status=200)

    async with registry.loops():
        await asyncio.gather(*(user(n) for n in range(6)))

        async def gone() -> bool:
            return registry.blobs() == []

        assert counts["made"] >= 40, counts
        await registry.until(gone)


async def test_a_model_that_slipped_in_before_the_doom_keeps_its_bytes(registry: Registry) -> None:
    """The deletion saw no user, a registration was answered, and only then was the artifact doomed."""
    await registry.register(data=b"bytes")
    now = registry.ctx.now()
    await registry.ctx.change(Artifact, digest(b"bytes"), lambda d: (d.evolve(fate="doomed", due=now), ()))

    async def settled() -> bool:
        doc = await registry.ctx.store.get(Artifact, digest(b"bytes"), tombstone=True)
        return doc is not None and doc.due is None

    async with registry.loops():
        await registry.until(settled)
    doc = await registry.ctx.store.get(Artifact, digest(b"bytes"))
    assert doc is not None and doc.fate == "kept"
    assert await registry.ask("GET", "/v1/models/iris:1/content", status=200) == b"bytes"


async def test_an_alias_that_another_process_moves_back_meanwhile(registry: Registry,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"1", b"2"):
        await registry.register(data=data)
    await registry.ask("PUT", "/v1/models/iris/aliases/champion", json={"version": 1}, status=200)
    release, times = holds.release, []

    async def interrupted(*args: Any, **more: Any) -> Any:
        if not times:
            times.append(1)
            await registry.ctx.change(ModelName, "iris", lambda d: (d.evolve(aliases={"champion": 1}), ()))
        return await release(*args, **more)

    monkeypatch.setattr(holds, "release", interrupted)
    await registry.ask("PUT", "/v1/models/iris/aliases/champion", json={"version": 2}, status=200)
    assert times
    assert (await registry.ask("GET", "/v1/models/iris:1"))["aliases"] == ["champion"]
    assert (await registry.ask("GET", "/v1/models/iris:2"))["aliases"] == []
