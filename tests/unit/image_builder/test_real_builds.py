"""Builds with wheels from the package index: an iris classifier served by its flavour, unpacked and imported."""

import asyncio
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from modelyard.image_builder import uv
from modelyard.image_builder.build import BUILD
from modelyard.image_builder.locks import read_lock
from modelyard.image_builder.log import BuildLog

from .conftest import SCORE, Yard, check_bill, running

pytestmark = pytest.mark.slow
PROBE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("launch", {launch!r})
launch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launch)
launch.prepare({home!r})
import grpc, numpy, sklearn, skops.io
import modelyard.scoring
from importlib.metadata import version, files
assert all(m.__file__.startswith({root!r}) for m in (grpc, numpy, sklearn, skops.io, modelyard.scoring)), sys.path
assert files("scikit-learn")
model = skops.io.load({model!r}, trusted=skops.io.get_untrusted_types(file={model!r}))
print(version("scikit-learn"), model.predict([[5.1, 3.5, 1.4, 0.2]])[0])
"""


@pytest.fixture(scope="module")
def iris() -> tuple[bytes, str]:
    """A classifier as skops writes it, and the version of scikit-learn that made it."""
    import sklearn
    import skops.io
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    x, y = load_iris(return_X_y=True)
    return skops.io.dumps(LogisticRegression(max_iter=500).fit(x, y)), sklearn.__version__


async def build(yard: Yard, iris: tuple[bytes, str], **spec: object) -> dict:
    data, version = iris
    await yard.register("iris", data, framework="scikit-learn", framework_version=version, filename="model.skops")
    doc = await yard.over((await yard.post(**{"name": "iris-scorer", "models": ["iris"], **spec}))["id"])
    log = (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()
    print(log)
    assert doc["phase"] == "ready", log
    return doc


async def every_package_is_told(yard: Yard, bill: dict) -> None:
    """Each line of the lock, with the hash of the one wheel that was taken, and a licence."""
    told = {c["name"].lower().replace("_", "-"): c for c in bill["components"] if c["type"] == "library"}
    lock = read_lock((await yard.call("GET", "/v1/images/again/lock")).raw.decode())[0]
    assert {"numpy", "grpcio", "skops", "scikit-learn"} <= told.keys() == {pin.name for pin in lock.pins}
    assert any(len(pin.hashes) > 1 for pin in lock.pins)
    for pin in lock.pins:
        one = told[pin.name]
        assert one["purl"] == f"pkg:pypi/{pin.name}@{one['version']}"
        assert one.get("licenses") or pin.name == "skops", one  # whose metadata only names a file
        assert f"sha256:{one['hashes'][0]['content']}" in pin.hashes
    assert check_bill(bill) is None


async def unpack(yard: Yard, root: Path, repo: str, tag: str) -> None:
    """As any OCI tool would: layer over layer."""
    manifest = json.loads((await yard.images.images.get_manifest(repo, tag))[0])
    for layer in manifest["layers"]:
        raw = b"".join([chunk async for chunk in yard.images.images.get_blob(repo, layer["digest"])])
        if layer["mediaType"].endswith("gzip"):
            raw = gzip.decompress(raw)
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            await asyncio.to_thread(archive.extractall, root, filter="data")


async def test_a_flavour_image_is_whole_and_the_same_in_every_place(
        tmp_path: Path, iris: tuple[bytes, str], monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for place, cache in (("here", "one"), ("there", "two"), ("with what was made here", "one")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        async with running(tmp_path / place) as yard:
            doc = await build(yard, iris)
            digests.append(doc["digest"])
            first = (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()
            assert ("from the user's cache" in first and "uv:" not in first) == place.startswith("with")
            if place != "here":
                continue
            again = await build(yard, iris, name="again", models=["iris:1"])
            assert again["digest"] == digests[0]
            log = (await yard.call("GET", "/v1/images/again/log")).raw.decode()
            assert "layers of an earlier build" in log and "uv:" not in log
            bill = json.loads((await yard.call("GET", "/v1/images/again/sbom")).raw)
            await every_package_is_told(yard, bill)
            await unpack(yard, tmp_path / "root", "iris-scorer", "1")
    assert len(set(digests)) == 1
    root = tmp_path / "root"
    stray = [p for p in root.rglob("*") if p.suffix == ".pyc" or p.name in ("INSTALLER", "REQUESTED", "uv_cache.json")]
    assert stray == [] and list(root.glob("opt/env/lib/*/site-packages/bin")) == []
    home = root / "opt" / "modelyard"
    code = PROBE.format(launch=str(home / "launch.py"), home=str(home), root=str(root),
                        model=str(home / "models" / "iris" / "1" / "model.skops"))
    python = getattr(sys, "_base_executable", sys.executable)
    done = await asyncio.to_thread(subprocess.run, [python, "-I", "-S", "-c", code], capture_output=True, text=True,
                                   timeout=60, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [iris[1], "0"]


async def test_requirements_that_nobody_offers(yard: Yard) -> None:
    score = await yard.upload(SCORE)
    spec = {"name": "wishful", "score": score, "requirements": ["no-such-package-of-anybody-4711==1.0"]}
    doc = await yard.over((await yard.post(**spec))["id"])
    assert doc["phase"] == "failed" and "no-such-package-of-anybody-4711" in doc["reason"], doc
    log = (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()
    assert "uv:" in log and "Traceback" not in log
    spec |= {"requirements": ["numpy==2.0.0", "numpy==2.1.0"]}
    doc = await yard.over((await yard.post(**spec))["id"])
    assert doc["phase"] == "failed" and "numpy" in doc["reason"]


async def test_constraints_bound_and_install_nothing(yard: Yard, tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "log")
    lock = await uv.resolve(["numpy>=2"], ["numpy<2.3", "six<1"], "3.11", "linux/amd64", tmp_path, log)
    (pin,) = lock.pins
    assert pin.name == "numpy" and pin.text.startswith("numpy==2.2.")
    doc = await yard.over((await yard.post(
        name="bounded", score=await yard.upload(SCORE), constraints=["numpy<1.5"]))["id"])
    assert doc["phase"] == "failed" and "numpy" in doc["reason"] and doc["constraints"] == ["numpy<1.5"], doc
    assert "within numpy<1.5" in (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw.decode()


async def test_without_an_index(yard: Yard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    doc = await yard.over((await yard.post(name="alone", score=await yard.upload(SCORE)))["id"])
    assert doc["phase"] == "failed" and "the package index does not answer" in doc["reason"], doc


async def test_deleting_stops_a_build(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv waits for an index that accepts and never answers; deleting the image ends it."""
    silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3600), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{port}/simple")
    doc = await yard.post(name="stuck", score=await yard.upload(SCORE), requirements=["six"])
    while b"requirements:" not in (await yard.call("GET", f"/v1/images/{doc['id']}/log")).raw:
        await asyncio.sleep(0.05)
    answer = await yard.call("DELETE", "/v1/images/stuck:1")
    assert answer.status == 202 and answer.json["phase"] == "cancelled"
    await asyncio.wait_for(yard.gone("stuck:1"), 5)
    silent.close()


async def test_what_waits_in_the_queue_is_cancelled_and_never_built(
        yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """All builders are held up by a silent index; the one behind them is deleted before its turn."""
    silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3600), "127.0.0.1", 0)
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}/simple")
    score = await yard.upload(SCORE)
    for n in range(BUILD.parallel):
        await yard.post(name=f"stuck-{n}", score=score, requirements=[f"six=={n}"])

    async def all_begun() -> bool:
        return len((await yard.call("GET", "/v1/images?phase=building")).json["items"]) == BUILD.parallel

    await yard.until(all_begun)
    await yard.post(name="behind", score=score, lock=await yard.upload(b""))
    answer = await yard.call("DELETE", "/v1/images/behind:1")
    assert answer.status == 202 and answer.json["phase"] == "cancelled"
    for n in range(BUILD.parallel):
        await yard.call("DELETE", f"/v1/images/stuck-{n}:1")
    await yard.gone("behind:1")
    topics = {event.topic for event in await yard.events() if event.subject == "behind:1"}
    assert topics == {"image.requested", "image.deleted"}
    silent.close()
