"""How long the SDK waits for a build when nobody says: until its turn comes, and then as long as the build may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from modelyard import AsyncClient
from modelyard.client import images as waited
from modelyard.core.errors import BuildFailed, Unavailable

from .conftest import SCORE, Yard


@pytest.fixture
async def client(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncClient]:
    """Builds of what has requirements go on for as long as they may."""
    silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3600), "127.0.0.1", 0)
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}/simple")
    async with AsyncClient(yard.url) as found:
        yield found
    silent.close()


@pytest.mark.slow
async def test_the_images_own_limit_decides(yard: Yard, client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    score = await yard.upload(SCORE)
    image = await client.images.build("slow", score=score, requirements=["six"], timeout_s=2)
    with pytest.raises(Unavailable, match=r"after 0\.1 s"):
        await image.wait(0.1)
    with pytest.raises(BuildFailed, match="longer than 2 s"):
        await image.wait()
    monkeypatch.setattr(waited, "LATER_S", -1799.9)
    image = await client.images.build("slow", score=score, requirements=["six"])
    with pytest.raises(Unavailable, match=r"'building' after 0\.1 s"):
        await image.wait()


@pytest.mark.slow
async def test_the_time_in_the_queue_does_not_count(
        yard: Yard, client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four builds at once: the fifth waits for as long as those may take, and then builds for a moment."""
    score, lock = await yard.upload(SCORE), await yard.upload(b"")
    for n in range(4):
        await client.images.build(f"slow-{n}", score=score, requirements=["six"], timeout_s=2)
    image = await client.images.build("last", score=score, lock=lock, timeout_s=1)
    monkeypatch.setattr(waited, "LATER_S", 0.0)
    assert (await image.wait()).phase == "ready"


@pytest.mark.slow
async def test_tries_that_break_off_count(client: AsyncClient, yard: Yard) -> None:
    """What never answers is not waited for for ever, and whoever waits is told for what."""
    image = await client.images.build("based", score=await yard.upload(SCORE), base="127.0.0.1:1/nobody:1", timeout_s=8)
    told: list[str] = []
    with pytest.raises(BuildFailed, match=r"longer than 8 s, and at last waited: .*127\.0\.0\.1:1") as failed:
        await image.wait(on_progress=lambda progress: told.append(progress.message))
    assert failed.value.code == "build-failed"
    assert told[-1] == "failed"
    log = await image.log()
    assert log.count("interrupted: ") >= 1


@pytest.mark.slow
async def test_why_a_build_waits_is_told_meanwhile(client: AsyncClient, yard: Yard) -> None:
    image = await client.images.build("based", score=await yard.upload(SCORE), base="127.0.0.1:1/nobody:1")

    async def told() -> bool:
        found = [c for c in (await client.images.get(image.id)).document["conditions"] if c["type"] == "Built"]
        return [c["reason"] for c in found] == ["Waiting"] and "127.0.0.1:1" in found[0]["message"]

    await yard.until(told)
    seen: list[str] = []
    waits = asyncio.create_task(image.wait(on_progress=lambda progress: seen.append(progress.message)))

    async def shown() -> bool:
        return any(message.startswith("building, waiting: ") for message in seen)

    await yard.until(shown)
    await image.delete()
    with pytest.raises(BuildFailed, match="was cancelled: it was deleted before it was built") as ended:
        await waits
    assert ended.value.code == "cancelled" and "help" not in ended.value.detail
