"""What `images verify` finds, and that each thing that was changed is found."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelyard import AsyncClient
from modelyard.core.attest import opened, public_keys
from modelyard.core.errors import Conflict, Invalid, NotFound
from modelyard.core.layout import image_key
from modelyard.image_builder.keys import signer
from modelyard.image_builder.model import Image
from tests.handmade import chunks

from .conftest import Yard


@pytest.fixture
async def client(yard: Yard) -> AsyncIterator[AsyncClient]:
    client = AsyncClient(yard.url)
    yield client
    await client.close()


@pytest.fixture
async def image(yard: Yard) -> Image:
    await yard.register("iris", b"weights")
    doc = await yard.small(models=["iris"])
    found = await yard.images.store.get(Image, doc["id"])
    assert found is not None
    return found


async def keep(yard: Yard, image: Image, what: str, text: bytes) -> None:
    await yard.images.blobs.delete(image_key("default", image.id, what))
    await yard.images.blobs.put(image_key("default", image.id, what), chunks(text))


async def wrong(client: AsyncClient) -> dict[str, str]:
    """What is wrong → the line that says so."""
    found = await client.images.verify("tiny:1")
    assert found.ok == all(f.ok for f in found.findings) and found.document["verified"] == found.ok
    return {f.what: f.message for f in found.findings if not f.ok}


async def test_an_image_as_it_was_built(client: AsyncClient, image: Image, tmp_path: Path) -> None:
    own = await client.images.key()
    await asyncio.to_thread((tmp_path / "yard.pub").write_text, own["pem"])
    for key in (None, own["pem"], tmp_path / "yard.pub", str(tmp_path / "yard.pub")):
        found = await client.images.verify("tiny", key)
        assert found.ok and (found.image, found.digest, found.key) == ("tiny:1", image.digest, own["id"])
        assert [f.what for f in found.findings] == [
            "manifest", "signature", "subject", "model", "lock", "score", "sbom"]
        assert ("give --key" in found.findings[1].message) == (key is None)


async def test_another_key_is_not_trusted(client: AsyncClient, image: Image, tmp_path: Path) -> None:
    stranger = await signer(tmp_path)
    found = await client.images.verify("tiny:1", stranger.public.pem)
    assert not found.ok and found.key is None
    assert [f.what for f in found.findings if not f.ok] == ["signature"]
    own = await client.images.key()
    assert (await client.images.verify("tiny:1", stranger.public.pem + own["pem"])).key == own["id"]


@pytest.mark.parametrize("what", ["sbom", "lock"])
async def test_a_changed_document_is_found(yard: Yard, client: AsyncClient, image: Image, what: str) -> None:
    await keep(yard, image, what, b"{}")
    assert (await wrong(client)).keys() == {what}
    await yard.images.blobs.delete(image_key("default", image.id, what))
    assert "is not there" in (await wrong(client))[what]


async def test_a_changed_statement_is_found(yard: Yard, client: AsyncClient, image: Image) -> None:
    """By its signature; and what a holder of the key signed, by what it says."""
    key = await signer(yard.images.data)
    raw = (await yard.call("GET", "/v1/images/tiny:1/provenance")).raw
    statement = opened(json.loads(raw), public_keys(key.public.pem.encode()))
    envelope = {**json.loads(raw), "payload": "e30="}
    await keep(yard, image, "provenance", json.dumps(envelope).encode())
    assert (await wrong(client)).keys() == {"signature"}
    await keep(yard, image, "provenance", b"garbage")
    assert "not JSON" in (await wrong(client))["signature"]
    await yard.images.blobs.delete(image_key("default", image.id, "provenance"))
    assert "no provenance" in (await wrong(client))["signature"]
    statement["subject"][0]["digest"]["sha256"] = "1" * 64
    for material in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
        material["digest"] = {"sha256": "2" * 64}
    await keep(yard, image, "provenance", json.dumps(key.sign(json.dumps(statement).encode())).encode())
    assert (await wrong(client)).keys() == {"subject", "model", "lock", "score"}
    del statement["predicate"]["buildDefinition"]
    await keep(yard, image, "provenance", json.dumps(key.sign(json.dumps(statement).encode())).encode())
    assert (await wrong(client)).keys() == {"subject", "materials"}


async def test_another_image_under_the_same_name_is_found(yard: Yard, client: AsyncClient, image: Image) -> None:
    """Somebody moved the tag in the image store."""
    other = await yard.small("other", score=await yard.upload(b"def run(data):\n    return 666\n"))
    body, kind = await yard.images.images.get_manifest("other", "1") or (b"", "")
    await yard.images.images.put_manifest("tiny", "1", body, kind)
    found = await wrong(client)
    assert found.keys() == {"manifest", "subject"} and other["digest"][:19] in found["manifest"]


async def test_a_model_that_is_another_now_is_found(yard: Yard, client: AsyncClient, image: Image) -> None:
    from modelyard.registry.model import Model

    await yard.registry.change(Model, "iris:1", lambda d: (d.evolve(artifact="sha256:" + "3" * 64), ()))
    assert (await wrong(client)).keys() == {"model"}
    gone = image.evolve(models=["gone:1"])
    await yard.images.change(Image, image.id, lambda d: (d.evolve(models=gone.models), ()))
    assert "gone:1 is not in the registry" in (await client.images.verify("tiny:1")).findings[3].message


async def test_what_cannot_be_looked_at(yard: Yard, client: AsyncClient, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await client.images.verify("nothing:1")
    bad = await yard.small(score=await yard.upload(b"x"))
    with pytest.raises(Conflict):
        await client.images.verify(bad["id"])
    for key in (tmp_path / "absent", "-----BEGIN PUBLIC KEY-----"):
        with pytest.raises(Invalid):
            await client.images.verify(bad["id"], key)
