"""Images on the command line: whose word they are, and ways out."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.yard import Yard, until

from .test_commands import fails

pytestmark = pytest.mark.slow  # a real yard


@pytest.fixture(scope="session")
def signed(live: Yard, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image without wheels."""
    folder = tmp_path_factory.mktemp("signed")
    (folder / "score.py").write_text("def run(data):\n    return data\n")
    (folder / "lock.txt").write_text("")
    built = live.cli("images", "build", "signed", "--score", str(folder / "score.py"), "--lock",
                     str(folder / "lock.txt"), "-o", "json")
    return str(json.loads(built.stdout)["id"])


def test_the_key_and_what_it_verifies(live: Yard, signed: str, tmp_path: Path) -> None:
    pem = live.cli("images", "key").stdout
    assert pem.startswith("-----BEGIN PUBLIC KEY-----\n") and pem.endswith("-----END PUBLIC KEY-----\n")
    known = json.loads(live.cli("images", "key", "-o", "json").stdout)
    assert known["pem"] == pem and known["algorithm"] == "ed25519"
    (tmp_path / "yard.pub").write_text(pem)
    lines = live.cli("images", "verify", signed, "--key", str(tmp_path / "yard.pub")).stdout.splitlines()
    assert len(lines) == 6 and all(line.startswith("ok ") for line in lines), lines
    found = yaml.safe_load(live.cli("images", "verify", "signed", "-o", "yaml").stdout)
    assert found["verified"] is True and found["key"] == known["id"] and found["image"] == signed


def test_what_lies_beside_an_image_is_printed_byte_for_byte(live: Yard, signed: str) -> None:
    for what in ("sbom", "provenance", "lock"):
        assert live.cli("images", what, signed).stdout.encode() == live.call("GET", f"/v1/images/{signed}/{what}").body
    assert json.loads(live.cli("images", "sbom", "signed").stdout)["bomFormat"] == "CycloneDX"
    assert "there is no image" in fails(live, "images", "lock", "nothing:1")


def test_what_does_not_verify_ends_with_1(live: Yard, signed: str, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from modelyard.core.attest import told

    (tmp_path / "other.pub").write_text(told(Ed25519PrivateKey.generate().public_key()).pem)
    done = live.cli("images", "verify", signed, "--key", str(tmp_path / "other.pub"), check=False)
    assert done.returncode == 1 and "WRONG  signature  the provenance is not signed by" in done.stdout
    assert done.stderr == f"error: {signed} is not what it says: 1 of 2 findings are wrong\n"
    (tmp_path / "none").write_text("x")
    assert "holds no public key" in fails(live, "images", "verify", signed, "--key", str(tmp_path / "none"))
    fails(live, "images", "verify", signed, "--key", str(tmp_path / "absent"), code=2)
    assert "there is no image" in fails(live, "images", "verify", "nothing:1")


def test_ways_out(live: Yard, signed: str, tmp_path: Path) -> None:
    for option, first in (("--oci", "oci-layout"), ("--to", "Dockerfile")):
        to = tmp_path / f"{first}.tar"
        done = live.cli("images", "export", "signed", option, str(to))
        assert done.stdout == f"{to}\n" and "exporting signed" in done.stderr
        assert ("(FROM) is a guess" in done.stderr) is (option == "--to"), "it has no base"
        with tarfile.open(to) as archive:
            assert archive.getnames()[0] == first
    live.cli("images", "export", signed, cwd=tmp_path)
    assert (tmp_path / f"{signed.replace(':', '-')}.tar").is_file()
    assert "has no base" in fails(live, "images", "export", signed, "--docker", str(tmp_path / "d.tar"))
    assert "give one of" in fails(live, "images", "export", signed, "--oci", "a", "--to", "b", code=2)
    assert not (tmp_path / "d.tar").exists()


def test_an_image_is_tagged_changed_and_goes_with_its_last_deployment(live: Yard, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def run(data):\n    return data\n")
    (tmp_path / "lock.txt").write_text("")

    def said(*args: str) -> dict[str, Any]:
        return dict(json.loads(live.cli("images", *args, "-o", "json").stdout))

    files = ("--score", str(tmp_path / "score.py"), "--lock", str(tmp_path / "lock.txt"))
    assert said("build", "brief", *files, "--auto-delete", "--tag", "old=1")["auto_delete"] is True
    assert said("tag", "brief:1", "stage=trial", "old-")["tags"] == {"stage": "trial"}
    changed = said("update", "brief:1", "--property", "reviewed=yes", "--description", "short", "--no-auto-delete")
    assert (changed["tags"], changed["properties"]) == ({"stage": "trial"}, {"reviewed": "yes"})
    assert (changed["description"], changed["auto_delete"]) == ("short", False)
    assert "cannot change" in fails(live, "images", "update", "brief:1", "--property", "reviewed=no")
    fails(live, "images", "tag", "brief:1", "novalue", code=2)
    live.cli("deployments", "create", "brief", "--image", "brief:1", "--no-wait")
    kept = said("update", "brief", "--auto-delete")
    assert kept["auto_delete"] is True and kept["properties"] == {"reviewed": "yes"}, "what was not named stays"
    live.cli("deployments", "delete", "brief")
    until(lambda: live.call("GET", "/v1/images/brief:1").status == 404, 60, why="the image went along")


def test_gc_shows_first_and_takes_then(live: Yard, signed: str, tmp_path: Path) -> None:
    stray = live.data / "images" / "blobs" / "sha256" / ("0" * 64)
    stray.write_bytes(b"x" * 1234)
    os.utime(stray, (0, 0))
    shown = live.cli("gc")
    assert "1.2 kB" in shown.stdout and "0" * 64 in shown.stdout and stray.exists()
    assert "to be freed: modelyard gc --yes" in shown.stderr
    assert {"kind": "blob", "name": "0" * 64, "size": 1234} in json.loads(live.cli("gc", "-o", "json").stdout)
    assert "freed" in live.cli("gc", "--yes").stderr and not stray.exists()
    assert live.cli("gc").stderr == "nothing there\n"
    assert live.cli("images", "verify", signed).returncode == 0
    assert "is not a data folder" in fails(live, "gc", "--data", str(tmp_path))
    fails(live, "gc", "--older-than", "0", code=2)


def test_show_tells_what_the_models_take_and_a_line_to_try(live: Yard, tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("")
    torch = Path(__file__).parents[1] / "golden" / "torch" / "script.pt"
    (tmp_path / "said.json").write_text(json.dumps({"inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]}, {"name": "bias", "datatype": "FP32", "shape": [-1, 1]}]}))
    live.cli("models", "register", "shown", str(torch), "--signature", f"@{tmp_path / 'said.json'}",
             "--sample", '{"x": [[1, 2]], "bias": [[3]]}')
    live.cli("images", "build", "shown", "--model", "shown", "--lock", str(tmp_path / "lock.txt"))
    shown = live.cli("images", "show", "shown").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["shown:1", "takes", "x", "FP32", "[-1,", "2]", "-"] in rows
    assert ["-", "gives", "output-1", "-", "-", "-"] in rows
    assert shown.splitlines()[-1] == \
        """try     modelyard score DEPLOYMENT --data '{"x": [[1, 2]], "bias": [[3]]}'"""
    whole = json.loads(live.cli("images", "show", "shown", "-o", "json").stdout)
    assert whole["samples"] == {"shown:1": {"x": [[1, 2]], "bias": [[3]]}}
    assert yaml.safe_load(live.cli("images", "show", "shown", "-o", "yaml").stdout)["signatures"] == whole["signatures"]
    assert "is not JSON" in fails(live, "models", "register", "shown", str(torch), "--sample", "{", code=2)
