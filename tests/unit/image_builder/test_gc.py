"""What nothing needs is found, and only then taken; what anything needs stays, also while builds run."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.images_layout_gc import LayoutSweep
from modelyard.image_builder.gc import Garbage, Stray
from tests.handmade import chunks

from .conftest import SCORE, Yard

DAY = 24 * 3600.0
BIG = 1_100_000
"""Bytes of a model that the memo remembers."""


def garbage(yard: Yard) -> Garbage:
    ctx = yard.images
    assert isinstance(ctx.images, LayoutImages)
    return Garbage(ctx.store, ctx.images, LayoutSweep(ctx.images), ctx.data)


def blobs(yard: Yard) -> Path:
    return yard.images.data / "images" / "blobs" / "sha256"


def aged(path: Path, seconds: float = 2 * DAY) -> Path:
    """As if it had been written so long ago, with all that is in it."""
    for one in (*path.rglob("*"), path):
        os.utime(one, (time.time() - seconds,) * 2)
    return path


def left_behind(yard: Yard, data: bytes = b"of a build that died") -> Path:
    path = blobs(yard) / hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    return aged(path)


def kinds(found: list[Stray]) -> dict[str, set[str]]:
    return {kind: {s.name for s in found if s.kind == kind} for kind in {s.kind for s in found}}


async def whole(yard: Yard, name: str, tag: str, listed: list[dict[str, Any]] | None = None) -> None:
    """Manifest, config, layers and what is attached: every byte, checked by digest."""
    images = yard.images.images
    body, _ = await images.get_manifest(name, tag) or (b"", "")
    entries = await yard.attached(f"{name}:{tag}") if listed is None else listed
    attached = [await images.get_manifest(name, entry["digest"]) for entry in entries]
    for raw in (body, *(found[0] for found in attached if found)):
        for part in (json.loads(raw)["config"], *json.loads(raw)["layers"]):
            assert sum([len(chunk) async for chunk in images.get_blob(name, part["digest"])]) == part["size"]
    assert len(attached) >= 2 and all(attached)


async def test_nothing_of_a_living_image_is_garbage(yard: Yard) -> None:
    await yard.register("iris", os.urandom(BIG))
    await yard.attached((await yard.small(models=["iris"]))["id"])
    await asyncio.to_thread(aged, yard.images.data / "images")
    await asyncio.to_thread(aged, yard.images.data / "image-builder")
    assert await garbage(yard).collect(older_s=0, dry=False) == []
    await whole(yard, "tiny", "1")


async def test_what_is_found_is_only_taken_when_asked(yard: Yard) -> None:
    await yard.attached((await yard.small())["id"])
    stray = await asyncio.to_thread(left_behind, yard)
    upload = yard.images.data / "images" / ".tmp" / "broken-off"
    await asyncio.to_thread(upload.write_bytes, b"half")
    memo = yard.images.data / "image-builder" / "memo"
    await asyncio.to_thread(memo.mkdir, parents=True, exist_ok=True)
    lock, gone, bad = memo / "lock.json", memo / "gone.json", memo / "bad.json"
    layer = {"title": "x", "digest": "sha256:" + "1" * 64, "diff_id": "", "size": 1, "media_type": ""}
    for path, text in ((lock, json.dumps({"at": 1.0, "lock": ""})), (gone, json.dumps([layer])), (bad, "{")):
        await asyncio.to_thread(path.write_text, text)
        await asyncio.to_thread(aged, path)
    dead = yard.images.data / "image-builder" / "tmp" / "default.dead.1.x"
    await asyncio.to_thread(dead.mkdir, parents=True)
    await asyncio.to_thread((dead / "model-0").write_bytes, b"12345")
    for path in (upload, dead):
        await asyncio.to_thread(aged, path)
    wanted = {"blob": {stray.name}, "upload": {"broken-off"}, "memo": {"lock.json", "gone.json", "bad.json"},
              "folder": {dead.name}}
    for dry in (True, True, False):
        found = await garbage(yard).collect(dry=dry)
        assert kinds(found) == wanted
        assert next(s.size for s in found if s.kind == "folder") == 5
        assert all([await asyncio.to_thread(p.exists) == dry for p in (stray, upload, lock, gone, bad, dead)])
    assert await garbage(yard).collect(dry=False) == []
    await whole(yard, "tiny", "1")


async def test_what_is_young_stays(yard: Yard) -> None:
    await yard.attached((await yard.small())["id"])
    stray = await asyncio.to_thread(left_behind, yard)
    assert await garbage(yard).collect(older_s=3 * DAY, dry=False) == []
    assert await asyncio.to_thread(stray.exists)


async def test_a_tag_goes_only_when_its_image_is_known_to_be_deleted(yard: Yard) -> None:
    """The removal of an image's tags was cut short; a stranger's tags lie beside."""
    images = yard.images.images
    doc = await yard.small()
    listed = await yard.attached("tiny:1")
    body, kind = await images.get_manifest("tiny", "1") or (b"", "")
    tag = doc["digest"].replace(":", "-")
    names = (tag, f"{tag}.1.sbom", f"{tag}.1.provenance")
    kept = {name: await images.get_manifest("tiny", name) for name in names}
    parts = {d["digest"] for raw, _ in (value for value in (*kept.values(), (body, kind)) if value)
             for d in (json.loads(raw).get("config"), *json.loads(raw).get("layers", ())) if d}
    stored = {digest: b"".join([c async for c in images.get_blob("tiny", digest)]) for digest in parts}
    await yard.call("DELETE", "/v1/images/tiny:1")
    await yard.gone("tiny:1")
    for repo in ("tiny", "stranger"):
        for digest, data in stored.items():
            await images.put_blob(repo, digest, chunks(data))
        await images.put_manifest(repo, "1", body, kind)
        for name in (names[1], names[2], names[0]):  # the index last: it names the others
            await images.put_manifest(repo, name, *kept[name])  # type: ignore[misc]
    await asyncio.to_thread(aged, blobs(yard))
    found = kinds(await garbage(yard).collect(dry=False))
    assert found["tag"] == {"tiny:1", *(f"tiny:{name}" for name in names)} and "blob" not in found
    assert await images.get_manifest("tiny", "1") is None
    await whole(yard, "stranger", "1", listed)


@pytest.mark.slow
async def test_builds_that_run_meanwhile_lose_nothing(yard: Yard) -> None:
    """Everything counts as old, layers come and go, and the broom goes round and round."""
    score, lock = await yard.upload(SCORE), await yard.upload(b"")
    over, rounds, taken = asyncio.Event(), 0, 0

    async def sweeping() -> None:
        nonlocal rounds, taken
        while not over.is_set():
            stray = await asyncio.to_thread(left_behind, yard, os.urandom(16)) if blobs(yard).is_dir() else None
            found = await garbage(yard).collect(older_s=0, dry=False)
            assert stray is None or stray.name in kinds(found)["blob"]
            rounds, taken = rounds + 1, taken + len(found)

    async def building(n: int) -> None:
        for turn in range(4):
            model = await yard.register(f"model-{n}", os.urandom(BIG) if turn % 2 else b"the same weights")
            doc: dict[str, Any] = await yard.over((await yard.post(
                name=f"image-{n}", models=[model], score=score, lock=lock))["id"])
            assert doc["phase"] == "ready", doc
            await whole(yard, f"image-{n}", str(turn + 1))
            if turn:
                await yard.call("DELETE", f"/v1/images/image-{n}:{turn}")

    broom = asyncio.create_task(sweeping())
    await asyncio.gather(*(building(n) for n in range(4)))
    over.set()
    await broom
    for n in range(4):
        await whole(yard, f"image-{n}", "4")
    assert rounds > 5 and taken >= rounds - 1
