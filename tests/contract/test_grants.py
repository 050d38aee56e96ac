"""What every capture grant promises: new objects of one deployment's capture, for a while, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelyard.adapters import urls
from modelyard.adapters.grants_lent import open_grant
from modelyard.core.errors import Denied, Invalid
from modelyard.core.layout import segments_prefix
from modelyard.ports.blobs import BlobStore, CaptureGrants
from tests.backends import Backend, backends, url_of


@pytest.fixture(params=backends("grants"))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    backend: Backend = request.param
    return url_of(backend, tmp_path)


@pytest.fixture
async def grants(url: str) -> AsyncIterator[CaptureGrants]:
    lender = await urls.open_grants(url)
    await lender.check()
    yield lender
    await lender.close()
    await lender.close()


@pytest.fixture
async def blobs(url: str) -> AsyncIterator[BlobStore]:
    store = await urls.open_blobs(url)
    yield store
    await store.close()


async def keys(blobs: BlobStore) -> list[str]:
    return [blob.key async for blob in blobs.list()]


async def test_a_grant_adds_new_objects_of_its_deployment(grants: CaptureGrants, blobs: BlobStore) -> None:
    grant = open_grant(await grants.lend("default", "iris", 60))
    assert await grant.put("0-1a2b3c4d-00000001.seg", b"first") is True
    key = segments_prefix("default", "iris") + "0-1a2b3c4d-00000001.seg"
    assert [chunk async for chunk in blobs.get(key)] == [b"first"]
    theirs = open_grant(await grants.lend("other", "iris", 60))
    await theirs.put("s.seg", b"x")
    assert await keys(blobs) == sorted([key, segments_prefix("other", "iris") + "s.seg"])


async def test_what_is_there_is_left_alone(grants: CaptureGrants, blobs: BlobStore) -> None:
    grant = open_grant(await grants.lend("default", "iris", 60))
    await grant.put("s", b"first")
    assert await grant.put("s", b"second") is False
    assert [chunk async for chunk in blobs.get(segments_prefix("default", "iris") + "s")] == [b"first"]


@pytest.mark.parametrize("name", ["", ".", "..", "../escape", "a/b", "/etc/x", "a\0b", "x" * 300])
async def test_names_that_lead_elsewhere(grants: CaptureGrants, blobs: BlobStore, name: str) -> None:
    grant = open_grant(await grants.lend("default", "iris", 60))
    with pytest.raises(Invalid):
        await grant.put(name, b"x")
    assert await keys(blobs) == []


async def test_a_grant_lapses_and_can_be_renewed(grants: CaptureGrants) -> None:
    url = await grants.lend("default", "iris", 1)
    grant = open_grant(url)
    await grant.put("a", b"x")
    await asyncio.sleep(1.05)
    with pytest.raises(Denied):
        await grant.put("b", b"x")
    renewed = await grants.lend("default", "iris", 60)
    assert await open_grant(renewed).put("b", b"x") is True


async def test_revoking_ends_every_url_lent_before(grants: CaptureGrants, blobs: BlobStore) -> None:
    first, second = await grants.lend("default", "iris", 60), await grants.lend("default", "iris", 60)
    others = open_grant(await grants.lend("default", "rose", 60))
    await grants.revoke("default", "iris")
    await grants.revoke("default", "iris")
    await grants.revoke("default", "never-lent")
    for url in (first, second):
        with pytest.raises(Denied):
            await open_grant(url).put("s", b"x")
    new = open_grant(await grants.lend("default", "iris", 60))
    assert await new.put("s", b"x") is True
    with pytest.raises(Denied):
        await open_grant(first).put("t", b"x")
    assert await others.put("s", b"x") is True
    assert len(await keys(blobs)) == 2


async def test_a_url_cannot_be_bent(grants: CaptureGrants, blobs: BlobStore) -> None:
    url = await grants.lend("default", "iris", 60)
    await grants.lend("default", "rose", 60)
    with pytest.raises(Denied):
        await open_grant(url.replace("iris", "rose")).put("s", b"x")
    for bad in ("http://localhost/x", "file:///tmp", url.replace("iris", ".."), url.replace("iris", "a%2F..%2Frose")):
        with pytest.raises((Invalid, Denied)):
            await open_grant(bad).put("s", b"x")
    assert await keys(blobs) == []


async def test_lending_at_once_gives_urls_that_all_work(grants: CaptureGrants) -> None:
    lent = await asyncio.gather(*(grants.lend("default", "iris", 60) for _ in range(8)))
    for n, url in enumerate(lent):
        assert await open_grant(url).put(f"s{n}", b"x") is True
