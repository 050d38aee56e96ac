"""Images with a base: what of it is taken, what is composed, and what cannot be built on."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from modelyard.adapters.images_layout import LayoutImages
from modelyard.core.errors import BuildFailed, Invalid
from modelyard.image_builder import bases
from modelyard.image_builder.bases import Files

from .conftest import Yard

OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"
LINKS = {"usr/bin/python3": "python3.11"}
DEBIAN = {"usr/bin/python3.11": b"elf", "usr/lib/x86_64-linux-gnu/libstdc++.so.6": b"elf", "etc/hostname": b"x"}


def layer(files: Mapping[str, bytes], links: Mapping[str, str] = {}) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return out.getvalue()


class Layout:
    """An OCI layout as another tool writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs/sha256").mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        word = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs/sha256" / word).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{word}", "size": len(data)}

    def json(self, body: Any, kind: str) -> dict[str, Any]:
        return self.blob(json.dumps(body).encode(), kind)

    def image(self, *tars: bytes, machine: str = "amd64", env: tuple[str, ...] = (), family: str = "oci",
              **wrong: Any) -> dict[str, Any]:
        """The descriptor of an image of these layers, gzipped."""
        kinds = {"oci": (f"{OCI}.layer.v1.tar+gzip", f"{OCI}.config.v1+json", f"{OCI}.manifest.v1+json"),
                 "docker": (f"{DOCKER}.image.rootfs.diff.tar.gzip", f"{DOCKER}.container.image.v1+json",
                            f"{DOCKER}.distribution.manifest.v2+json")}[family]
        squeezed = [{**self.blob(gzip.compress(data, mtime=0), wrong.get("kind", kinds[0])), **wrong.get("layer", {})}
                    for data in tars]
        config = {"architecture": machine, "os": "linux", "config": {"Env": list(env), "Cmd": ["bash"], "User": "root"},
                  "rootfs": {"type": "layers", "diff_ids": wrong.get("diff_ids") or [
                      f"sha256:{hashlib.sha256(data).hexdigest()}" for data in tars]}}
        return self.json({"schemaVersion": 2, "mediaType": kinds[2], "config": self.json(config, kinds[1]),
                          "layers": squeezed}, kinds[2])

    def tag(self, *entries: dict[str, Any], name: str | None = "latest") -> str:
        marks = {"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}
        body = {"schemaVersion": 2, "manifests": [{**entry, **marks} for entry in entries]}
        (self.folder / "index.json").write_text(json.dumps(body))
        return f"oci-layout://{self.folder}" + (f":{name}" if name and name != "latest" else "")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "base")


async def parsed(yard: Yard, doc: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    found = await yard.images.images.get_manifest(doc["name"], str(doc["version"]))
    assert found is not None and found[1] == f"{OCI}.manifest.v1+json"
    manifest = json.loads(found[0])
    return manifest, json.loads(b"".join([
        chunk async for chunk in yard.images.images.get_blob(doc["name"], manifest["config"]["digest"])]))


@pytest.mark.parametrize("family", ["oci", "docker"])
async def test_the_base_lies_below_and_the_config_is_composed(yard: Yard, layout: Layout, family: str) -> None:
    base = layout.tag(layout.image(layer(DEBIAN, LINKS), layer({"etc/more": b"1"}), family=family, env=(
        "PATH=/usr/local/bin:/usr/bin", "LANG=C.UTF-8", "COLOUR=blue")))
    doc = await yard.small("based", base=base, env={"COLOUR": "red"})
    assert (doc["phase"], doc["python"], doc["base"]) == ("ready", "3.11", base), doc
    manifest, config = await parsed(yard, doc)
    kinds = [part["mediaType"] for part in manifest["layers"]]
    assert kinds[:2] == [f"{OCI}.layer.v1.tar+gzip"] * 2 and not any("zstd" in kind for kind in kinds)
    assert manifest["config"]["mediaType"] == f"{OCI}.config.v1+json"
    assert len(config["rootfs"]["diff_ids"]) == len(config["history"]) == len(manifest["layers"])
    labels = config["config"].pop("Labels")
    assert labels["io.modelyard.env"] == '{"COLOUR":"red","ORT_DISABLE_TELEMETRY":"1"}'
    assert labels["org.opencontainers.image.base.name"] == base
    assert labels["org.opencontainers.image.base.digest"] == manifest["annotations"][
        "org.opencontainers.image.base.digest"]
    assert config["config"] == {
        "User": "10001", "WorkingDir": "/opt/modelyard", "Cmd": ["serve"],
        "Entrypoint": ["/usr/bin/python3.11", "-I", "-S", "/opt/modelyard/launch.py"],
        "Env": ["COLOUR=red", "LANG=C.UTF-8", "ORT_DISABLE_TELEMETRY=1", "PATH=/usr/local/bin:/usr/bin"],
        "ExposedPorts": {"8080/tcp": {}, "8081/tcp": {}}}
    assert doc["size"] > sum(part["size"] for part in manifest["layers"])
    bill = json.loads((await yard.call("GET", f"/v1/images/{doc['id']}/sbom")).raw)
    assert bill["components"][-1]["name"] == base
    marks = manifest["annotations"]
    assert bill["components"][-1]["hashes"][0]["content"] in marks["org.opencontainers.image.base.digest"]
    recipe = (await yard.call("GET", f"/v1/images/{doc['id']}/context")).raw
    with tarfile.open(fileobj=io.BytesIO(recipe)) as archive:
        assert not any(name.startswith(("usr", "etc")) for name in archive.getnames())
        assert f"--build-context base={base}" in archive.extractfile("Dockerfile").read().decode()


async def test_a_second_build_finds_the_base_in_the_store(yard: Yard, layout: Layout) -> None:
    base = layout.tag(layout.image(layer(DEBIAN, LINKS)))
    one = await yard.small("based", base=base)
    for path in (layout.folder / "blobs/sha256").iterdir():  # what is big is not read again
        if path.read_bytes()[:2] == b"\x1f\x8b":
            path.unlink()
    assert (await yard.small("based", base=base))["digest"] == one["digest"]


async def test_the_image_of_the_platform_is_taken_from_a_list(yard: Yard, layout: Layout) -> None:
    def of(machine: str, content: bytes) -> dict[str, Any]:
        return {**layout.image(layer({**DEBIAN, "etc/machine": content}, LINKS), machine=machine),
                "platform": {"os": "linux", "architecture": machine}}

    listed = layout.json({"schemaVersion": 2, "manifests": [
        of("arm64", b"arm"), of("amd64", b"amd"),
        {**layout.json({}, f"{OCI}.manifest.v1+json"), "platform": {"os": "unknown", "architecture": "unknown"}}]},
        f"{OCI}.index.v1+json")
    base = layout.tag(listed, name="3.11")
    told = set()
    for platform in ("linux/amd64", "linux/arm64"):
        manifest, config = await parsed(yard, await yard.small("based", base=base, platform=platform))
        told.add((config["architecture"], manifest["layers"][0]["digest"]))
    assert len(told) == 2 and {machine for machine, _ in told} == {"amd64", "arm64"}
    only = layout.tag(layout.json({"schemaVersion": 2, "manifests": [of("arm64", b"arm")]}, f"{OCI}.index.v1+json"))
    failed = await yard.small("based", base=only, platform="linux/amd64")
    assert failed["phase"] == "failed" and "no image for linux/amd64; it has: linux/arm64" in failed["reason"]


async def test_a_base_that_is_known_is_still_of_one_platform(yard: Yard, layout: Layout) -> None:
    base = layout.tag(layout.image(layer(DEBIAN, LINKS)))
    assert (await yard.small("based", base=base, platform="linux/amd64"))["phase"] == "ready"
    other = await yard.small("based", base=base, platform="linux/arm64")
    assert other["phase"] == "failed" and "is for linux/amd64, the image for linux/arm64" in other["reason"]


async def test_an_unnamed_image_is_the_latest(yard: Yard, layout: Layout) -> None:
    base = layout.tag(layout.image(layer(DEBIAN, LINKS)), name=None)
    assert (await yard.small("based", base=base))["phase"] == "ready"


Wrong = Callable[[Layout], str]


@pytest.mark.parametrize(("base", "told"), [
    (lambda y: y.tag(y.image(layer(DEBIAN)), name="3.11").removesuffix(":3.11") + ":3.12", "there is no base image"),
    (lambda y: f"oci-layout://{y.folder}-nowhere", "-nowhere does not exist on the image builder's machine"),
    (lambda y: f"oci-layout://{y.folder.parent}", "is no OCI layout"),
    (lambda y: y.tag(y.image(layer({"etc/x": b""}))), "has no Python 3.11 or newer"),
    (lambda y: y.tag(y.image(layer({"usr/bin/python3.9": b""}))), "under bin/: 3.9"),
    (lambda y: y.tag(y.image(layer(DEBIAN), layer({"usr/bin/.wh.python3.11": b""}))), "has no Python"),
    (lambda y: y.tag(y.image(layer({**DEBIAN, "lib/ld-musl-x86_64.so.1": b""}))), "musl"),
    (lambda y: y.tag(y.image(layer({**DEBIAN, "opt/modelyard/launch.py": b""}))), "scoring server already"),
    (lambda y: y.tag(y.image(layer(DEBIAN), kind=f"{OCI}.layer.v1.tar+zstd")), "tar+zstd"),
    (lambda y: y.tag(y.image(layer(DEBIAN), diff_ids=["sha256:" + "0" * 64])), "its config says"),
    (lambda y: y.tag(y.image(layer(DEBIAN), layer={"size": 7})), "larger than its manifest says"),
    (lambda y: y.tag(y.image(layer(DEBIAN), layer={"size": "many"})), "larger than its manifest says"),
    (lambda y: y.tag(y.json({"layers": [1], "config": {}}, f"{OCI}.manifest.v1+json")), "not an OCI image"),
    (lambda y: y.tag(y.json({"manifests": ["x"]}, f"{OCI}.index.v1+json")), "what are no images"),
    (lambda y: y.tag(y.json({"layers": [], "config": y.json({"os": "linux", "architecture": "amd64", "rootfs": []},
                                                            f"{OCI}.config.v1+json")}, f"{OCI}.manifest.v1+json")),
     "not one of an OCI image"),
    (lambda y: y.tag(y.json({"manifests": [{"platform": {"os": "unknown", "architecture": "unknown"}, "digest": "x"}]},
                            f"{OCI}.index.v1+json")), "it has: none"),
    (lambda y: y.tag(y.image(layer(DEBIAN), diff_ids=["sha256:" + "0" * 64] * 2)), "has 1 layers and says 2"),
    (lambda y: y.tag(y.image(b"no tar at all" * 100)), "not a tar archive"),
    (lambda y: y.tag(y.image(layer(DEBIAN), machine="s390x")), "is for linux/s390x"),
    (lambda y: y.tag(y.json([], f"{OCI}.manifest.v1+json")), "not an object"),
    (lambda y: y.tag(y.json({"schemaVersion": 1}, f"{OCI}.manifest.v1+json")), "not an OCI image"),
    (lambda y: y.tag(y.blob(b"{", f"{OCI}.manifest.v1+json")), "not JSON"),
])
async def test_what_cannot_be_built_on(yard: Yard, layout: Layout, base: Wrong, told: str) -> None:
    doc = await yard.small("based", base=base(layout))
    assert doc["phase"] == "failed" and told in doc["reason"], doc["reason"]
    assert "Traceback" not in (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()


async def test_a_damaged_blob_of_a_base(yard: Yard, layout: Layout) -> None:
    base = layout.tag(layout.image(layer(DEBIAN, LINKS)))
    for path in (layout.folder / "blobs/sha256").iterdir():
        if path.read_bytes()[:2] == b"\x1f\x8b":
            path.write_bytes(path.read_bytes()[:-1] + b"!")
    doc = await yard.small("based", base=base)
    assert doc["phase"] == "failed" and "damaged" in doc["reason"]


async def test_a_python_that_the_base_has_not(yard: Yard, layout: Layout) -> None:
    base = layout.tag(layout.image(layer(DEBIAN, LINKS)))
    doc = await yard.small("based", base=base, python="3.13")
    assert doc["phase"] == "failed" and "has no Python 3.13; what it has under bin/: 3.11" in doc["reason"]


async def test_a_base_without_the_c_plus_plus_library_is_warned_of(yard: Yard, layout: Layout) -> None:
    doc = await yard.small("based", base=layout.tag(layout.image(layer({"usr/bin/python3.11": b""}))))
    log = (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()
    assert doc["phase"] == "ready" and "warning" in log and "libstdc++" in log


@pytest.mark.parametrize(("text", "url", "repo", "version"), [
    ("docker.io/python:3.11-slim", "oci://docker.io", "library/python", "3.11-slim"),
    ("docker.io/me/python", "oci://docker.io", "me/python", "latest"),
    ("127.0.0.1:5000/a/b:1", "oci://127.0.0.1:5000", "a/b", "1"),
    ("localhost/x", "oci://localhost", "x", "latest"),
    ("[::1]:5000/x", "oci://[::1]:5000", "x", "latest"),
    (f"r.example/x:1@sha256:{'a' * 64}", "oci://r.example", "x", f"sha256:{'a' * 64}"),
    ("oci://registry:5000/x:1?tls=off", "oci://registry:5000?tls=off", "x", "1"),
    ("oci-layout:///var/base", "oci-layout:///var/base", "base", "latest"),
    ("oci-layout:///var/base:3.11", "oci-layout:///var/base", "base", "3.11"),
    (f"oci-layout:///var/base@sha256:{'a' * 64}", "oci-layout:///var/base", "base", f"sha256:{'a' * 64}"),
])
def test_references(text: str, url: str, repo: str, version: str) -> None:
    found = bases.reference(text)
    assert (found.url, found.repo, found.version) == (url, repo, version)


@pytest.mark.parametrize("text", ["", "x", "x/y", "r.example/", "r.example/x:", "r.example/x@sha256:1", "a b.c/x",
                                  "r.example/x\n", "u@r.example/x", "file:///x", "oci-layout:///x?y=1"])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(Invalid):
        bases.reference(text)


@pytest.mark.parametrize(("files", "env", "wanted", "found"), [
    ({"usr/bin/python3.11": "", "usr/local/bin/python3.12": ""}, (), None, ("3.12", "/usr/local/bin/python3.12")),
    ({"usr/bin/python3.11": "", "usr/local/bin/python3.12": ""}, (), "3.11", ("3.11", "/usr/bin/python3.11")),
    ({"usr/bin/python3.11": "", "usr/bin/python3.12": "", "usr/bin/python3": "python3.11"}, (), None,
     ("3.11", "/usr/bin/python3.11")),
    ({"usr/bin/python3.11": "", "usr/bin/python3.12": "", "usr/bin/python3": "/usr/bin/python3.9"}, (), None,
     ("3.12", "/usr/bin/python3.12")),
    ({"usr/bin/python3.9": "", "opt/conda/bin/python3.12": ""}, ("PATH=/opt/conda/bin:/usr/bin",), None,
     ("3.12", "/opt/conda/bin/python3.12")),
    ({"usr/bin/python3.9": "", "opt/py/bin/python3.11": ""}, (), None, ("3.11", "/opt/py/bin/python3.11")),
])
def test_which_python(files: dict[str, str], env: tuple[str, ...], wanted: str | None, found: tuple[str, str]) -> None:
    assert bases.interpreter(files, env, wanted, "x") == found


def test_layers_take_away_what_lies_below() -> None:
    seen = bases.together([
        Files({"usr/bin/python3.11": "", "opt/a/bin/python3.12": ""}),
        Files({"opt/b/bin/python3.13": ""}, ["usr/bin/python3.11", "opt/a/"]),
        Files({"usr/bin/python3.11": ""}, ["opt/b"])])
    assert seen == {"usr/bin/python3.11": ""}
    with pytest.raises(BuildFailed):
        bases.chosen([], "linux/amd64")


async def test_a_layout_of_another_tool_is_only_read(tmp_path: Path, layout: Layout) -> None:
    layout.tag(layout.image(layer(DEBIAN)), name="3.11")
    before = sorted(path.name for path in layout.folder.iterdir())
    store = LayoutImages(layout.folder)
    assert await store.get_manifest("any", "3.11") is not None and await store.get_manifest("any", "3.12") is None
    assert sorted(path.name for path in layout.folder.iterdir()) == before
