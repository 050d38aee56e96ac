"""Ways out: an image as one tar, and the build context; read by what is not ours."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from modelyard import AsyncClient
from modelyard.adapters.images_layout import LayoutImages
from modelyard.client import Progress

from .conftest import Yard
from .test_bases import DEBIAN, LINKS, Layout, layer


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


async def based(yard: Yard, layout: Layout, **more: Any) -> dict[str, Any]:
    base = layout.tag(layout.image(layer(DEBIAN, LINKS)))
    await yard.register("iris", b"weights" * 300_000)
    doc = await yard.small("based", base=base, models=["iris"], **more)
    assert doc["phase"] == "ready", doc
    return doc


def unpacked(raw: bytes, to: Path) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        archive.extractall(to, filter="data")
        return archive.getnames()


@pytest.mark.parametrize("form", ["oci", "docker"])
async def test_the_tar_holds_the_image_as_it_is(yard: Yard, layout: Layout, tmp_path: Path, form: str) -> None:
    doc = await based(yard, layout)
    answer = await yard.call("GET", f"/v1/images/based:1/archive?format={form}")
    assert answer.status == 200 and int(answer.headers["Content-Length"]) == len(answer.raw)
    names = await asyncio.to_thread(unpacked, answer.raw, tmp_path / "out")
    assert len(names) == len(set(names)) and ("manifest.json" in names) == (form == "docker")
    there = LayoutImages(tmp_path / "out")  # a layout folder like any other
    for reference in ("1", doc["digest"]):
        body, _ = await there.get_manifest("based", reference) or (b"", "")
        assert f"sha256:{hashlib.sha256(body).hexdigest()}" == doc["digest"]
    for part in (json.loads(body)["config"], *json.loads(body)["layers"]):
        size = sum([len(chunk) async for chunk in there.get_blob("based", part["digest"])])  # checks the digest
        assert size == part["size"]


async def test_what_docker_load_reads(yard: Yard, layout: Layout) -> None:
    """As the engine does: a config, and layers in order whose digests, unpacked, are the config's."""
    await based(yard, layout)
    raw = (await yard.call("GET", "/v1/images/based:1/archive?format=docker")).raw

    def check() -> None:
        import gzip

        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            def read(name: str) -> bytes:
                return archive.extractfile(name).read()  # type: ignore[union-attr]

            (one,) = json.loads(read("manifest.json"))
            assert one["RepoTags"] == ["based:1"]
            config = json.loads(read(one["Config"]))
            found = []
            for name in one["Layers"]:
                data = read(name)
                found.append("sha256:" + hashlib.sha256(
                    gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).hexdigest())
            assert found == config["rootfs"]["diff_ids"]

    await asyncio.to_thread(check)


async def test_what_cannot_be_exported(yard: Yard) -> None:
    await yard.small()
    refused = await yard.call("GET", "/v1/images/tiny:1/archive?format=docker")
    assert (refused.status, refused.json["code"]) == (422, "needs-base")
    assert (await yard.call("GET", "/v1/images/tiny:1/archive?format=zip")).status == 422
    assert (await yard.call("GET", "/v1/images/tiny:1/archive?form=oci")).status == 422
    assert (await yard.call("GET", "/v1/images/tiny:1/archive")).status == 200
    bad = await yard.small(score=await yard.upload(b"x"))
    assert (await yard.call("GET", f"/v1/images/{bad['id']}/archive")).status == 409


async def test_the_sdk_writes_it_whole_or_not_at_all(yard: Yard, layout: Layout, tmp_path: Path) -> None:
    doc = await based(yard, layout)
    client, seen = AsyncClient(yard.url), list[Progress]()
    try:
        got = await client.images.export("based", tmp_path / "a" / "image.tar", form="oci", on_progress=seen.append)
        assert got == tmp_path / "a" / "image.tar"
        assert seen[-1].done == (await asyncio.to_thread(got.stat)).st_size
        manifest = json.loads((await yard.images.images.get_manifest("based", "1"))[0])
        model = next(d["digest"] for d in manifest["layers"] if "model" in d["annotations"]["io.modelyard.layer"])
        blob = yard.images.data / "images" / "blobs" / model.replace(":", "/")
        await asyncio.to_thread(blob.write_bytes, b"x" * (await asyncio.to_thread(blob.stat)).st_size)
        with pytest.raises(Exception, match="lost"):
            await client.images.export(doc["id"], tmp_path / "b" / "image.tar", form="docker")
        assert await asyncio.to_thread(lambda: list((tmp_path / "b").iterdir())) == []
    finally:
        await client.close()


async def test_the_dockerfile_says_what_the_config_says(yard: Yard, layout: Layout, tmp_path: Path) -> None:
    env = {"A": "b c", "Q": 'say "hi"', "COST": "$5 \\ ${HOME}", "LINES": "one\ntwo"}
    await based(yard, layout, env=env)
    names = await asyncio.to_thread(
        unpacked, (await yard.call("GET", "/v1/images/based:1/context")).raw, tmp_path / "context")
    text = await asyncio.to_thread((tmp_path / "context" / "Dockerfile").read_text)
    assert {name.partition("/")[0] for name in names} == {"Dockerfile", "requirements.lock", "opt"}
    for line in ("FROM base", "COPY opt/ /opt/", 'ENV A="b c"', 'ENV Q="say \\"hi\\""',
                 'ENV COST="\\$5 \\\\ \\${HOME}"', "EXPOSE 8080 8081", "USER 10001", "WORKDIR /opt/modelyard",
                 'ENTRYPOINT ["/usr/bin/python3.11", "-I", "-S", "/opt/modelyard/launch.py"]', 'CMD ["serve"]'):
        assert line in text.splitlines(), (line, text)
    assert "# LINES has more than one line" in text and "RUN" not in text
