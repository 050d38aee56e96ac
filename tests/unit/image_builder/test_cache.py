"""The user's cache of environments: with it, without it or with a damaged one, an image is the same to the byte."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from modelyard.image_builder.environment import BLOBS, Environments
from modelyard.image_builder.locks import Lock, read_lock
from modelyard.image_builder.log import BuildLog
from modelyard.image_builder.memo import KIND, Memo
from modelyard.image_builder.model import Image
from modelyard.image_builder.sdists import Sdists
from modelyard.kernel.cache import Cache
from tests.wheelhouse import locked, wheel

from .conftest import running


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lock:
    """Of one wheel, which uv finds in a folder: no index is asked."""
    made = wheel(tmp_path / "wheels", "tiny", files={"tiny.py": b"VALUE = 1\n" * 1000})
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(made.parent))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    found, problems = read_lock(locked(made))
    assert problems == []
    return found


class Built:
    """What ``environment`` gave, and what it said."""

    def __init__(self, layers: list[Any], packages: list[Any], said: str) -> None:
        self.layers, self.packages, self.said = layers, packages, said

    @property
    def cached(self) -> bool:
        return "the user's cache" in self.said and "uv:" not in self.said


async def environment(data: Path, lock: Lock, cache: Cache) -> Built:
    """The environment of a lock, in a data folder of its own; every layer is in its store, whole."""
    async with running(data) as yard:
        doc = await yard.images.store.get(Image, (await yard.small())["id"])
        assert doc is not None
        log, memo = BuildLog(data / "log"), Memo(data / "memo", cache)

        async def folder() -> Path:
            scratch = data / "scratch"
            await asyncio.to_thread(scratch.mkdir)
            return scratch

        sdists = Sdists(doc.python_version, doc.platform, log, cache, folder, ())
        layers, packages, _ = await Environments(yard.images, doc, log, memo, cache, sdists).of(lock, folder)
        for layer in layers:
            raw = b"".join([chunk async for chunk in yard.images.images.get_blob(doc.repo, layer.digest)])
            assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == layer.digest
        return Built(layers, packages, (data / "log").read_text())


async def test_a_fresh_data_folder_builds_the_same_from_the_cache(tmp_path: Path, lock: Lock) -> None:
    cache = Cache(tmp_path / "cache")
    first = await environment(tmp_path / "a", lock, cache)
    (tmp_path / "wheels").rename(tmp_path / "away")
    second = await environment(tmp_path / "b", lock, cache)
    (tmp_path / "away").rename(tmp_path / "wheels")
    uncached = await environment(tmp_path / "c", lock, Cache(tmp_path / "another"))
    assert (first.cached, second.cached, uncached.cached) == (False, True, False)
    assert first.layers == second.layers == uncached.layers and first.layers
    assert first.packages == second.packages == uncached.packages == [
        {"name": "tiny", "version": "1.0", "sha256": lock.pins[0].hashes[0]}]


@pytest.mark.parametrize("what", ["blob", "blob gone", "memo", "memo gone"])
async def test_what_is_damaged_is_dropped_and_made_anew(tmp_path: Path, lock: Lock, what: str) -> None:
    cache = Cache(tmp_path / "cache")
    first = await environment(tmp_path / "a", lock, cache)
    (entry,) = (tmp_path / "cache" / (BLOBS if "blob" in what else KIND)).iterdir()
    whole = entry.read_bytes()
    entry.unlink()
    if "gone" not in what:
        entry.write_bytes(whole[:-5] + b"other")
    second = await environment(tmp_path / "b", lock, cache)
    assert not second.cached and second.layers == first.layers
    assert await asyncio.to_thread(entry.read_bytes) == whole, "mended"
    assert (await environment(tmp_path / "c", lock, cache)).cached


async def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, lock: Lock) -> None:
    (tmp_path / "file").write_text("in the way")
    for number, folder in enumerate((tmp_path / "file", Path("/proc/modelyard"))):
        built = await environment(tmp_path / f"data{number}", lock, Cache(folder))
        assert not built.cached and len(built.layers) == 1


async def test_two_data_folders_fill_it_at_once(tmp_path: Path, lock: Lock) -> None:
    cache = Cache(tmp_path / "cache")
    one, two = await asyncio.gather(*(environment(tmp_path / who, lock, cache) for who in "ab"))
    assert one.layers == two.layers
    assert (await environment(tmp_path / "c", lock, cache)).cached
    assert [p for p in (tmp_path / "cache").rglob(".*") if p.name != ".pruned"] == []


async def test_a_checksum_stands_before_a_shared_memo(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    await Memo(tmp_path / "a", cache).put("name", {"at": 1}, shared=True)
    await Memo(tmp_path / "a", cache).put("own", {"at": 2})
    other = Memo(tmp_path / "b", cache)
    assert await other.shared("name") == {"at": 1} and await other.get("name") is None
    assert await other.shared("own") is None, "not everything is for others"
    await Memo(tmp_path / "a", cache).put("name", {"at": 3}, shared=True)
    assert await other.shared("name") == {"at": 3}, "the newest counts"
