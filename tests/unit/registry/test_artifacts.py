"""Artifacts over HTTP: whole and right, or not there at all."""

from __future__ import annotations

import asyncio
import errno
import resource
from collections.abc import AsyncIterator

import pytest

from tests.unit.registry.conftest import Registry, digest


async def test_an_upload_is_kept_once_and_head_answers_from_the_record(registry: Registry) -> None:
    data = b"a model" * 1000
    first = await registry.ask("PUT", f"/v1/artifacts/{digest(data)}", data=data, status=201)
    assert first["digest"] == digest(data) and first["size"] == len(data)
    await registry.ask("PUT", f"/v1/artifacts/{digest(data)}", data=data, status=200)
    await registry.ask("HEAD", f"/v1/artifacts/{digest(data)}", status=200)
    assert registry.last.headers["Content-Length"] == str(len(data))
    assert [str(p) for p in registry.blobs()] == [f"artifacts/sha256/{digest(data)[7:9]}/{digest(data)[7:]}"]


async def test_a_blob_without_a_record_is_not_an_artifact(registry: Registry) -> None:
    data = b"left by somebody"

    async def once() -> AsyncIterator[bytes]:
        yield data

    await registry.ctx.blobs.put(f"artifacts/sha256/{digest(data)[7:9]}/{digest(data)[7:]}", once())
    await registry.ask("HEAD", f"/v1/artifacts/{digest(data)}", status=404)
    assert registry.last.headers["Upload-Offset"] == "0"
    await registry.ask("PUT", f"/v1/artifacts/{digest(data)}", data=data, status=201)


async def test_another_workspace_neither_sees_nor_shares_it(registry: Registry) -> None:
    name = await registry.upload(b"mine")
    theirs = {"x-modelyard-workspace": "other"}
    await registry.ask("HEAD", f"/v1/artifacts/{name}", internal=True, headers=theirs, status=404)
    body = {"name": "iris", "artifact": name}
    assert (await registry.ask("POST", "/v1/models", json=body, internal=True, headers=theirs, status=422))
    await registry.ask("PUT", f"/v1/artifacts/{name}", data=b"mine", internal=True, headers=theirs, status=201)
    assert (await registry.ask("POST", "/v1/models", json=body, internal=True, headers=theirs, status=201)
            )["workspace"] == "other"
    await registry.ask("GET", "/v1/models/iris:1", status=404)
    assert any(str(p).startswith("workspaces/other/artifacts/") for p in registry.blobs())


async def test_a_wrong_digest_is_refused_and_nothing_is_kept(registry: Registry) -> None:
    problem = await registry.ask("PUT", f"/v1/artifacts/{digest(b'other')}", data=b"x" * 3_000_000, status=422)
    assert problem["code"] == "digest-mismatch" and digest(b"x" * 3_000_000) in problem["detail"]
    await registry.ask("HEAD", f"/v1/artifacts/{digest(b'other')}", status=404)
    await registry.ask("PUT", "/v1/artifacts/sha256:abc", data=b"x", status=422)
    await registry.ask("PUT", f"/v1/artifacts/{digest(b'x')}", data=b"x", status=422,
                       headers={"Content-Range": "bytes 0-0/1"})
    await registry.ask("PUT", f"/v1/artifacts/{digest(b'x')}", data=b"x", status=415,
                       headers={"Content-Type": "text/plain"})
    assert registry.blobs() == []


async def test_a_wrong_body_for_an_artifact_that_is_there_is_refused_too(registry: Registry) -> None:
    await registry.upload(b"right")
    await registry.ask("PUT", f"/v1/artifacts/{digest(b'right')}", data=b"wrong", status=422)
    await registry.ask("HEAD", f"/v1/artifacts/{digest(b'right')}", status=200)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_cut_upload_leaves_nothing_behind(registry: Registry, chunked: bool) -> None:
    _reader, writer = await asyncio.open_connection("127.0.0.1", registry.port)
    size = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 9000000"
    writer.write(b"PUT /v1/artifacts/" + digest(b"never whole").encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
                 b"Content-Type: application/octet-stream\r\n" + size + b"\r\n\r\n")
    if chunked:
        writer.write(b"200000\r\n")
    writer.write(b"x" * 2_097_152)
    await writer.drain()

    async def arriving() -> bool:
        return any(".tmp" in str(p) for p in registry.blobs())

    async def gone() -> bool:
        return registry.blobs() == []

    await registry.until(arriving)
    writer.close()
    await registry.until(gone)
    await registry.ask("HEAD", f"/v1/artifacts/{digest(b'never whole')}", status=404)
    assert registry.last.headers["Upload-Offset"] == "0"


async def test_a_full_disk_is_said_plainly(registry: Registry) -> None:
    """RLIMIT_FSIZE is the quota here: the kernel refuses the write as it would on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    data = b"z" * (64 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 20, before[1]))
    try:
        problem = await registry.ask("PUT", f"/v1/artifacts/{digest(data)}", data=data, status=503)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "disk full" in problem["detail"] and registry.last.headers["Retry-After"]
    assert registry.blobs() == []
    await registry.ask("PUT", f"/v1/artifacts/{digest(data)}", data=data, status=201)


async def test_two_uploads_of_one_artifact_at_once_are_one_artifact(registry: Registry) -> None:
    data = b"both" * 500_000
    answers = await asyncio.gather(*(registry.ask("PUT", f"/v1/artifacts/{digest(data)}", data=data)
                                     for _ in range(8)))
    assert {a["size"] for a in answers} == {len(data)}
    assert len(registry.blobs()) == 1


async def test_enospc_is_a_full_disk(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's own word for it, on the last step: making the bytes durable."""

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    problem = await registry.ask("PUT", f"/v1/artifacts/{digest(b'x')}", data=b"x", status=503)
    assert "disk full" in problem["detail"] and "free some space" in problem["detail"]
    monkeypatch.undo()
    assert registry.blobs() == []
