"""The build log of two builders that share a blob store and no folder: one follows what the other writes, and goes on
with it when that one dies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.store_sqlite import SqliteStore
from modelyard.image_builder import log as logs
from modelyard.image_builder.log import BuildLog, log_file, read_log
from modelyard.image_builder.model import Image
from modelyard.kernel.forward import Peers
from modelyard.kernel.service import Context

DOC = Image(id="scorer:1", name="scorer", version=1, platform="linux/amd64", phase="building")


@pytest.fixture
async def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Context, Context]:
    monkeypatch.setattr(logs, "SHOW_S", 0.02)
    store = await SqliteStore.open(tmp_path / "yard.db", "image-builder")
    one, other = (Context(
        service="image-builder", store=store, blobs=DirBlobs(tmp_path / "blobs"), images=LayoutImages(tmp_path / "i"),
        grants=DirGrants(tmp_path / "blobs"), targets={}, peers=Peers({}, ""), data=tmp_path / name)
        for name in ("one", "other"))
    return one, other


class Follower:
    """Reads along until ``doc`` says that the build is over."""

    def __init__(self, ctx: Context) -> None:
        self.doc: Image | None = DOC
        self.text = ""
        self._ctx = ctx
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async def fresh() -> Image | None:
            return self.doc

        async for part in read_log(self._ctx, DOC, follow=True, fresh=fresh):
            self.text += part.decode()

    async def sees(self, word: str) -> None:
        async with asyncio.timeout(20):
            while word not in self.text:
                await asyncio.sleep(0.01)


async def test_it_is_followed_and_continued_elsewhere(two: tuple[Context, Context]) -> None:
    one, other = two
    here, there = Follower(one), Follower(other)
    first = BuildLog(log_file(one, DOC))
    async with first.shown(one, DOC):
        await first.line("the first begins")
        await asyncio.gather(*(reader.sees("the first begins") for reader in (here, there)))
        await first.line("the first was killed here")  # perhaps nobody was shown this
    second = BuildLog(log_file(other, DOC))
    async with second.shown(other, DOC):
        await second.line("the second goes on")
        await there.sees("the second goes on")
    await second.keep(other, DOC)
    for reader in (here, there):
        reader.doc = DOC.evolve(phase="ready")
        await asyncio.wait_for(reader.task, 20)
    kept = [part async for part in read_log(one, DOC.evolve(phase="ready"), follow=False, fresh=lambda: None)]  # type: ignore[arg-type,return-value]
    assert there.text == b"".join(kept).decode()
    assert there.text.index("the first begins") < there.text.index("the second goes on")


async def test_the_first_builder_comes_back_to_what_the_second_wrote(two: tuple[Context, Context]) -> None:
    one, other = two
    for ctx, text in ((one, "a"), (other, "b"), (one, "c")):
        log = BuildLog(log_file(ctx, DOC))
        async with log.shown(ctx, DOC):
            await log.line(text)
            await log.show(ctx, DOC)
    assert [line[-1] for line in log_file(one, DOC).read_text().splitlines()] == ["a", "b", "c"]


async def test_a_blob_store_that_is_away_stops_no_build(two: tuple[Context, Context], tmp_path: Path) -> None:
    one, _ = two
    log = BuildLog(log_file(one, DOC))
    async with log.shown(one, DOC):
        (tmp_path / "blobs").touch()  # no folder
        await log.line("goes on")
        await asyncio.sleep(0.1)
        await log.line("and on")
    (tmp_path / "blobs").unlink()
    await log.keep(one, DOC)
    reader = read_log(one, DOC.evolve(phase="ready"), follow=False, fresh=lambda: None)  # type: ignore[arg-type,return-value]
    assert "and on" in b"".join([part async for part in reader]).decode()


@pytest.mark.parametrize("gone", [False, True])
async def test_who_follows_a_cancelled_build_is_told(two: tuple[Context, Context], gone: bool) -> None:
    one, _ = two
    reader = Follower(one)
    log = BuildLog(log_file(one, DOC))
    async with log.shown(one, DOC):
        await log.line("it begins")
        await reader.sees("it begins")
        reader.doc = None if gone else DOC.evolve(phase="cancelled", reason="it was deleted before it was built")
        await asyncio.wait_for(reader.task, 20)
    assert reader.text.endswith("Z cancelled: it was deleted before it was built\n")


async def test_no_folder_of_a_log_stays_behind(two: tuple[Context, Context]) -> None:
    one, _ = two
    other = DOC.evolve(id="scorer:2", version=2)
    for doc in (DOC, other):
        await BuildLog(log_file(one, doc)).line("x")
    await BuildLog(log_file(one, DOC)).keep(one, DOC)
    assert log_file(one, other).exists()
    await BuildLog(log_file(one, other)).keep(one, other)
    assert [path.name for path in (one.data / "image-builder" / "logs").iterdir()] == []
    await BuildLog(log_file(one, DOC)).line("again")
    assert log_file(one, DOC).read_text().endswith("again\n")
