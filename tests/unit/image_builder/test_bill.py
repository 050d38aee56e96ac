"""What an image says of itself: the bill of materials."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.image_builder.environment import wheel_of
from modelyard.image_builder.locks import read_lock
from modelyard.image_builder.wheels import Distribution, distributions

from .conftest import Yard, check_bill, running

HASHES = [f"{n:064x}" for n in range(4)]


async def bill_of(yard: Yard, id: str) -> Any:
    answer = await yard.call("GET", f"/v1/images/{id}/sbom")
    assert answer.headers["Content-Type"] == "application/vnd.cyclonedx+json"
    return json.loads(answer.raw)


async def test_it_names_models_server_score_and_image(yard: Yard) -> None:
    await yard.register("iris", b"weights", framework="pytorch", framework_version="2.1")
    doc = await yard.small(models=["iris"])
    bill = await bill_of(yard, doc["id"])
    assert check_bill(bill) is None
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    subject = bill["metadata"]["component"]
    assert subject["hashes"][0]["content"] == doc["digest"].removeprefix("sha256:")
    assert {"name": "modelyard:lock", "value": doc["lock_digest"]} in subject["properties"]
    parts = {c["name"]: c for c in bill["components"]}
    assert parts.keys() == {"iris", "modelyard-scoring-server", "scoring file"}
    model = (await yard.call("GET", "/v1/models/iris:1")).json
    assert parts["iris"]["type"] == "machine-learning-model"
    assert parts["iris"]["hashes"] == [{"alg": "SHA-256", "content": model["artifact"].removeprefix("sha256:")}]
    code = parts["modelyard-scoring-server"]["hashes"][0]["content"]
    manifest = json.loads((await yard.images.images.get_manifest("tiny", "1"))[0])
    assert f"sha256:{code}" in {layer["digest"] for layer in manifest["layers"]}
    assert bill["dependencies"][0]["dependsOn"] == sorted(c["bom-ref"] for c in bill["components"])


async def test_an_image_explains_itself_by_its_labels(yard: Yard) -> None:
    await yard.register("iris", b"weights", framework="pytorch", framework_version="2.1")
    doc = await yard.small(models=["iris"])
    store = yard.images.images
    manifest = json.loads((await store.get_manifest("tiny", "1"))[0])
    config = json.loads(b"".join([c async for c in store.get_blob("tiny", manifest["config"]["digest"])]))["config"]
    said = config["Labels"]
    model = (await yard.call("GET", "/v1/models/iris:1")).json
    assert json.loads(said["io.modelyard.models"]) == [
        {"artifact": model["artifact"], "framework": "pytorch", "framework_version": "2.1", "id": "iris:1"}]
    assert (said["io.modelyard.lock"], said["io.modelyard.score"]) == (doc["lock_digest"], doc["score"])
    assert said["io.modelyard.python"] == doc["python"] and "iris:1" in said["org.opencontainers.image.description"]
    assert said["org.opencontainers.image.title"] == "iris:1" and "sha256-" in said["io.modelyard.sbom"]
    assert not any(name.startswith("org.opencontainers.image.base") for name in said)


async def test_the_check_itself_can_fail(yard: Yard) -> None:
    bill = await bill_of(yard, (await yard.small())["id"])
    for spoil in ("bomFormat", "components"):
        assert check_bill({**copy.deepcopy(bill), spoil: "nothing of the kind"}) is not None


async def test_it_is_the_same_in_two_places(tmp_path: Path) -> None:
    found = []
    for place in ("one", "two"):
        async with running(tmp_path / place) as yard:
            await yard.register("iris")
            doc = await yard.small(models=["iris"])
            found.append((await yard.call("GET", f"/v1/images/{doc['id']}/sbom")).raw)
    assert found[0] == found[1]


async def test_there_is_none_before_the_image_is_ready(yard: Yard) -> None:
    bad = await yard.small(score=await yard.upload(b"x"))
    for what in ("sbom", "lock"):
        assert (await yard.call("GET", f"/v1/images/{bad['id']}/{what}")).status == 404


async def test_the_lock_is_shown(yard: Yard) -> None:
    text = f"six==1.17.0 --hash=sha256:{HASHES[0]}\n"
    doc = await yard.over((await yard.post(name="locked", lock=await yard.upload(text.encode()), models=[
        await yard.register("iris")], score=await yard.upload(b"def run(d): return d")))["id"])
    assert doc["phase"] == "failed" and "which the scoring server needs" in doc["reason"]
    assert "grpcio" in doc["reason"] and "h2corn" not in doc["reason"], "a lock of before it is as good as it was"
    good = await yard.small()
    assert (await yard.call("GET", f"/v1/images/{good['id']}/lock")).raw == b""


def installed(root: Path, metadata: str, wheel: str = "Tag: py3-none-any\n") -> Distribution:
    info = root / "thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: Thing\nVersion: 1.0\n{metadata}")
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\n{wheel}")
    (info / "RECORD").write_text("thing-1.0.dist-info/METADATA,,\n")
    return distributions(root, "3.11")[0]


@pytest.mark.parametrize(("metadata", "told"), [
    ("License-Expression: MIT AND Apache-2.0\n", {"expression": "MIT AND Apache-2.0"}),
    ("Classifier: License :: OSI Approved :: BSD License\n", {"license": "BSD License"}),
    ("License: BSD-3-Clause\n", {"license": "BSD-3-Clause"}),
    ("License: MIT License\n        Copyright 2001 …\n", {"license": "MIT License"}),
    ("License: " + "all on one line " * 20 + "\n", {"license": ("all on one line " * 20)[:120]}), ("", {})])
def test_licences_as_packages_have_them(tmp_path: Path, metadata: str, told: dict[str, str]) -> None:
    assert installed(tmp_path, metadata).told("") == {"name": "Thing", "version": "1.0", **told}


def test_the_wheel_that_was_taken(tmp_path: Path) -> None:
    one = installed(tmp_path, "", "Tag: cp311-cp311-manylinux_2_17_x86_64\nTag: cp311-cp311-manylinux2014_x86_64\n")
    lock, _ = read_lock("thing==1.0 " + " ".join(f"--hash=sha256:{h}" for h in HASHES))
    wheels = {"thing-1.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl": HASHES[1],
              "thing-1.0-cp310-abi3-manylinux_2_17_x86_64.whl": HASHES[2], "other-1.0-py3-none-any.whl": HASHES[3],
              "thing-1.0-py3-none-any.whl": "f" * 64, "not a wheel": HASHES[0]}
    assert wheel_of(one, lock, wheels) == f"sha256:{HASHES[1]}"
    assert wheel_of(one, lock, {}) == ""
    del wheels["thing-1.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"]
    wheels["thing-1.0-py2-none-any.whl"] = HASHES[1]
    assert wheel_of(one, lock, wheels) == ""  # two fit the name, neither the tags
    single, _ = read_lock(f"thing==1.0 --hash=sha256:{HASHES[0]}")
    assert wheel_of(one, single, {}) == f"sha256:{HASHES[0]}"
