"""What is wrong gets the documented status and says what to do; nothing half-made is left, and the yard goes on."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_journey import build, upload
from tests.e2e.yard import Answer, Yard, free_port, until

pytestmark = pytest.mark.slow

ZERO = "sha256:" + "0" * 64
EMPTY = "sha256:" + hashlib.sha256(b"").hexdigest()


def problem(answer: Answer, status: int, *words: str) -> dict[str, Any]:
    """The answer is problem+json with this status, and says these words somewhere."""
    assert answer.status == status, (answer.status, answer.body[:2000])
    assert answer.headers["content-type"].startswith("application/problem+json"), answer.headers
    body: dict[str, Any] = answer.json
    assert {"code", "detail"} <= set(body) and b"Traceback" not in answer.body
    for word in words:
        assert word in answer.body.decode(), (word, body)
    return body


@pytest.fixture(scope="module")
def artifact(yard: Yard) -> str:
    return upload(yard, b"def run(data):\n    return data\n")


@pytest.mark.parametrize(("fields", "words"), [
    ({"name": ""}, ["name"]),
    ({"name": "../etc/passwd"}, ["name"]),
    ({"name": "-x"}, ["starts with a letter or digit"]),
    ({"name": "x" * 256}, ["1-255"]),
    ({"name": "iris\n"}, ["name"]),
    ({"colour": "red"}, ["colour"]),
    ({"tags": {"n": 1}}, ["tags"]),
    ({"tags": ["a"]}, ["tags"]),
    ({"properties": {"accuracy": 0.97}}, ["properties"]),
    ({"framework": "abacus"}, ["framework", "scikit-learn"]),
    ({"framework_version": "1.0"}, ["framework_version needs framework"]),
    ({"artifact": "md5:123"}, ["digest"]),
    ({"artifact": ZERO}, [ZERO]),
    ({"name": "", "tags": 3, "colour": 1}, ["name", "tags", "colour"]),
])
def test_models_refused(yard: Yard, artifact: str, fields: dict[str, Any], words: list[str]) -> None:
    problem(yard.call("POST", "/v1/models", {"name": "iris", "artifact": artifact, **fields}), 422, *words)
    assert yard.call("GET", "/v1/models?name=iris").json["items"] == []


@pytest.mark.parametrize(("body", "kind", "status"), [
    (b"{", "application/json", 400),
    (b'{"name": NaN}', "application/json", 400),
    (b"name=iris", "application/x-www-form-urlencoded", 415),
    (b"<iris/>", "text/xml", 415),
    (b'{"name": "' + b"x" * 2_000_000 + b'"}', "application/json", 413),
])
def test_bodies_refused(yard: Yard, body: bytes, kind: str, status: int) -> None:
    problem(yard.call("POST", "/v1/models", body, headers={"content-type": kind}), status)


def test_digest_that_does_not_match(yard: Yard) -> None:
    problem(yard.call("PUT", f"/v1/artifacts/{ZERO}", b"something else"), 422, "digest")
    assert yard.call("HEAD", f"/v1/artifacts/{ZERO}").status == 404
    assert yard.blob_sizes().count(len(b"something else")) == 0


def test_cut_upload_leaves_nothing(yard: Yard) -> None:
    raw = os.urandom(3_000_000)
    digest = hashlib.sha256(raw).hexdigest()
    with socket.create_connection(("127.0.0.1", int(yard.url("registry").rpartition(":")[2]))) as wire:
        wire.sendall(f"PUT /v1/artifacts/sha256:{digest} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: "
                     f"application/octet-stream\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw[:1_000_000])
    cut = yard.call("HEAD", f"/v1/artifacts/sha256:{digest}")
    assert cut.status == 404 and cut.headers["upload-offset"] == "0"
    until(lambda: not [size for size in yard.blob_sizes() if size > 900_000], 10)
    assert upload(yard, raw) == f"sha256:{digest}"


@pytest.mark.parametrize(("framework", "filename"), [
    ("onnx", "model.onnx"), ("scikit-learn", "model.skops"), ("scikit-learn", "model.joblib")])
def test_file_that_is_not_what_it_claims(yard: Yard, framework: str, filename: str) -> None:
    digest = upload(yard, b"this is no model at all, however it is called")
    body = {"name": "liar", "artifact": digest, "framework": framework, "filename": filename}
    problem(yard.call("POST", "/v1/models", body), 422, "artifact")


def hostile(member: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(b"\0" * member.size))
    return out.getvalue()


@pytest.mark.parametrize(("name", "kind"), [
    ("../outside", tarfile.REGTYPE), ("/etc/cron.d/x", tarfile.REGTYPE), ("link", tarfile.SYMTYPE),
    ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE), ("a/../../b", tarfile.REGTYPE)])
def test_hostile_archive_refused(yard: Yard, name: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    body = {"name": "trap", "artifact": upload(yard, hostile(member)), "unpack": True}
    problem(yard.call("POST", "/v1/models", body), 422)


def test_pickle_needs_the_callers_word(yard: Yard) -> None:
    canary = yard.data.parent / "unpickled"

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    digest = upload(yard, pickle.dumps(Trap()))
    made = yard.call("POST", "/v1/models", {"name": "trap", "artifact": digest, "filename": "model.joblib"})
    refused = yard.call("POST", "/v1/images", {"name": "trap-image", "models": [made.json["id"]]})
    if refused.status == 202:
        image = until(lambda: (i := yard.call("GET", f"/v1/images/{refused.json['id']}?wait=10").json)["phase"] in (
            "ready", "failed") and i, 60)
        assert image["phase"] == "failed" and "trust" in image["reason"]
    else:
        problem(refused, 422, "trust")
    assert not canary.exists(), "the control plane never unpickles"


@pytest.mark.parametrize(("source", "words"), [
    (b"def run(data:\n    return 1\n", ["line 1"]),
    (b"def predict(data):\n    return 1\n", ["run"]),
])
def test_scoring_file_fails_the_image_with_line_and_log(yard: Yard, source: bytes, words: list[str]) -> None:
    image = build(yard, name="wrong", score=upload(yard, source))
    assert image["phase"] == "failed" and all(w in image["reason"] for w in words), image
    log = yard.call("GET", f"/v1/images/{image['id']}/log").body.decode()
    assert all(w in log for w in words) and "Traceback" not in log


def test_unknown_requirement_fails_the_image(yard: Yard, artifact: str) -> None:
    image = build(yard, name="wanting", score=artifact, requirements=["surely-no-such-package-exists==1.0"])
    assert image["phase"] == "failed" and "surely-no-such-package-exists" in image["reason"], image
    assert "surely-no-such-package-exists" in yard.call("GET", f"/v1/images/{image['id']}/log").body.decode()


@pytest.mark.parametrize(("fields", "words"), [
    ({"name": "ab"}, ["3-32"]), ({"name": "Big"}, ["lower-case"]), ({"models": ["nobody:1"]}, ["nobody:1"]),
    ({"models": ["nobody:x"]}, ["nobody:x"]), ({"python": "2.7"}, ["python"]),
    ({"python": "3.99"}, ["3.99"]), ({"score": ZERO}, [ZERO]), ({"platform": "windows/amd64"}, ["platform"]),
    ({"name": "ab", "models": ["nobody:x"], "python": "2.7"}, ["name", "models", "python"]),
])
def test_images_refused(yard: Yard, artifact: str, fields: dict[str, Any], words: list[str]) -> None:
    problem(yard.call("POST", "/v1/images", {"name": "good-name", "score": artifact, **fields}), 422, *words)
    assert yard.call("GET", "/v1/images/good-name").status == 404


@pytest.mark.parametrize(("fields", "words"), [
    ({"replicas": 0}, ["replicas"]), ({"replicas": -1}, ["replicas"]), ({"replicas": "2"}, ["replicas"]),
    ({"name": "a--b"}, ["name"]), ({"target": "moon"}, ["moon", "local"]), ({"image": "nobody:1"}, ["nobody"]),
    ({"capture": {"sampling": 2}}, ["sampling"]), ({"autoscale": {}}, ["replicas or autoscale"]),
    ({"resources": {"memory": "lots"}}, ["memory"]), ({"secrets": {"A": {}}}, ["exactly one source"]),
])
def test_deployments_refused(yard: Yard, artifact: str, fields: dict[str, Any], words: list[str]) -> None:
    if yard.call("GET", "/v1/images/plain").status == 404:
        assert build(yard, name="plain", score=artifact, lock=upload(yard, b""))["phase"] == "ready"
    body = {"name": "good", "image": "plain:1", "replicas": 1, **fields}
    problem(yard.call("POST", "/v1/deployments", body), 422, *words)
    assert yard.call("GET", "/v1/deployments/good").status == 404


def test_wrong_routes_and_hosts(yard: Yard) -> None:
    problem(yard.call("GET", "/v1/nothing"), 404)
    problem(yard.call("PUT", "/v1/models"), 405)
    problem(yard.call("GET", "/v1/models?colour=red"), 422, "colour")
    problem(yard.call("GET", "/v1/models", headers={"host": "evil.example"}), 421)
    problem(yard.call("POST", "/v1/models", {}, headers={"origin": "http://evil.example"}), 403)
    assert yard.call("GET", "/internal/v1/anything").status in (401, 403)


def test_command_line_says_it_on_stderr(yard: Yard, tmp_path: Path) -> None:
    for args, code in ((["models", "show", "nobody:1"], 1), (["models", "register", "iris", "/no/such/file"], 2),
                       (["deployments", "create"], 2), (["nonsense"], 2),
                       (["images", "build", "xyz", "--model", "no:1"], 1)):
        done = yard.cli(*args, check=False)
        assert done.returncode == code and done.stderr and not done.stdout, (args, done)
        assert "Traceback" not in done.stderr


def serve(data: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "modelyard", "serve", "--data", str(data), *flags], timeout=30,
                          capture_output=True, text=True, env={**os.environ, **env}, stdin=subprocess.DEVNULL)


def test_servers_that_cannot_start_say_why(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = serve(tmp_path / "a", "--port", port)
        assert done.returncode == 1 and port in done.stderr and "Traceback" not in done.stderr
    newer = tmp_path / "b"
    newer.mkdir(mode=0o700)
    (newer / "VERSION").write_text("99\n")
    done = serve(newer, "--port", str(free_port()))
    assert done.returncode == 1 and "newer" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "file").write_text("in the way")
    done = serve(tmp_path / "file" / "data", "--port", str(free_port()))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    done = serve(tmp_path / "c", "--port", str(free_port()), "--host", "0.0.0.0")
    assert done.returncode == 1 and "token" in done.stderr
    done = serve(tmp_path / "d", "--port", str(free_port()), MODELYARD_COLOUR="red")
    assert done.returncode == 1 and "MODELYARD_COLOUR" in done.stderr.upper()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a quota needs a tmpfs of its own: root")
def test_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=True)
    try:
        yard = Yard.start("all-in-one", small / "data")
        try:
            raw = os.urandom(40_000_000)
            digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
            problem(yard.call("PUT", f"/v1/artifacts/{digest}", raw), 503, "full")
            assert yard.call("HEAD", f"/v1/artifacts/{digest}").status == 404
            assert upload(yard, b"small enough"), "what fits goes on working"
        finally:
            assert yard.stop() == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
