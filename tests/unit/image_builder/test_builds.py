"""Builds without wheels: outcomes, logs, holds, deletion, and what is in the image."""

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterable
from pathlib import Path

import pytest

from modelyard.image_builder.model import Image
from modelyard.image_builder.store import Chunks
from modelyard.registry.model import Model

from .conftest import SCORE, Yard, running


async def test_an_image_without_wheels(yard: Yard) -> None:
    model = await yard.register("iris", b"weights", filename="model.bin", framework_version="3", properties={"a": "b"})
    doc = await yard.small("iris-scorer", models=["iris"], env={"COLOUR": "red"})
    assert doc["phase"] == "ready" and doc["models"] == [model] and doc["size"] > 0
    found = await yard.images.images.get_manifest("iris-scorer", "1")
    assert found is not None
    manifest = json.loads(found[0])
    config = json.loads(await blob(yard, manifest["config"]["digest"]))
    assert config["config"]["User"] == "10001" and config["created"].startswith("1970-01-01")
    assert config["config"]["Env"] == ["COLOUR=red", "ORT_DISABLE_TELEMETRY=1"]
    assert config["config"]["Entrypoint"] == ["python3", "-I", "-S", "/opt/modelyard/launch.py"]
    files = await contents(yard, manifest)
    assert files["opt/modelyard/score/score.py"] == SCORE
    assert files["opt/modelyard/models/iris/1/model.bin"] == b"weights"
    assert {"opt/modelyard/launch.py", "opt/modelyard/lib/modelyard/scoring/__main__.py",
            "opt/modelyard/lib/modelyard/core/errors.py"} <= files.keys()
    assert not any("/registry/" in name or "/image_builder/" in name or name.endswith(".pyc") for name in files)
    about = json.loads(files["opt/modelyard/image.json"])
    assert about["score"] == "score/score.py" and about["models"] == [{
        "name": "iris", "version": 1, "framework": "custom", "framework_version": "3",
        "path": "models/iris/1/model.bin", "trusted": False, "properties": {"a": "b"}}]


async def blob(yard: Yard, digest: str) -> bytes:
    return b"".join([chunk async for chunk in yard.images.images.get_blob("any", digest)])


async def contents(yard: Yard, manifest: dict) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for layer in manifest["layers"]:
        with tarfile.open(fileobj=io.BytesIO(await blob(yard, layer["digest"]))) as archive:
            for one in archive:
                assert (one.mtime, one.uid, one.gid) == (0, 0, 0) and one.mode in (0o644, 0o755)
                if one.isfile():
                    files[one.name] = archive.extractfile(one).read()
    return files


async def test_the_same_inputs_give_the_same_digest_anywhere(tmp_path: Path) -> None:
    digests = set()
    for place in ("here", "there"):
        async with running(tmp_path / place) as yard:
            if place == "there":
                await yard.small("other")
            await yard.register("iris", b"weights", properties={"b": "1", "a": "2"})
            digests.add((await yard.small(f"name-{place}", models=["iris:1"], env={"X": "1"}))["digest"])
            digests.add((await yard.small("again", models=["iris"], env={"X": "1"}, tags={"t": "1"}))["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize(("source", "told"), [
    (b"def run(data)\n    return data\n", "score.py line 1 does not parse"),
    (b"x = 1\n\ndef init():\n    pass\n", "no function run"),
    (b"import os\n\n\ndef run(a, b):\n    pass\n", "score.py line 4: run takes 2 arguments"),
    (b"def run(data):\n    pass\n\ndef init(x):\n    pass\n", "score.py line 4: init takes 1"),
    (b"\x00", "does not parse"),
    (b"\xff\xfe", "does not parse"),
    (b"(" * 50_000, "does not parse"),
])
async def test_a_scoring_file_that_cannot_serve_ends_the_build(yard: Yard, source: bytes, told: str) -> None:
    doc = await yard.small(score=await yard.upload(source))
    assert doc["phase"] == "failed" and told in doc["reason"]
    log = (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()
    assert f"failed: {doc['reason']}" in log and "Traceback" not in log

    async def told_the_world() -> bool:
        return any(e.topic == "image.failed" and told in e.data["reason"] for e in await yard.events())

    await yard.until(told_the_world)


async def test_all_problems_of_the_inputs_are_told_together(yard: Yard) -> None:
    lock = await yard.upload(b"numpy\nscipy==1.0\n-r other.txt\n")
    doc = await yard.small(score=await yard.upload(b"x = 1\n"), lock=lock)
    assert doc["phase"] == "failed"
    for part in ("lock line 1", "lock line 2", "lock line 3", "no function run"):
        assert part in doc["reason"]


async def test_a_lock_without_what_the_server_needs(yard: Yard) -> None:
    doc = await yard.small(lock=await yard.upload(b"six==1.17.0 --hash=sha256:" + b"0" * 64))
    assert doc["phase"] == "failed" and "grpcio" in doc["reason"]


async def test_a_scoring_folder(yard: Yard, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    (folder / "lib").mkdir(parents=True)
    (folder / "score.py").write_bytes(SCORE)
    (folder / "lib" / "part.py").write_text("X = 1\n")
    doc = await yard.small(score=await yard.upload_folder(folder))
    manifest = json.loads((await yard.images.images.get_manifest("tiny", "1"))[0])
    files = await contents(yard, manifest)
    assert doc["phase"] == "ready" and files["opt/modelyard/score/lib/part.py"] == b"X = 1\n"
    (folder / "score.py").rename(folder / "other.py")
    doc = await yard.small(score=await yard.upload_folder(folder))
    assert doc["phase"] == "failed" and "score.py" in doc["reason"]


async def test_a_hostile_scoring_folder(yard: Yard) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("score.py", "../../outside"):
            info = tarfile.TarInfo(name)
            info.size = len(SCORE)
            archive.addfile(info, io.BytesIO(SCORE))
    doc = await yard.small(score=await yard.upload(out.getvalue()))
    assert doc["phase"] == "failed" and "leads out of the folder" in doc["reason"]


async def test_a_model_folder(yard: Yard, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "weights.bin").write_bytes(b"w" * 3_000_000)
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    digest = await yard.upload_folder(folder)
    answer = await yard.call("POST", "/v1/models", {"name": "tree", "artifact": digest, "unpack": True})
    assert answer.status == 201, answer
    for _ in range(2):  # made, then taken from the memo
        assert (await yard.small(models=["tree"]))["phase"] == "ready"
    first, second = [json.loads((await yard.images.images.get_manifest("tiny", str(n)))[0]) for n in (1, 2)]
    files = await contents(yard, first)
    assert first == second and len(files["opt/modelyard/models/tree/1/part/weights.bin"]) == 3_000_000
    assert "opt/modelyard/models/tree/1/run.sh" in files


async def test_of_a_large_model_no_copy_is_written(yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as it came nor as a layer; a folder is looked into, so it is brought, but its layer is not kept."""
    from modelyard.core.archives import pack

    weights = bytes(range(256)) * 12_000 + b"!"
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "weights.bin").write_bytes(weights)
    packed = b"".join(await asyncio.to_thread(lambda: list(pack(tmp_path / "tree"))))
    await yard.register("large", weights, filename="w.bin")
    await yard.register("tree", packed, unpack=True)
    put, seen = yard.images.images.put_blob, set()

    def look() -> None:
        scratch = tmp_path / "data" / "image-builder" / "tmp"
        seen.update(p.name for p in scratch.rglob("*") if p.is_file() and p.stat().st_size > 1 << 20)

    async def looking(repo: str, digest: str, chunks: AsyncIterable[bytes]) -> bool:
        await asyncio.to_thread(look)
        return await put(repo, digest, chunks)

    monkeypatch.setattr(yard.images.images, "put_blob", looking)
    assert (await yard.small("both", models=["large", "tree"]))["phase"] == "ready"
    assert seen == {"model-1"}
    found = await yard.images.images.get_manifest("both", "1")
    assert found is not None
    files = await contents(yard, json.loads(found[0]))
    assert files["opt/modelyard/models/large/1/w.bin"] == weights
    assert files["opt/modelyard/models/tree/1/weights.bin"] == weights


async def test_a_large_model_that_is_not_what_was_registered_fails_the_build(yard: Yard, tmp_path: Path) -> None:
    for word in ("is damaged", "is gone"):
        weights = word.encode() * 300_000
        model = await yard.register("large", weights)
        (kept,) = await asyncio.to_thread(of_size, tmp_path / "data" / "blobs", len(weights))
        if word == "is gone":
            await asyncio.to_thread(kept.unlink)
        else:
            await asyncio.to_thread(kept.write_bytes, b"?" + weights[1:])
        over = await yard.small("large", models=[model])
        assert over["phase"] == "failed" and word in over["reason"] and model in over["reason"]


def of_size(folder: Path, size: int) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size == size]


async def test_models_are_held_from_the_answer_on_and_let_go_at_the_end(yard: Yard) -> None:
    await yard.register("iris")
    doc = await yard.post(name="user", models=["iris"], score=await yard.upload(SCORE), lock=await yard.upload(b""))
    held = await yard.registry.store.get(Model, "iris:1")
    assert held is not None and list(held.holds) == ["image/user:1"]
    assert (await yard.over(doc["id"]))["phase"] == "ready"
    refused = await yard.call("DELETE", "/v1/models/iris:1")
    assert refused.status == 412
    assert refused.json["blockers"] == [{"kind": "image", "id": "user:1", "phase": "ready"}]
    assert (await yard.call("DELETE", "/v1/images/user:1")).status == 202
    await yard.gone("user:1")
    assert (await yard.registry.store.get(Model, "iris:1")).holds == {}
    assert (await yard.call("DELETE", "/v1/images/user:1")).status == 204
    assert (await yard.call("DELETE", "/v1/models/iris:1")).status in (200, 202)


async def test_deleting_leaves_nothing_but_the_number(yard: Yard, tmp_path: Path) -> None:
    await yard.small()
    await yard.call("DELETE", "/v1/images/tiny:1")
    await yard.gone("tiny:1")
    assert await yard.images.images.get_manifest("tiny", "1") is None
    assert list((tmp_path / "data" / "images" / "blobs" / "sha256").iterdir()) == []
    assert [b async for b in yard.images.blobs.list("images/")] == []
    left = [p for p in (tmp_path / "data" / "image-builder").rglob("*") if p.is_file()]
    assert left == []
    assert (await yard.small())["id"] == "tiny:2"

    async def told() -> bool:
        mine = [e for e in await yard.events() if e.subject == "tiny:1"]
        return [(e.topic, int(e.sequence)) for e in mine] == [
            ("image.requested", 1), ("image.built", 2), ("image.deleted", 3)]

    await yard.until(told)


async def test_a_deployments_hold_guards_an_image(yard: Yard) -> None:
    await yard.small()
    hold = "/internal/v1/images/tiny:1/holds/deployment/iris"
    for _ in range(2):
        assert (await yard.call("PUT", hold, internal=True)).status == 200
    assert (await yard.call("PUT", hold)).status == 403
    assert (await yard.call("PUT", hold.replace("tiny:1", "tiny:9"), internal=True)).status == 404
    assert (await yard.call("PUT", hold.replace("deployment", "alias"), internal=True)).status == 422
    here = yard.images.peers.urls["deployer"]
    yard.images.peers.urls["deployer"] = "http://127.0.0.1:1"
    refused = await yard.call("DELETE", "/v1/images/tiny:1")
    assert refused.status == 412
    assert refused.json["blockers"] == [{"kind": "deployment", "id": "iris", "phase": "unknown"}]
    yard.images.peers.urls["deployer"] = here
    yard.deployments["iris"] = "failed"  # its spec still names the image
    assert (await yard.call("DELETE", "/v1/images/tiny:1")).json["blockers"][0]["phase"] == "failed"
    del yard.deployments["iris"]  # gone: its hold means nothing
    assert (await yard.call("DELETE", "/v1/images/tiny:1")).status == 202
    await yard.gone("tiny:1")
    assert (await yard.call("DELETE", hold, internal=True)).status == 200


async def test_auto_delete_goes_with_the_last_deployment(yard: Yard) -> None:
    await yard.small(auto_delete=True)
    for name in ("one", "two"):
        hold = f"/internal/v1/images/tiny:1/holds/deployment/{name}"
        assert (await yard.call("PUT", hold, internal=True)).status == 200
    await yard.call("DELETE", "/internal/v1/images/tiny:1/holds/deployment/one", internal=True)
    assert (await yard.images.store.get(Image, "tiny:1")).deleting is False
    await yard.call("DELETE", "/internal/v1/images/tiny:1/holds/deployment/two", internal=True)
    await yard.gone("tiny:1")


async def test_the_log_is_streamed_until_the_end(yard: Yard) -> None:
    doc = await yard.post(name="told", score=await yard.upload(SCORE), lock=await yard.upload(b""))
    log = (await yard.call("GET", f"/v1/images/{doc['id']}/log?follow=true")).raw.decode()
    done = await yard.over(doc["id"])
    assert "Z building told:1 for linux/" in log.splitlines()[0]
    assert f"built {done['digest']}" in log.splitlines()[-1]
    assert (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode() == log


async def test_the_context_is_one_tar_that_says_how(yard: Yard) -> None:
    await yard.register("iris", b"weights", filename="model.bin")
    await yard.small(models=["iris"], env={"A": "b c"})
    answer = await yard.call("GET", "/v1/images/tiny:1/context")
    assert answer.status == 200
    with tarfile.open(fileobj=io.BytesIO(answer.raw)) as archive:
        names = archive.getnames()
        recipe = archive.extractfile("Dockerfile").read().decode()
        assert archive.extractfile("opt/modelyard/models/iris/1/model.bin").read() == b"weights"
    assert {"requirements.lock", "opt/modelyard/score/score.py", "opt/modelyard/image.json"} <= set(names)
    assert 'ENV A="b c"' in recipe and "USER 10001" in recipe
    comment, base = recipe.splitlines()[1:3]
    assert base.startswith("FROM python:3.") and "A GUESS: the image has no base" in comment
    bad = await yard.small(score=await yard.upload(b"x"))
    assert (await yard.call("GET", f"/v1/images/{bad['id']}/context")).status == 409


async def test_a_builder_that_died_is_followed_by_another(tmp_path: Path) -> None:
    """The document of a build that a dead process left, its lease lapsed: the next process finishes it, alike."""
    async with running(tmp_path / "data") as yard:
        done = await yard.small()

        async def at_rest() -> bool:  # what is said of it is attached as well
            doc = await yard.images.store.get(Image, "tiny:1")
            return doc is not None and doc.due is None

        await yard.until(at_rest)
    async with running(tmp_path / "data") as yard:
        doc = await yard.images.store.get(Image, "tiny:1")
        left = doc.evolve(phase="building", digest=None, size=None, due=yard.images.now(),
                          lease="dead 2026-01-01T00:00:00.000000Z")
        await yard.images.store.commit(left)
        again = await yard.over("tiny:1")
        assert again["phase"] == "ready" and again["digest"] == done["digest"]


async def test_a_model_that_went_before_it_could_be_held(yard: Yard) -> None:
    await yard.register("iris")
    doc = await yard.small(models=["iris"])
    image = await yard.images.store.get(Image, doc["id"])
    await yard.images.commit(image.evolve(revision=0, sequence=0, lease=None, id="late:1", name="late", phase="queued",
                                          models=["gone:1"], due=yard.images.now()))
    late = await yard.over("late:1")
    assert late["phase"] == "failed" and "gone:1" in late["reason"]


async def test_a_build_waits_for_a_registry_that_is_away(yard: Yard) -> None:
    await yard.register("iris")
    spec = {"name": "patient", "models": ["iris"], "score": await yard.upload(SCORE), "lock": await yard.upload(b"")}
    here = yard.images.peers.urls["registry"]
    image = await yard.small(models=["iris"])
    yard.images.peers.urls["registry"] = "http://127.0.0.1:1"
    assert (await yard.call("POST", "/v1/images", spec)).status == 503
    old = await yard.images.store.get(Image, image["id"])
    await yard.images.commit(old.evolve(revision=0, sequence=0, lease=None, id="patient:1", name="patient", version=1,
                                        phase="queued", digest=None, due=yard.images.now()))
    await asyncio.sleep(0.5)
    assert (await yard.call("GET", "/v1/images/patient:1")).json["phase"] == "queued"
    yard.images.peers.urls["registry"] = here
    assert (await yard.over("patient:1"))["phase"] == "ready"


async def test_four_layers_go_up_at_once(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [await yard.register(f"model-{n}", b"weights %d" % n) for n in range(6)]
    put, under_way, most, four = yard.images.images.put_blob, 0, 0, asyncio.Event()

    async def counted(repo: str, digest: str, chunks: AsyncIterable[bytes]) -> bool:
        nonlocal under_way, most
        under_way, most = under_way + 1, max(most, under_way + 1)
        if under_way == 4:
            four.set()
        if repo == "many" and not four.is_set():
            await asyncio.wait_for(four.wait(), 10)
        try:
            return await put(repo, digest, chunks)
        finally:
            under_way -= 1

    monkeypatch.setattr(yard.images.images, "put_blob", counted)
    assert (await yard.small("many", models=models))["phase"] == "ready"
    assert most == 4


async def test_a_build_that_takes_too_long_fails(
        yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv waits for an index that accepts and never answers."""
    silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3600), "127.0.0.1", 0)
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}/simple")
    spec = {"name": "slow", "score": await yard.upload(SCORE), "requirements": ["six"]}
    doc = await yard.over((await yard.post(**spec, timeout_s=1))["id"])
    silent.close()
    assert doc["phase"] == "failed" and doc["timeout_s"] == 1
    assert doc["reason"].startswith("the build took longer than 1 s") and "timeout_s" in doc["reason"]
    log = (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()
    assert f"failed: {doc['reason']}" in log
    assert [*(tmp_path / "data").glob("image-builder/tmp/*")] == []
    assert (await yard.small())["phase"] == "ready"
    for wrong in (0, 86_401, "soon"):
        assert (await yard.call("POST", "/v1/images", {**spec, "timeout_s": wrong})).status == 422


async def test_a_failed_build_leaves_no_tag(yard: Yard) -> None:
    """The tag was put by a try that died before it could say so, and the next one fails."""
    made = await yard.small("made")
    body, kind = await yard.images.images.get_manifest("made", "1") or (b"", "")
    for part in (json.loads(body)["config"], *json.loads(body)["layers"]):
        data = b"".join([chunk async for chunk in yard.images.images.get_blob("made", part["digest"])])
        await yard.images.images.put_blob("half", part["digest"], Chunks(data))
    await yard.images.images.put_manifest("half", "1", body, kind)
    failed = await yard.small("half", score=await yard.upload(b"not Python"))
    assert (made["phase"], failed["phase"], failed["id"]) == ("ready", "failed", "half:1")
    assert await yard.images.images.get_manifest("half", "1") is None
    assert await yard.images.images.get_manifest("made", "1") is not None
