"""Where an image comes from, and whose word that is: checked by libraries that are not ours as well."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from modelyard.core.attest import envelope, opened, public_keys, require, subject
from modelyard.core.errors import Invalid, Unavailable
from modelyard.image_builder.keys import signer
from modelyard.kernel.folder import prepare

from .conftest import Yard, running


async def key_of(yard: Yard) -> Any:
    answer = await yard.call("GET", "/v1/signing-key")
    assert answer.status == 200
    return answer.json


async def provenance_of(yard: Yard, id: str) -> Any:
    answer = await yard.call("GET", f"/v1/images/{id}/provenance")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/vnd.dsse.envelope.v1+json")
    return json.loads(answer.raw)


async def test_another_library_verifies_the_envelope(yard: Yard) -> None:
    doc, key = await yard.small(), await key_of(yard)
    given = Envelope.from_dict(await provenance_of(yard, doc["id"]))
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    theirs = SSlibKey.from_crypto(load_pem_public_key(key["pem"].encode()), keyid=key["id"])
    assert list(given.verify([theirs], 1)) == [key["id"]]
    given.payload += b" "
    with pytest.raises(VerificationError):
        given.verify([theirs], 1)


async def test_the_statement_is_in_toto_with_slsa_provenance(yard: Yard) -> None:
    await yard.register("iris", b"weights")
    doc = await yard.small(models=["iris"], env={"A": "b"})
    statement = opened(await provenance_of(yard, doc["id"]), public_keys((await key_of(yard))["pem"].encode()))
    Statement.copy_from_pb(ParseDict(statement, Statement([], "", {}).pb)).validate()
    ParseDict(statement["predicate"], Provenance())  # refuses what SLSA v1 does not know
    assert statement["subject"] == [{"name": "tiny:1", "digest": {"sha256": doc["digest"][7:]}}]
    definition, run = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    assert definition["externalParameters"]["models"] == ["iris:1"] and definition["externalParameters"]["env"]
    used = {m["name"]: m["digest"]["sha256"] for m in definition["resolvedDependencies"]}
    model = (await yard.call("GET", "/v1/models/iris:1")).json
    assert used["model"] == model["artifact"][7:] and used["score"] == doc["score"][7:]
    lock = (await yard.call("GET", "/v1/images/tiny:1/lock")).raw
    assert used["lock"] == doc["lock_digest"][7:] == hashlib.sha256(lock).hexdigest()
    bill = (await yard.call("GET", "/v1/images/tiny:1/sbom")).raw
    assert run["byproducts"][0]["digest"]["sha256"] == hashlib.sha256(bill).hexdigest()
    assert run["metadata"]["startedOn"] <= run["metadata"]["finishedOn"]


async def test_the_manifest_is_answered_byte_for_byte(yard: Yard) -> None:
    doc = await yard.small()
    answer = await yard.call("GET", f"/v1/images/{doc['id']}/manifest")
    assert f"sha256:{hashlib.sha256(answer.raw).hexdigest()}" == doc["digest"]
    assert answer.headers["Docker-Content-Digest"] == doc["digest"]
    bad = await yard.small(score=await yard.upload(b"x"))
    assert (await yard.call("GET", f"/v1/images/{bad['id']}/manifest")).status == 409
    assert (await yard.call("GET", f"/v1/images/{bad['id']}/provenance")).status == 404


async def test_both_documents_are_attached_to_the_image_and_go_with_it(yard: Yard) -> None:
    doc = await yard.small()
    tag, images = doc["digest"].replace(":", "-"), yard.images.images
    found = {}
    for entry in await yard.attached("tiny:1"):
        artifact = json.loads((await images.get_manifest("tiny", entry["digest"]))[0])
        assert artifact["subject"]["digest"] == doc["digest"]
        layer = artifact["layers"][0]["digest"]
        found[entry["artifactType"]] = b"".join([chunk async for chunk in images.get_blob("tiny", layer)])
    assert found == {kind: (await yard.call("GET", f"/v1/images/tiny:1/{what}")).raw for kind, what in (
        ("application/vnd.cyclonedx+json", "sbom"), ("application/vnd.dsse.envelope.v1+json", "provenance"))}
    again = await yard.small()
    assert again["digest"] == doc["digest"] and len(await yard.attached("tiny:2")) == 4
    await yard.call("DELETE", "/v1/images/tiny:1")
    await yard.gone("tiny:1")
    assert {e["annotations"]["io.modelyard.image"] for e in json.loads(
        (await images.get_manifest("tiny", tag))[0])["manifests"]} == {"tiny:2"}
    await yard.call("DELETE", "/v1/images/tiny:2")
    await yard.gone("tiny:2")
    assert await images.get_manifest("tiny", tag) is None
    folder = yard.images.data / "images" / "blobs" / "sha256"
    assert await asyncio.to_thread(lambda: list(folder.iterdir())) == []


@pytest.mark.parametrize("error", [Unavailable("away for now"), Invalid("no artifacts here")])
async def test_a_store_that_does_not_take_them_does_not_fail_the_image(
        yard: Yard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    """One that is away is asked again; of one that refuses the log tells."""
    put, asked = yard.images.images.put_manifest, 0

    async def refusing(repo: str, tag: str, manifest: bytes, media_type: str) -> str:
        nonlocal asked
        if tag.startswith("sha256-"):
            asked += 1
            if asked <= 2 or isinstance(error, Invalid):
                raise error
        return await put(repo, tag, manifest, media_type)

    monkeypatch.setattr(yard.images.images, "put_manifest", refusing)
    doc = await yard.small()
    assert doc["phase"] == "ready"
    if isinstance(error, Unavailable):
        assert len(await yard.attached("tiny:1")) == 2
    else:
        async def told() -> bool:
            return "cannot be attached to image tiny:1: no artifacts here" in caplog.text

        await yard.until(told)
    assert (await yard.call("GET", "/v1/images/tiny:1/provenance")).status == 200
    await yard.call("DELETE", "/v1/images/tiny:1")
    await yard.gone("tiny:1")


async def test_another_key_does_not_change_the_image(tmp_path: Path) -> None:
    """The key is made once, for its owner's eyes only; a yard that is given another one builds the same image."""
    seen = []
    for place in ("one", "two"):
        async with running(tmp_path / place) as yard:
            seen.append(((await yard.small())["digest"], (await key_of(yard))["id"]))
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]
    path = tmp_path / "one" / "signing.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with running(tmp_path / "one") as yard:
        assert (await key_of(yard))["id"] == seen[0][1]


def test_two_builders_sign_as_one_with_the_same_file(tmp_path: Path) -> None:
    """Made by another program, put there before the folder is used."""
    key = tmp_path / "given.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    ids = []
    for place in (tmp_path / "one", tmp_path / "two"):
        place.mkdir()
        (place / "signing.key").write_bytes(key.read_bytes())
        prepare(place)
        ids.append(asyncio.run(signer(place)).public.id)
    der = subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-outform", "DER"], check=True,
                         capture_output=True).stdout
    assert ids == [hashlib.sha256(der).hexdigest()] * 2


@pytest.mark.parametrize("text", ["", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
async def test_a_key_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "signing.key").write_text(text)
    with pytest.raises(Unavailable, match=r"signing\.key"):
        await signer(tmp_path)


async def test_what_is_refused(tmp_path: Path) -> None:
    mine, other = await signer(tmp_path), await signer(_folder(tmp_path / "other"))
    digest = "sha256:" + "1" * 64
    statement = {"_type": "https://in-toto.io/Statement/v1", "predicateType": "https://slsa.dev/provenance/v1",
                 "subject": [{"digest": {"sha256": "1" * 64}}]}
    good = mine.sign(json.dumps(statement).encode())
    assert subject(require(good, [other.public, mine.public], digest)) == digest
    turned = {**good, "payload": base64.b64encode(json.dumps(statement).encode() + b" ").decode()}
    forged = envelope(json.dumps(statement).encode(), mine.public.id, other._private.sign(b"anything"))
    for bad, keys, why in (
            (good, [other.public], "not signed by"), (good, [], "not signed by"), (turned, [mine.public], "not signed"),
            (forged, [mine.public], "not signed"), ({}, [mine.public], "not a DSSE envelope"),
            (None, [mine.public], "not a DSSE envelope"), ({**good, "signatures": []}, [mine.public], "not signed"),
            ({**good, "payloadType": "text/plain"}, [mine.public], "text/plain"),
            (mine.sign(b"[]"), [mine.public], "not SLSA"), (mine.sign(b"x"), [mine.public], "not JSON"),
            (mine.sign(json.dumps({**statement, "subject": []}).encode()), [mine.public], "not about one"),
            (mine.sign(json.dumps({**statement, "subject": [{"digest": {"sha256": "x"}}]}).encode()), [mine.public],
             "no digest")):
        with pytest.raises(Invalid, match=why) as caught:
            require(bad, keys, digest)
        assert caught.value.code == "unsigned"
    with pytest.raises(Invalid, match="is about"):
        require(good, [mine.public], "sha256:" + "2" * 64)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_public_keys_are_read_from_pem(tmp_path: Path) -> None:
    pem = asyncio.run(signer(tmp_path)).public.pem.encode()
    assert len(public_keys(b"a comment\n" + pem + b"\n" + pem)) == 2
    rsa = subprocess.run("openssl genrsa 2048 | openssl rsa -pubout", shell=True, check=True, capture_output=True)
    for bad in (b"", b"x", rsa.stdout, b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"):
        with pytest.raises(Invalid):
            public_keys(bad)
