"""Azure blobs beyond the port's promises: lists over containers, what a lent SAS may not do, large blobs, and what is
said when something is wrong. On the stack's Azurite, or the account in MODELYARD_TEST_AZURE."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from azure.core.exceptions import ClientAuthenticationError
from azure.storage.blob import AccessPolicy, ContainerSasPermissions

from infra.stack.azurite import KEY
from modelyard.adapters import urls
from modelyard.adapters.blobs_azure import AzureBlobs
from modelyard.adapters.grants_lent import open_grant
from modelyard.core.errors import Denied, Invalid, Unavailable
from modelyard.core.layout import parse_segment
from tests.backends import MATRIX, url_of

pytestmark = pytest.mark.slow


@pytest.fixture
def url(tmp_path: Path) -> str:
    return url_of(MATRIX["blobs"][1], tmp_path)


@pytest.fixture
async def blobs(url: str) -> AsyncIterator[AzureBlobs]:
    store = await urls.open_blobs(url)
    assert isinstance(store, AzureBlobs)
    yield store
    await store.close()


async def one(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_a_list_goes_through_all_containers_in_order(blobs: AzureBlobs) -> None:
    keys = ["artifacts/sha256/ab/abcd", "capture/iris/.segments/0-1a2b3c4d-00000001.seg", "capture/iris/iris/1/x",
            "capture/rose/.segments/s.seg", "captured", "images/iris/1/lock", "workspaces/w/artifacts/a",
            "workspaces/w/capture/iris/.segments/s.seg", "workspaces/w/images/i", "zebra"]
    for key in reversed(keys):
        await blobs.put(key, one(b"1"))
    for prefix in ("", "c", "capture/", "capture/iris/", "capture/i", "workspaces/", "workspaces/w/capture/iris/", "z"):
        expected = [key for key in keys if key.startswith(prefix)]
        assert [blob.key async for blob in blobs.list(prefix)] == expected, prefix
        for after in keys:
            found = [blob.key async for blob in blobs.list(prefix, after)]
            assert found == [key for key in expected if key > after], (prefix, after)
    containers = {blobs._link.container_of(key)[0] for key in keys}
    assert len(containers) == 4, "three deployments' captures, and everything else"


async def ask(method: str, path: str, body: bytes = b"") -> int:
    """The status of a bare HTTP call; ``path`` is host and all."""
    parts = urlsplit(path)

    def call() -> int:
        wire = http.client.HTTPConnection(parts.netloc, timeout=10)
        try:
            wire.request(method, f"{parts.path}?{parts.query}", body or None,
                         {"x-ms-blob-type": "BlockBlob", "x-ms-version": "2021-12-02"})
            return wire.getresponse().status
        finally:
            wire.close()

    return await asyncio.to_thread(call)


async def test_a_lent_sas_creates_and_does_nothing_else(url: str, blobs: AzureBlobs) -> None:
    grants = await urls.open_grants(url)
    lent, short = await grants.lend("default", "iris", 60), await grants.lend("default", "rose", 1)
    assert await open_grant(lent).put("s.seg", b"first")
    container, _, rest = lent.partition("?")
    sas = rest.partition("#")[0]
    key = "capture/iris/.segments/s.seg"
    other = container.replace(container.rpartition("/")[2], blobs._link.capture("default", "rose")[0])
    await asyncio.sleep(1.1)
    refused = {
        "overwrite": await ask("PUT", f"{container}/{key}?{sas}", b"second"),
        "read": await ask("GET", f"{container}/{key}?{sas}"),
        "list": await ask("GET", f"{container}?restype=container&comp=list&{sas}"),
        "delete": await ask("DELETE", f"{container}/{key}?{sas}"),
        "another container": await ask("PUT", f"{other}/capture/rose/.segments/s.seg?{sas}", b"x"),
        "overwrite by a block list": await ask("PUT", f"{container}/{key}?comp=blocklist&{sas}",
                                               b"<BlockList></BlockList>"),
    }
    assert set(refused.values()) == {403}, refused
    with pytest.raises(Denied, match="lapsed or was revoked"):
        await open_grant(short).put("late.seg", b"x")
    assert [chunk async for chunk in blobs.get(key)] == [b"first"]
    await grants.close()


async def test_a_grant_without_leave_is_not_taken_for_a_name_that_is_taken(url: str, blobs: AzureBlobs) -> None:
    """Azurite answers both alike, and a shipper deletes what it thinks is there."""
    grants = await urls.open_grants(url)
    grant = open_grant(await grants.lend("default", "iris", 60))
    name = "0-1a2b3c4d-00000001.seg"
    assert await grant.put(name, b"kept") is True
    assert await grant.put(name, b"kept") is False
    keys = [blob.key async for blob in blobs.list("capture/iris/")]
    assert [parse_segment(key) for key in keys] == [("0-1a2b3c4d", 1)] * 2, "a copy may lie beside it"
    container = blobs._link.client.get_container_client(blobs._link.capture("default", "iris")[0])
    (policy,) = (await container.get_container_access_policy())["signed_identifiers"]
    await container.set_container_access_policy(
        {policy.id: AccessPolicy(permission=ContainerSasPermissions(read=True), expiry="2100-01-01T00:00:00Z")})
    for again in (name, "0-1a2b3c4d-00000002.seg"):
        with pytest.raises(Denied, match="AuthorizationPermissionMismatch"):
            await grant.put(again, b"lost")
    assert [blob.key async for blob in blobs.list("capture/iris/")] == keys
    await grants.close()


async def test_a_large_blob_goes_both_ways_in_little_memory(blobs: AzureBlobs) -> None:
    size, chunk = 256 << 20, b"0123456789abcdef" * (1 << 16)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(size // len(chunk)):
            yield chunk

    await blobs.put("warm", one(b"x" * (20 << 20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert await blobs.put("large", chunks(), if_absent=True)
    read, digest = 0, hashlib.sha256()
    async for piece in blobs.get("large"):
        read += len(piece)
        digest.update(piece)
    expected = hashlib.sha256()
    for _ in range(size // len(chunk)):
        expected.update(chunk)
    assert read == size and digest.digest() == expected.digest()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < 96, f"{grown} MiB"
    assert not await blobs.put("large", one(b"y" * (20 << 20)), if_absent=True)


async def test_a_container_that_was_taken_away_is_made_again(blobs: AzureBlobs) -> None:
    await blobs.put("a", one(b"1"))
    await blobs._link.client.delete_container(blobs._link.place.container)
    with pytest.raises(Unavailable):
        await blobs.put("a", one(b"2"))
    assert await blobs.put("a", one(b"2"))


@pytest.mark.parametrize(("bend", "words"), [
    (lambda url: url.replace("Eby8", "AAAA"), ["refuse", "key"]),
    (lambda url: url.replace("127.0.0.1", "127.0.0.9"), ["does not answer", "Azurite"]),
])
async def test_what_is_wrong_is_said_with_the_fix(url: str, bend, words: list[str]) -> None:  # type: ignore[no-untyped-def]
    store = await urls.open_blobs(bend(url) + "?timeout_s=2")
    with pytest.raises(Unavailable) as caught:
        await store.check()
    assert all(word in caught.value.message for word in words), caught.value.message
    assert KEY not in caught.value.message and "AAAA" not in caught.value.message
    await store.close()


@pytest.mark.parametrize("url", ["azure://127.0.0.1:1/account", "azure://h/UPPER", "azure://h/a--b", "azure://h/x/y/z",
                                 "azure://h:port/container"])
async def test_urls_that_name_no_container(url: str) -> None:
    with pytest.raises(Invalid):
        await urls.open_blobs(url)


async def test_a_key_that_is_none_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(Invalid, match="base64") as caught:
        await urls.open_blobs(url.replace("Eby8", "!secret!"))
    assert "secret" not in caught.value.message


async def test_nobody_logged_in_is_told_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's own words, when DefaultAzureCredential found nothing, fill a screen and name no setting of ours."""
    for name in ("AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    store = await urls.open_blobs("azure://acct.blob.core.windows.net/yard")
    assert isinstance(store, AzureBlobs)
    with pytest.raises(Unavailable) as caught, store._link.ours("check"):
        raise ClientAuthenticationError("DefaultAzureCredential failed to retrieve a token")
    assert all(word in caught.value.message for word in ("'acct'", "AZURE_STORAGE_KEY", "az login"))
    await store.close()


async def test_a_key_may_come_from_a_connection_string(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = url.replace(f"{urlsplit(url).netloc.rpartition('@')[0]}@", "")
    monkeypatch.delenv("AZURE_STORAGE_KEY", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=devstoreaccount1;AccountKey={KEY};X=y")
    for _ in range(2):
        store = await urls.open_blobs(bare)
        assert await store.put("a", one(b"1"))
        await store.close()
        monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
        monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
