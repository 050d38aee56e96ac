"""Models over HTTP: registration, references, changes, downloads."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from modelyard.core.events import Fact
from modelyard.core.specs import ModelSpec
from modelyard.registry.model import Model, place
from modelyard.registry.register import register
from tests.unit.registry.conftest import Registry, digest


async def test_a_registration_gets_the_next_version_and_says_what_it_made(registry: Registry) -> None:
    doc = await registry.register(data=b"one", tags={"team": "flora"}, properties={"accuracy": "0.97"},
                                  description="first", run="r-1", experiment="e", framework="lightgbm",
                                  framework_version="4.5", datasets=[{"name": "iris", "uri": "https://e/iris"}])
    assert registry.last.headers["Location"] == "/v1/models/iris:1"
    assert registry.last.headers["ETag"] == '"1"'
    assert (doc["id"], doc["version"], doc["generation"], doc["size"]) == ("iris:1", 1, 1, 3)
    assert doc["framework"] == "lightgbm" and doc["tags"] == {"team": "flora"} and doc["aliases"] == []
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", doc["created"])
    assert not doc.keys() & {"place", "marks", "holds", "revision", "made_by", "deleted", "sequence"}
    assert (await registry.register(data=b"two"))["id"] == "iris:2"
    assert await registry.ask("GET", "/v1/models/iris:1", status=200) == doc


async def test_references_resolve_and_say_what_they_meant(registry: Registry) -> None:
    for data in (b"1", b"2", b"3"):
        await registry.register(data=data)
    await registry.ask("PUT", "/v1/models/iris/aliases/champion", json={"version": 2}, status=200)
    assert (await registry.ask("GET", "/v1/models/iris"))["id"] == "iris:3"
    assert registry.last.headers["Content-Location"] == "/v1/models/iris:3"
    assert (await registry.ask("GET", "/v1/models/iris@champion"))["id"] == "iris:2"
    assert registry.last.headers["Content-Location"] == "/v1/models/iris:2"
    await registry.ask("GET", "/v1/models/iris:2", status=200)
    assert "Content-Location" not in registry.last.headers
    for ref in ("iris:4", "other", "iris@nobody", "other@champion"):
        assert (await registry.ask("GET", f"/v1/models/{ref}", status=404))["code"] == "not-found"
    for ref in ("iris:0", "iris:x", "iris@", "@x"):
        await registry.ask("GET", f"/v1/models/{ref}", status=422)


async def test_a_parent_is_resolved_once_when_written(registry: Registry) -> None:
    await registry.register(data=b"1")
    child = await registry.register("iris-small", b"2", parent="iris")
    assert child["parent"] == "iris:1"
    await registry.register(data=b"3")
    assert (await registry.ask("GET", "/v1/models/iris-small:1"))["parent"] == "iris:1"


@pytest.mark.parametrize(("spec", "field"), [
    ({"name": "-iris"}, "name"), ({"name": "a" * 256}, "name"), ({"name": "iris rose"}, "name"),
    ({"name": 3}, "name"), ({"tags": {"team": 3}}, "tags.team"), ({"tags": ["a"]}, "tags"),
    ({"properties": {"a": None}}, "properties.a"), ({"colour": "blue"}, "colour"),
    ({"framework": "cobol"}, "framework"), ({"artifact": "sha256:abc"}, "artifact"), ({"artifact": None}, "artifact"),
    ({"filename": "a/b"}, "filename"), ({"unpack": "yes"}, "unpack"), ({"parent": "rose"}, "parent"),
    ({"framework_version": "1"}, ""),
])
async def test_bad_fields_are_named(registry: Registry, spec: dict[str, Any], field: str) -> None:
    body = {"name": "iris", "artifact": await registry.upload(b"w"), **spec}
    problem = await registry.ask("POST", "/v1/models", json=body, status=422)
    assert field in [error["field"] for error in problem["errors"]], problem
    assert (await registry.ask("GET", "/v1/models"))["items"] == []


async def test_all_problems_are_said_at_once(registry: Registry) -> None:
    problem = await registry.ask("POST", "/v1/models", status=422,
                                 json={"name": "iris", "artifact": digest(b"not here"), "parent": "rose:3"})
    assert {error["field"] for error in problem["errors"]} == {"artifact", "parent"}
    assert digest(b"not here") in problem["detail"] and "PUT /v1/artifacts/" in problem["detail"]
    await registry.ask("POST", "/v1/models", data=b"{", headers={"Content-Type": "application/json"}, status=400)


@pytest.mark.slow
async def test_two_hundred_at_once_get_versions_one_to_two_hundred(registry: Registry) -> None:
    artifact = await registry.upload(b"shared")
    answers = await asyncio.gather(*(
        registry.ask("POST", "/v1/models", json={"name": "iris", "artifact": artifact, "tags": {"n": str(n)}},
                     status=201) for n in range(200)))
    assert sorted(a["version"] for a in answers) == list(range(1, 201))
    latest = await registry.ask("GET", "/v1/models?latest=true")
    assert [m["id"] for m in latest["items"]] == ["iris:200"]
    events = await registry.events()
    assert sorted((e.subject, e.sequence, e.topic) for e in events) == sorted(
        (f"iris:{n}", f"{1:020d}", "model.registered") for n in range(1, 201))


async def test_a_version_is_never_given_twice(registry: Registry) -> None:
    for data in (b"1", b"2"):
        await registry.register(data=data)
    await registry.ask("DELETE", "/v1/models/iris:2", status=200)
    assert (await registry.ask("GET", "/v1/models/iris"))["id"] == "iris:1"
    assert (await registry.register(data=b"3"))["id"] == "iris:3"
    await registry.ask("GET", "/v1/models/iris:2", status=404)


async def test_an_idempotency_key_makes_one_version(registry: Registry) -> None:
    body = {"name": "iris", "artifact": await registry.upload(b"w")}
    key = {"Idempotency-Key": "once"}
    first = await registry.ask("POST", "/v1/models", json=body, headers=key, status=201)
    assert await registry.ask("POST", "/v1/models", json=body, headers=key, status=201) == first
    other = {**body, "description": "different"}
    assert (await registry.ask("POST", "/v1/models", json=other, headers=key, status=422)
            )["code"] == "idempotency-key-reused"
    assert (await registry.register())["version"] == 2


async def test_a_retry_after_a_crash_finds_what_the_first_try_made(registry: Registry) -> None:
    spec = ModelSpec(name="iris", artifact=await registry.upload(b"w"))
    first = await register(registry.ctx, "default", spec, "token-of-the-request")
    again = await register(registry.ctx, "default", spec, "token-of-the-request")
    assert again.id == first.id == "iris:1"


async def test_a_retry_after_a_deletion_registers_nothing_again(registry: Registry) -> None:
    spec = ModelSpec(name="iris", artifact=await registry.upload(b"w"))
    first = await register(registry.ctx, "default", spec, "token-of-the-request")
    await registry.ask("DELETE", f"/v1/models/{first.id}", status=200)
    again = await register(registry.ctx, "default", spec, "token-of-the-request")
    assert (again.id, again.deleted) == ("iris:1", True)
    assert (await registry.ask("GET", "/v1/models"))["items"] == []
    assert [e.topic for e in await registry.events()] == ["model.registered", "model.deleted"]


async def test_a_retry_finishes_what_the_first_try_left_undone(registry: Registry) -> None:
    """It died behind its commit: the version before it is still marked as the latest."""
    spec = ModelSpec(name="iris", artifact=await registry.upload(b"w"))
    await register(registry.ctx, "default", spec, None)
    old = await registry.ctx.store.get(Model, "iris:1")
    assert old is not None
    await registry.ctx.commit(old.evolve(id="iris:2", version=2, place=place("iris", 2), made_by="token", revision=0,
                                         sequence=0), Fact("model.registered"))
    assert len((await registry.ask("GET", "/v1/models?latest=true"))["items"]) == 2
    assert (await register(registry.ctx, "default", spec, "token")).id == "iris:2"
    assert [m["id"] for m in (await registry.ask("GET", "/v1/models?latest=true"))["items"]] == ["iris:2"]


async def test_a_patch_merges_tags_and_adds_properties(registry: Registry) -> None:
    await registry.register(tags={"team": "flora", "old": "x"}, properties={"accuracy": "0.97"})
    doc = await registry.ask("PATCH", "/v1/models/iris:1", status=200, json={
        "tags": {"old": None, "new": "y"}, "properties": {"f1": "0.9"}, "description": "better"})
    assert doc["tags"] == {"team": "flora", "new": "y"} and doc["generation"] == 2
    assert doc["properties"] == {"accuracy": "0.97", "f1": "0.9"} and doc["description"] == "better"
    assert registry.last.headers["ETag"] == '"2"'
    events = [e for e in await registry.events() if e.topic == "model.updated"]
    assert [e.data["previous"] for e in events] == [{
        "tags": {"team": "flora", "old": "x"}, "properties": {"accuracy": "0.97"}, "description": ""}]
    assert {k: v for k, v in events[0].data.items() if k != "previous"} == \
        {k: v for k, v in doc.items() if k != "sample"}
    assert events[0].sequence == f"{2:020d}"


async def test_a_patch_that_changes_nothing_is_no_event(registry: Registry) -> None:
    doc = await registry.register(tags={"team": "flora"})
    assert await registry.ask("PATCH", "/v1/models/iris:1", json={"tags": {"team": "flora"}}, status=200) == doc
    assert await registry.ask("PATCH", "/v1/models/iris:1", json=doc, status=200) == doc
    assert [e.topic for e in await registry.events()] == ["model.registered"]


@pytest.mark.parametrize(("body", "field"), [
    ({"properties": {"accuracy": "0.98"}}, "properties.accuracy"),
    ({"properties": {"accuracy": None}}, "properties.accuracy"),
    ({"properties": None}, "properties.accuracy"), ({"framework": "onnx"}, "framework"), ({"run": "r"}, "run"),
    ({"artifact": digest(b"x")}, "artifact"),
])
async def test_what_is_written_once_stays(registry: Registry, body: dict[str, Any], field: str) -> None:
    await registry.register(properties={"accuracy": "0.97"})
    problem = await registry.ask("PATCH", "/v1/models/iris:1", json=body, status=422)
    assert problem["code"] == "write-once" and [e["field"] for e in problem["errors"]] == [field]
    for wrong in ({"tags": {"a": 1}}, {"colour": "blue"}, ["tags"]):
        await registry.ask("PATCH", "/v1/models/iris:1", json=wrong, status=422)
    assert (await registry.ask("GET", "/v1/models/iris:1"))["generation"] == 1


async def test_if_match_guards_a_change(registry: Registry) -> None:
    await registry.register()
    await registry.ask("PATCH", "/v1/models/iris:1", json={"description": "a"}, headers={"If-Match": '"1"'}, status=200)
    for method, body in (("PATCH", {"description": "b"}), ("DELETE", None)):
        problem = await registry.ask(method, "/v1/models/iris:1", json=body, headers={"If-Match": '"1"'}, status=412)
        assert problem["code"] == "stale"
    await registry.ask("DELETE", "/v1/models/iris:1", headers={"If-Match": '"2"'}, status=200)


async def test_patches_at_once_all_arrive(registry: Registry) -> None:
    await registry.register()
    await asyncio.gather(*(registry.ask("PATCH", "/v1/models/iris", json={"tags": {f"t{n}": "x"}}, status=200)
                           for n in range(20)))
    doc = await registry.ask("GET", "/v1/models/iris:1")
    assert len(doc["tags"]) == 20 and doc["generation"] == 21


async def test_content_comes_back_whole_or_from_where_it_was_cut(registry: Registry) -> None:
    data = bytes(range(256)) * 20_000
    await registry.register(data=data, filename="größe 1.bin")
    assert await registry.ask("GET", "/v1/models/iris/content", status=200) == data
    head = registry.last.headers
    assert head["Content-Length"] == str(len(data)) and head["ETag"] == f'"{digest(data)}"'
    assert head["Content-Disposition"] == "attachment; filename*=UTF-8''gr%C3%B6%C3%9Fe%201.bin"
    assert head["Content-Location"] == "/v1/models/iris:1/content" and head["Repr-Digest"].startswith("sha-256=:")
    rest = await registry.ask("GET", "/v1/models/iris:1/content", headers={"Range": "bytes=5000000-"}, status=206)
    assert rest == data[5_000_000:]
    assert registry.last.headers["Content-Range"] == f"bytes 5000000-{len(data) - 1}/{len(data)}"
    changed = {"Range": "bytes=5000000-", "If-Range": '"sha256:other"'}
    assert await registry.ask("GET", "/v1/models/iris:1/content", headers=changed, status=200) == data
    await registry.ask("GET", "/v1/models/iris:1/content", headers={"Range": f"bytes={len(data)}-"}, status=422)
    assert await registry.ask("HEAD", "/v1/models/iris:1/content", status=200) == b""
    assert registry.last.headers["Content-Length"] == str(len(data))


async def test_content_whose_blob_was_lost_is_a_clear_answer(registry: Registry) -> None:
    await registry.register(data=b"will be lost")
    await registry.ctx.blobs.delete(str(registry.blobs()[0]))
    assert (await registry.ask("GET", "/v1/models/iris:1/content", status=404))["detail"]


async def test_the_schema_says_what_the_answer_has(registry: Registry) -> None:
    from modelyard.core.documents import INTERNAL
    from modelyard.registry.model import Model

    doc = await registry.register()
    assert Model.model_json_schema()["properties"].keys() - INTERNAL - Model.hidden == doc.keys()
