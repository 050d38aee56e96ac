"""Dockerfiles before an engine sees them: what is read in them, what is refused, what is told where none is built."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from modelyard.core.archives import pack
from modelyard.core.errors import BuildFailed
from modelyard.image_builder import dockerfiles, instructions
from tests.unit.image_builder.conftest import SCORE, Yard


def folder(path: Path, text: str, **files: str) -> bytes:
    path.mkdir()
    for name, content in {"Dockerfile": text, **files}.items():
        (path / name).write_text(content)
    return b"".join(pack(path))


@pytest.mark.parametrize(("text", "found"), [
    ("FROM debian:12", ["debian:12"]),
    ("from --platform=linux/amd64 debian:12 as a\nFROM a\nCOPY --from=0 /x /x\nCOPY --from=a /x /x", ["debian:12"]),
    ("FROM scratch\nCOPY --from=HOST/tools:1 /x /x", ["HOST/tools:1"]),
    ("ARG TAG=12\nARG NAME\nFROM debian:$TAG\nFROM ${NAME:-ubuntu}:${TAG}", ["debian:12", "ubuntu:12"]),
    ("# FROM not\nFROM \\\n# nor this\n\n debian:12\r\nRUN echo FROM x", ["debian:12"]),
    ("\ufeffFROM\tdebian:12 AS Base\nFROM base", ["debian:12"]),
])
def test_the_images_that_it_stands_on(text: str, found: list[str]) -> None:
    assert instructions.images(text) == found


@pytest.mark.parametrize("line", [
    "ADD http://169.254.169.254/x /x", "add HTTPS://h/x /x", 'ADD "http:"//h/x /x', "ADD $WHERE /x",
    "ADD ht\\\ntp://h/x /x",
    'ADD ["http:\\u002f\\u002fh/x", "/x"]', "ONBUILD ADD http://h/x /x", "onbuild\tONBUILD add http://h/x /x",
    "ADD --chown=1 git@h:x /x",
])
def test_the_engine_fetches_nothing_itself(line: str) -> None:
    assert instructions.refused(f"FROM x\n{line}\n")


def test_files_are_added_and_the_escape_character_is_the_usual_one() -> None:
    assert instructions.refused("FROM x\nADD files.tar /\nRUN curl http://h/x\nENV URL=http://h\n") == []
    with pytest.raises(BuildFailed, match="Dockerfile:1"):
        instructions.refused("# escape=`\nFROM x\n")
    assert instructions.refused("# escape=\\\nFROM x\n") == []


async def test_a_yard_without_a_builder_says_how_to_have_one(yard: Yard) -> None:
    asked = {"name": "own", "score": await yard.upload(SCORE), "dockerfile": await yard.upload(b"x"), "base": "h.x/a:1"}
    answer = await yard.call("POST", "/v1/images", asked)
    told = [e["message"] for e in answer.json["errors"]]
    assert answer.status == 422 and {e["field"] for e in answer.json["errors"]} == {"dockerfile"}
    assert any("docker://?dockerfiles=none" in line for line in told) and any("not both" in line for line in told)
    answer = await yard.call("POST", "/v1/images", {**asked, "base": None, "dockerfile": f"sha256:{'0' * 64}"})
    assert "upload it first" in answer.json["detail"]


def test_a_folder_that_cannot_be_meant(tmp_path: Path) -> None:
    assert dockerfiles.read(folder(tmp_path / "good", "FROM x\n", other="y")) == "FROM x\n"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        link = tarfile.TarInfo("Dockerfile")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/shadow"
        archive.addfile(link)
    (tmp_path / "below").mkdir()
    (tmp_path / "below/sub").mkdir()
    (tmp_path / "below/sub/Dockerfile").write_text("FROM x")
    for source, told in ((out.getvalue(), "symbolic link"), (b"no tar", "not a tar"),
                         (b"".join(pack(tmp_path / "below")), "no Dockerfile at the top"),
                         (folder(tmp_path / "big", "#" * (2 << 20)), "more than")):
        with pytest.raises(BuildFailed, match=told):
            dockerfiles.read(source)


@pytest.mark.parametrize("zipped", [False, True])
def test_what_docker_save_writes_is_read_at_any_age(tmp_path: Path, zipped: bool) -> None:
    """Newer engines keep layers as blobs, and one that runs on containerd gzips them; equal layers are links."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for name in ("usr/bin/python3.11", "etc/.wh.motd"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    plain = layer.getvalue()
    config = json.dumps({"rootfs": {"diff_ids": ["x"]}}).encode()
    parts = {"blobs/sha256/aa": gzip.compress(plain) if zipped else plain, "blobs/sha256/bb": config, "manifest.json": (
        json.dumps([{"Config": "blobs/sha256/bb", "Layers": ["blobs/sha256/aa", "cc/layer.tar"]}]).encode())}
    with tarfile.open(tmp_path / "saved.tar", mode="w") as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("cc/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../blobs/sha256/aa"
        archive.addfile(link)
    assert dockerfiles._index(tmp_path / "saved.tar") == (config, ["blobs/sha256/aa", "cc/layer.tar"])
    for name in ("blobs/sha256/aa", "cc/layer.tar"):
        made, files = dockerfiles._repacked(tmp_path / "saved.tar", name, "base: x", tmp_path / "out")
        assert made.layer.diff_id == f"sha256:{hashlib.sha256(plain).hexdigest()}"
        assert gzip.decompress((tmp_path / "out").read_bytes()) == plain
        assert dict(files.there) == {"usr/bin/python3.11": ""} and list(files.gone) == ["etc/motd"]
