"""The layout folder itself: what other tools read, damage, full disks, and what dead builds left."""

import asyncio
import errno
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelyard.adapters.images_layout import STALE_S, LayoutImages
from modelyard.core.errors import Invalid, NotFound, Unavailable

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def image(store: LayoutImages, repo: str, tag: str, layer: bytes) -> str:
    await store.put_blob(repo, digest(layer), once(layer))
    part = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(layer), "size": len(layer)}
    return await store.put_manifest(repo, tag, json.dumps({"layers": [part]}).encode(), MANIFEST)


async def test_it_is_a_layout_as_the_standard_says(tmp_path: Path) -> None:
    known = await image(LayoutImages(tmp_path), "team/iris", "7", b"layer")
    assert json.loads((tmp_path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["schemaVersion"] == 2
    assert index["manifests"] == [{
        "mediaType": MANIFEST, "digest": known, "size": (tmp_path / "blobs" / known.replace(":", "/")).stat().st_size,
        "annotations": {"org.opencontainers.image.ref.name": "team/iris:7"}}]
    assert (tmp_path / "blobs" / digest(b"layer").replace(":", "/")).read_bytes() == b"layer"
    assert list((tmp_path / ".pins").iterdir()) == [] == list((tmp_path / ".tmp").iterdir())


async def test_damage_on_disk_is_found(tmp_path: Path) -> None:
    store = LayoutImages(tmp_path)
    await image(store, "iris", "1", b"layer")
    (tmp_path / "blobs" / digest(b"layer").replace(":", "/")).write_bytes(b"later")
    with pytest.raises(Invalid, match="damaged"):
        [chunk async for chunk in store.get_blob("iris", digest(b"layer"))]
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(Unavailable, match=r"index\.json"):
        await store.get_manifest("iris", "1")


async def test_what_dead_builds_left_is_swept_after_a_day(tmp_path: Path) -> None:
    store = LayoutImages(tmp_path)
    await image(store, "iris", "1", b"used")
    await store.put_blob("dead", digest(b"unused"), once(b"unused"))
    await store.put_blob("dead", digest(b"used"), once(b"used"))
    (tmp_path / ".tmp" / "left").write_bytes(b"half")
    await store.remove("nobody", "1")
    assert (tmp_path / "blobs" / digest(b"unused").replace(":", "/")).exists()
    old = time.time() - STALE_S - 60
    for path in (*(tmp_path / ".pins").iterdir(), *(tmp_path / ".tmp").iterdir()):
        os.utime(path, (old, old))
    await store.remove("nobody", "1")
    with pytest.raises(NotFound):
        [chunk async for chunk in store.get_blob("dead", digest(b"unused"))]
    assert [chunk async for chunk in store.get_blob("iris", digest(b"used"))] == [b"used"]
    assert list((tmp_path / ".tmp").iterdir()) == []


async def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, write = LayoutImages(tmp_path), os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr("modelyard.adapters.images_layout.os.write", full)
    with pytest.raises(Unavailable, match="full"):
        await store.put_blob("iris", digest(b"x" * 2000), once(b"x" * 2000))
    assert [path for part in (".tmp", ".uploads", "blobs/sha256") for path in (tmp_path / part).iterdir()] == []


async def test_a_folder_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match="image folder"):
        await LayoutImages(tmp_path / "file" / "images").check()


async def test_an_upload_of_a_dead_process_goes_and_one_of_a_living_stays(tmp_path: Path) -> None:
    """Whoever writes one holds its lock, which the kernel takes from the dead."""
    there, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield bytes(2 << 20)
        there.set()
        await go_on.wait()

    store = LayoutImages(tmp_path)
    living = asyncio.create_task(store.put_blob("iris", digest(bytes(2 << 20)), slow()))
    await asyncio.wait_for(there.wait(), 10)
    (tmp_path / ".uploads" / "of the dead").write_bytes(bytes(1 << 20))
    await LayoutImages(tmp_path).check()
    (left,) = (tmp_path / ".uploads").iterdir()
    assert left.name != "of the dead"
    go_on.set()
    assert await living is True and list((tmp_path / ".uploads").iterdir()) == []
    assert [chunk async for chunk in store.get_blob("iris", digest(bytes(2 << 20)))]
