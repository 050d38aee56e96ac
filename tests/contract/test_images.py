"""What every ImageStore promises."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from modelyard.adapters import urls
from modelyard.core.errors import Invalid, NotFound
from modelyard.image_builder.model import Image
from modelyard.image_builder.referrers import Attached, attach, detach
from modelyard.ports.images import ImageStore
from tests.backends import Backend, backends, url_of

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
pytestmark = pytest.mark.parametrize("backend", backends("images"))


@pytest.fixture
async def images(backend: Backend, tmp_path: Path) -> AsyncIterator[ImageStore]:
    store = await urls.open_images(url_of(backend, tmp_path))
    yield store
    await store.close()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def never() -> AsyncIterator[bytes]:
    raise AssertionError("read although the blob is there")
    yield b""


async def read(images: ImageStore, repo: str, digest: str, start: int = 0) -> bytes:
    return b"".join([chunk async for chunk in images.get_blob(repo, digest, start)])


def manifest(config: bytes, *layers: bytes) -> bytes:
    def part(data: bytes, kind: str) -> dict[str, Any]:
        return {"mediaType": kind, "digest": digest(data), "size": len(data)}

    return json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": part(config, CONFIG),
                       "layers": [part(layer, LAYER) for layer in layers]}).encode()


async def image(images: ImageStore, repo: str, tag: str, *layers: bytes, config: bytes = b"{}") -> str:
    for data in (config, *layers):
        await images.put_blob(repo, digest(data), chunks(data))
    return await images.put_manifest(repo, tag, manifest(config, *layers), MANIFEST)


async def test_a_blob_comes_back_as_it_went_in(images: ImageStore) -> None:
    data = os.urandom(3_000_000)
    assert await images.put_blob("iris", digest(data), chunks(data[:7], b"", data[7:2_000_000], data[2_000_000:]))
    assert await read(images, "iris", digest(data)) == data
    assert await read(images, "iris", digest(data), 2_999_990) == data[-10:]
    assert await images.put_blob("iris", digest(data), never()) is False
    await images.check()


async def test_an_empty_blob(images: ImageStore) -> None:
    await images.put_blob("iris", digest(b""), chunks())
    assert await read(images, "iris", digest(b"")) == b""


async def test_wrong_bytes_are_refused_and_not_kept(images: ImageStore) -> None:
    with pytest.raises(Invalid):
        await images.put_blob("iris", digest(b"right"), chunks(b"wrong"))
    with pytest.raises(NotFound):
        await read(images, "iris", digest(b"right"))
    for bad in ("sha256:12", "md5:" + "0" * 64, "../../etc/passwd"):
        with pytest.raises(Invalid):
            await images.put_blob("iris", bad, chunks(b""))


async def test_a_stream_that_breaks_off_leaves_nothing(images: ImageStore) -> None:
    data = os.urandom(3_000_000)

    async def broken() -> AsyncIterator[bytes]:
        yield data[:2_000_000]
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        await images.put_blob("iris", digest(data), broken())
    with pytest.raises(NotFound):
        await read(images, "iris", digest(data))
    assert await images.put_blob("iris", digest(data), chunks(data))


async def test_the_same_blob_from_many_at_once(images: ImageStore) -> None:
    data = os.urandom(2_500_000)
    answers = await asyncio.gather(*(images.put_blob("iris", digest(data), chunks(data)) for _ in range(8)))
    assert sum(answers) >= 1 and await read(images, "iris", digest(data)) == data


async def test_a_manifest_by_tag_and_by_digest(images: ImageStore) -> None:
    known = await image(images, "iris", "1", b"layer")
    by_tag = await images.get_manifest("iris", "1")
    assert by_tag == (manifest(b"{}", b"layer"), MANIFEST) == await images.get_manifest("iris", known)
    assert known == digest(by_tag[0])
    assert await images.get_manifest("iris", "2") is None
    assert await images.get_manifest("other", "1") is None
    assert await images.get_manifest("iris", digest(b"else")) is None


async def test_a_manifest_needs_its_blobs(images: ImageStore) -> None:
    await images.put_blob("iris", digest(b"{}"), chunks(b"{}"))
    with pytest.raises(Invalid, match="put it first"):
        await images.put_manifest("iris", "1", manifest(b"{}", b"absent"), MANIFEST)
    with pytest.raises(Invalid):
        await images.put_manifest("iris", "1", b"not json", MANIFEST)
    assert await images.get_manifest("iris", "1") is None


@pytest.mark.parametrize(("repo", "tag"), [("Iris", "1"), ("../x", "1"), ("iris", "a/b"), ("iris", ""), ("", "1")])
async def test_names_that_are_none(images: ImageStore, repo: str, tag: str) -> None:
    with pytest.raises(Invalid):
        await image(images, repo, tag, b"layer")


async def blob_is_gone(images: ImageStore, backend: Backend, repo: str, data: bytes) -> None:
    """At once in a folder. A registry may keep it until it collects its garbage, whole or not at all."""
    try:
        assert await read(images, repo, digest(data)) == data
    except NotFound:
        return
    assert backend.name == "registry"


async def test_a_tag_moves(images: ImageStore, backend: Backend) -> None:
    before = await image(images, "iris", "1", b"old")
    await image(images, "iris", "1", b"new")
    assert await images.get_manifest("iris", "1") == (manifest(b"{}", b"new"), MANIFEST)
    assert await images.get_manifest("iris", before) is None
    await blob_is_gone(images, backend, "iris", b"old")


async def test_a_tag_moves_away_from_what_another_has(images: ImageStore) -> None:
    before = await image(images, "iris", "1", b"old")
    await image(images, "iris", "2", b"old")
    await image(images, "iris", "1", b"new")
    assert await images.get_manifest("iris", before) == await images.get_manifest("iris", "2") is not None


async def test_remove_takes_what_nobody_else_needs(images: ImageStore, backend: Backend) -> None:
    before = await image(images, "iris", "1", b"shared", b"one")
    await image(images, "rose", "1", b"shared", b"two")
    await images.remove("iris", "1")
    assert await images.get_manifest("iris", "1") is None and await images.get_manifest("iris", before) is None
    assert await read(images, "rose", digest(b"shared")) == b"shared"
    assert await read(images, "rose", digest(b"{}")) == b"{}"
    await blob_is_gone(images, backend, "iris", b"one")
    await images.remove("iris", "1")
    await images.remove("rose", "1")
    await blob_is_gone(images, backend, "rose", b"shared")


async def test_two_tags_of_one_manifest(images: ImageStore) -> None:
    known = await image(images, "iris", "1", b"layer")
    assert await image(images, "iris", "2", b"layer") == known
    await images.remove("iris", "1")
    assert await images.get_manifest("iris", "1") is None
    assert await images.get_manifest("iris", "2") is not None and await images.get_manifest("iris", known) is not None
    assert await read(images, "iris", digest(b"layer")) == b"layer"


async def test_remove_leaves_alone_what_is_being_put(images: ImageStore) -> None:
    """Another image's blobs are there, its manifest not yet: a removal between must not take them."""
    await image(images, "iris", "1", b"shared")
    assert await images.put_blob("rose", digest(b"shared"), never()) is False
    await images.put_blob("rose", digest(b"own"), chunks(b"own"))
    await images.remove("iris", "1")
    await images.put_blob("rose", digest(b"{}"), chunks(b"{}"))
    await images.put_manifest("rose", "1", manifest(b"{}", b"shared", b"own"), MANIFEST)
    assert await read(images, "rose", digest(b"shared")) == b"shared"


def version(repo: str, tag: str, known: str) -> Image:
    return Image(id=f"{repo}:{tag}", name=repo, version=int(tag), platform="linux/amd64", digest=known)


async def test_what_is_said_of_an_image_goes_with_it(images: ImageStore, backend: Backend) -> None:
    """OCI referrers by the fallback tag: two versions that are one image have their own documents; what
    is gone is gone, and repeating does no harm."""
    known = [await image(images, "iris", tag, b"layer") for tag in ("1", "2")]
    assert known[0] == known[1]
    one, two = (version("iris", tag, known[0]) for tag in ("1", "2"))
    body, _ = await images.get_manifest("iris", "1") or (b"", "")

    def said(text: bytes) -> list[Attached]:
        return [Attached("sbom", "application/vnd.cyclonedx+json", text), Attached("provenance", "text/plain", b"{}")]

    async def listed() -> dict[str, dict[str, Any]]:
        found = await images.get_manifest("iris", known[0].replace(":", "-"))
        return {part["digest"]: part for part in json.loads(found[0])["manifests"]} if found else {}

    async def attached(image: Image, text: bytes) -> None:
        await attach(images, image, body, said(text))

    await attached(one, b"of one")
    await asyncio.gather(attached(two, b"of two"), attached(one, b"of one, again"))
    entries = await listed()
    assert sorted(e["annotations"]["io.modelyard.image"] for e in entries.values()) == ["iris:1"] * 2 + ["iris:2"] * 2
    for found, entry in entries.items():
        raw, kind = await images.get_manifest("iris", found) or (b"", "")
        artifact = json.loads(raw)
        assert (kind, digest(raw), entry["artifactType"]) == (MANIFEST, found, artifact["artifactType"])
        assert artifact["subject"] == {"mediaType": MANIFEST, "digest": known[0], "size": len(body)}
        assert await read(images, "iris", artifact["layers"][0]["digest"]) in (b"of one, again", b"of two", b"{}")
    for repeated in range(2):
        await detach(images, one)
        assert {e["annotations"]["io.modelyard.image"] for e in (await listed()).values()} == {"iris:2"}, repeated
    await images.remove("iris", "1")
    await blob_is_gone(images, backend, "iris", b"of one, again")
    assert await read(images, "iris", digest(b"of two")) == b"of two"
    await detach(images, two)
    await images.remove("iris", "2")
    assert await listed() == {}
    for gone in entries:
        assert await images.get_manifest("iris", gone) is None
    await blob_is_gone(images, backend, "iris", b"of two")


async def test_a_removal_does_not_cut_a_reader(images: ImageStore) -> None:
    data = os.urandom(4_000_000)
    await image(images, "iris", "1", data)
    source = images.get_blob("iris", digest(data))
    first = await anext(source)
    await images.remove("iris", "1")
    rest = b"".join([chunk async for chunk in source])
    assert first + rest == data


async def test_it_is_still_there_after_reopening(images: ImageStore, backend: Backend, tmp_path: Path) -> None:
    await image(images, "iris", "1", b"layer")
    again = await urls.open_images(url_of(backend, tmp_path))
    assert await again.get_manifest("iris", "1") is not None
    assert await read(again, "iris", digest(b"layer")) == b"layer"
    await again.close()


async def test_many_at_once_lose_no_tag(images: ImageStore, backend: Backend, tmp_path: Path) -> None:
    other = await urls.open_images(url_of(backend, tmp_path))
    await asyncio.gather(*(image((images, other)[n % 2], "iris", str(n), b"layer %d" % (n % 5)) for n in range(1, 41)))
    await asyncio.gather(*((images, other)[n % 2].remove("iris", str(n)) for n in range(1, 41, 2)))
    found = [n for n in range(1, 41) if await images.get_manifest("iris", str(n))]
    assert found == list(range(2, 41, 2))
    for n in found:
        assert await read(other, "iris", digest(b"layer %d" % (n % 5)))
    await other.close()


WRITER = """
import asyncio, hashlib, json, sys
from modelyard.adapters import urls
from tests.contract.test_images import image

async def main():
    store = await urls.open_images(sys.argv[1])
    for n in range(10_000):
        await image(store, "killed", str(n % 50), b"layer %d" % n * 1000)
        print(n, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_writer_killed_at_any_moment_leaves_whole_images(
        images: ImageStore, backend: Backend, tmp_path: Path) -> None:
    await image(images, "kept", "1", b"kept")
    for _ in range(3):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, url_of(backend, tmp_path), stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        for _ in range(20):
            await process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        await process.wait()
    whole = 0
    for n in range(50):
        found = await images.get_manifest("killed", str(n))
        if found is not None:
            whole += 1
            for layer in json.loads(found[0])["layers"]:
                assert len(await read(images, "killed", layer["digest"])) == layer["size"]
    assert whole >= 20 and await read(images, "kept", digest(b"kept")) == b"kept"
    await image(images, "after", "1", b"after")
