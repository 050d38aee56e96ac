"""Where packages come from: private indexes, folders, what is in the cache; for another machine; and what goes wrong.
The wheels are the tests' own, of a few bytes each; uv is real."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from modelyard.image_builder.locks import read_lock
from tests.wheelhouse import Index, house, locked, sha256, wheel

from .conftest import SCORE, Yard, running
from .test_bases import DEBIAN, LINKS, Layout, layer

SECRET = "hunter2-of-the-index"
LOGIN = f"yard:{SECRET}"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known from elsewhere."""
    for name, folder in (("XDG_CACHE_HOME", "cache"), ("UV_CACHE_DIR", "uv"), ("HOME", "home")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.delenv("UV_INDEX_URL", raising=False)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For both platforms, but ``lonely``, which has a wheel for one of them."""
    folder = house(tmp_path_factory.mktemp("wheels"), minor=11)
    wheel(folder, "tiny")
    wheel(folder, "picky", requires=["tiny<1"])
    wheel(folder, "lonely", tag="cp311-cp311-manylinux_2_28_x86_64")
    wheel(folder, "newer", tag="cp312-cp312-manylinux_2_28_x86_64")
    return folder


@pytest.fixture
def folder(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """They are there without an index."""
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(wheels))
    return wheels


async def build(yard: Yard, *requirements: str, **spec: Any) -> dict[str, Any]:
    """On a base with Python 3.11, for whatever machine."""
    wanted = {"requirements": list(requirements)} if requirements else {}
    platform = spec.setdefault("platform", "linux/amd64")
    spec = {"name": "tiny", "score": await yard.upload(SCORE), "base": base(yard.images.data, platform), **wanted,
            **spec}
    doc = await yard.over((await yard.post(**spec))["id"])
    print((await said(yard, doc))["log"])
    return doc


def base(folder: Path, platform: str) -> str:
    machine = platform.partition("/")[2]
    layout = Layout(folder / f"base-{os.urandom(4).hex()}")
    return layout.tag(layout.image(layer(DEBIAN, LINKS), machine=machine))


async def said(yard: Yard, doc: dict[str, Any]) -> dict[str, str]:
    """All that is told of an image."""
    found = {}
    for what in ("log", "lock", "sbom", "provenance"):
        answer = await yard.call("GET", f"/v1/images/{doc['id']}/{what}")
        found[what] = answer.raw.decode() if answer.status == 200 else ""
    return {**found, "document": json.dumps(doc)}


async def files(yard: Yard, doc: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Every file of an image, and its config."""
    images, out = yard.images.images, {}

    async def blob(digest: str) -> bytes:
        return b"".join([chunk async for chunk in images.get_blob(doc["name"], digest)])

    raw, _ = await images.get_manifest(doc["name"], str(doc["version"])) or (b"", "")
    manifest = json.loads(raw)
    for part in manifest["layers"]:
        data = await blob(part["digest"])
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)) as archive:
            out |= {m.name: file.read() for m in archive if m.isfile() and (file := archive.extractfile(m))}
    return out, json.loads(await blob(manifest["config"]["digest"]))


@pytest.mark.parametrize("way", ["url", "netrc", "named"])
async def test_a_private_index_keeps_its_password(
        yard: Yard, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    with Index(wheels, LOGIN) as index:
        if way == "url":
            monkeypatch.setenv("UV_DEFAULT_INDEX", index.url.replace("://", f"://{LOGIN}@"))
        elif way == "named":
            monkeypatch.setenv("UV_DEFAULT_INDEX", f"own={index.url}")
            monkeypatch.setenv("UV_INDEX_OWN_USERNAME", "yard")
            monkeypatch.setenv("UV_INDEX_OWN_PASSWORD", SECRET)
        else:
            netrc = tmp_path / "netrc"
            netrc.write_text(f"machine 127.0.0.1 login yard password {SECRET}\n")
            monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
            monkeypatch.setenv("NETRC", str(netrc))
        doc = await build(yard, "tiny")
        assert doc["phase"] == "ready", doc["reason"]
        assert "/simple/tiny/" in index.asked
        told = await said(yard, doc)
        assert "tiny==1.0" in told["lock"] and "tiny" in told["sbom"]
        for what, text in {**told, "events": str(await yard.events())}.items():
            assert SECRET not in text and index.host not in text, what
        kept = [path for path in (yard.images.data / "image-builder").rglob("*") if path.is_file()]
        assert kept and not [path for path in kept if SECRET.encode() in path.read_bytes()]


async def test_a_password_that_an_index_does_not_take(
        yard: Yard, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Index(wheels, LOGIN) as index:
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url.replace("://", f"://yard:{SECRET}-old@"))
        doc = await build(yard, "tiny")
    assert doc["phase"] == "failed" and index.refused and "lack of valid authentication credentials" in doc["reason"]
    assert SECRET not in "".join((await said(yard, doc)).values())


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
async def test_an_image_for_another_machine(yard: Yard, folder: Path, machine: str) -> None:
    platform = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}[machine]
    doc = await build(yard, "tiny", platform=platform)
    assert doc["phase"] == "ready", doc["reason"]
    there, config = await files(yard, doc)
    assert (config["os"], config["architecture"]) == ("linux", platform.partition("/")[2])
    native = {name: data for name, data in there.items() if name.endswith("native.so")}
    assert len(native) == 2 and set(native.values()) == {machine.encode()}
    tags = [data for name, data in there.items() if name.endswith("/WHEEL") and "numpy" in name]
    assert tags and b"manylinux_2_28_" + machine.encode() in tags[0]
    told = await said(yard, doc)
    bill = {c["name"]: c for c in json.loads(told["sbom"])["components"]}
    (own,) = folder.glob(f"numpy-*{machine}.whl")
    assert bill["numpy"]["hashes"][0]["content"] == sha256(own)
    assert {pin.name for pin in read_lock(told["lock"])[0].pins} >= {"numpy", "grpcio", "tiny"}


@pytest.mark.parametrize(("wanted", "spec", "told"), [
    (["lonely"], {"platform": "linux/arm64"}, [
        "for linux/arm64 and Python 3.11", "lonely==1.0 has no wheels", "manylinux_2_28_aarch64",
        "(Wheels are available for `lonely` (v1.0) on the following platform: `manylinux_2_28_x86_64`)"]),
    (["newer"], {}, ["for linux/amd64 and Python 3.11", "newer==1.0 has no wheels", "with the following Python"]),
    (["picky", "tiny==1.0"], {}, ["resolving the requirements", "tiny<1", "you require tiny==1.0", "unsatisfiable"]),
    (["nobody-has-it"], {}, ["nobody-has-it", "unsatisfiable"]),
])
async def test_what_cannot_be_resolved_is_told_in_its_own_words(
        yard: Yard, wheels: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[str], spec: dict[str, str],
        told: list[str]) -> None:
    with Index(wheels) as index:
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
        doc = await build(yard, *wanted, **spec)
    assert doc["phase"] == "failed" and len(doc["reason"]) < 1200
    assert not [part for part in told if part not in doc["reason"]], doc["reason"]
    assert "Traceback" not in (await said(yard, doc))["log"]


async def test_a_lock_for_another_python_than_the_base_has(yard: Yard, folder: Path) -> None:
    """The base decides the Python; what is locked must fit."""
    lock = await yard.upload(locked(*folder.glob("*-any.whl"), *folder.glob("*x86_64.whl")).encode())
    doc = await build(yard, lock=lock)
    assert doc["phase"] == "failed" and doc["python"] is None
    for part in ("installing the packages for linux/amd64 and Python 3.11 failed: Because newer==1.0", "has no wheels"):
        assert part in doc["reason"], doc["reason"]


async def test_a_wheel_that_is_not_what_was_locked(
        yard: Yard, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, evil = wheel(tmp_path / "fine", "evil"), wheel(tmp_path / "evil", "evil", files={"evil.py": b"import os\n"})
    lock = locked(fine, *(w for w in (*wheels.glob("*x86_64.whl"), *wheels.glob("*any.whl"))
                          if w.name.partition("-")[0] not in ("newer", "picky")))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", f"{wheels},{evil.parent}")
    doc = await build(yard, lock=await yard.upload(lock.encode()))
    assert doc["phase"] == "failed" and "evil" in doc["reason"] and "ismatch" in doc["reason"], doc["reason"]
    assert sha256(evil) in doc["reason"] and await yard.images.images.get_manifest("tiny", "1") is None
    monkeypatch.setenv("UV_FIND_LINKS", f"{wheels},{fine.parent}")
    assert (await build(yard, lock=await yard.upload(lock.encode())))["phase"] == "ready"


@pytest.mark.slow
async def test_a_stored_lock_needs_no_index(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the index off, a rebuild from the lock is the same image: from layers of before, and where those are gone
    as well from the wheels in uv's cache. Nothing is resolved."""
    spec = {"base": base(tmp_path, "linux/amd64")}
    with Index(wheels) as index:
        monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
        async with running(tmp_path / "first") as yard:
            doc = await build(yard, "tiny", **spec)
            lock = (await said(yard, doc))["lock"].encode()
    assert doc["phase"] == "ready" and index.asked
    for place, caches in (("second", "cache"), ("third", "none")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / caches))
        async with running(tmp_path / place) as yard:
            again = await build(yard, lock=await yard.upload(lock), **spec)
            log = (await said(yard, again))["log"]
            assert (again["phase"], again["digest"]) == ("ready", doc["digest"]), log
            assert "resolving" not in log and "requirements:" not in log
            assert ("uv's cache" in log) == (place == "third")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty too"))
    async with running(tmp_path / "fourth") as yard:
        again = await build(yard, lock=await yard.upload(lock), **spec)
    assert again["phase"] == "failed" and "the package index does not answer" in again["reason"]


@pytest.mark.slow
async def test_files_that_two_packages_have(yard: Yard, folder: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name and with other contents: the last package's is in the image, every time."""
    own = tmp_path / "own"
    for name, size in (("aaa", 400_000), ("bbb", 10), ("ccc", 10), ("ddd", 10)):
        wheel(own, name, files={f"{name}.py": b"", "LICENSE": name.encode() * size, "tests/__init__.py": name.encode()})
    monkeypatch.setenv("UV_FIND_LINKS", f"{folder},{own}")
    stands, digests = base(tmp_path, "linux/amd64"), set()
    for number in range(4):
        for name in ("XDG_CACHE_HOME", "UV_CACHE_DIR"):
            monkeypatch.setenv(name, str(tmp_path / f"{name}-{number}"))
        async with running(tmp_path / f"yard-{number}") as fresh:
            doc = await build(fresh, "aaa", "bbb", "ccc", "ddd", base=stands)
            digests.add(doc["digest"])
            there, _ = await files(fresh, doc)
        shared = {name: data for name, data in there.items() if name.endswith(("/LICENSE", "tests/__init__.py"))}
        assert len(shared) == 2 and set(shared.values()) == {b"ddd", b"ddd" * 10}
    assert len(digests) == 1
