"""A real registry behind a gate that fails on order: cuts, silence, refusals, tokens; and a registry that dies."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from infra.stack.registry import Registry
from infra.stack.server import run
from modelyard.adapters import images_registry_errors_http as errors
from modelyard.adapters import images_registry_upload as upload
from modelyard.adapters import urls
from modelyard.adapters.images_registry import RegistryImages
from modelyard.adapters.images_registry_http import Door
from modelyard.core.errors import Denied, Invalid, ModelyardError, NotFound, Unavailable
from tests.backends import need
from tests.contract.test_images import MANIFEST, chunks, digest, image, manifest, never, read
from tests.gate import Gate

pytestmark = pytest.mark.slow
MB = 1 << 20


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    need("registry")
    with Registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What is repeated is repeated sooner; but for a registry that comes back."""
    if "kill_9" not in request.node.name:
        monkeypatch.setattr(errors, "FIRST_S", 0.02)


@pytest.fixture
async def gate(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gate]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    async with Gate(registry.port).open() as found:
        yield found


@pytest.fixture
async def images(gate: Gate) -> AsyncIterator[RegistryImages]:
    store = await RegistryImages.open(f"{gate.url}/y{os.urandom(4).hex()}", timeout_s=2.0)
    yield store
    await store.close()


def parts(data: bytes, size: int = MB) -> AsyncIterator[bytes]:
    return chunks(*(data[n:n + size] for n in range(0, len(data), size)))


def second_patch(gate: Gate, fail: Callable[[], None]) -> Callable[[web.Request], web.Response | None]:
    def look(request: web.Request) -> web.Response | None:
        if request.method == "PATCH" and gate.count("^PATCH") == 2:
            fail()
        return None

    return look


@pytest.mark.parametrize("how", [{"status": 503}, {"sent": 0}])
async def test_an_upload_goes_on_after_a_cut(
    images: RegistryImages, gate: Gate, monkeypatch: pytest.MonkeyPatch, how: dict[str, int],
) -> None:
    """10 MiB in calls of 4, the second of which does not arrive: the first is not sent again."""
    monkeypatch.setattr(upload, "STRETCH", 4 * MB)
    data = os.urandom(10 * MB)
    gate.wants = second_patch(gate, lambda: gate.plan("PATCH", **how))
    assert await images.put_blob("iris", digest(data), Again(data)) is True
    assert await read(images, "iris", digest(data)) == data
    assert gate.count("^POST .*uploads/") == 1 and gate.count("^PATCH") == 4


@pytest.mark.parametrize("sent", [1, 3 * MB, 4 * MB])
async def test_a_part_that_arrived_by_half(
    images: RegistryImages, gate: Gate, monkeypatch: pytest.MonkeyPatch, sent: int,
) -> None:
    """This registry signs the offset of an upload, so it does not know it any more; the source is read again."""
    monkeypatch.setattr(upload, "STRETCH", 4 * MB)
    data = os.urandom(10 * MB)
    gate.wants = second_patch(gate, lambda: gate.plan("PATCH", sent=sent))
    with pytest.raises(Unavailable, match="try again"):
        await images.put_blob("iris", digest(data), parts(data))
    gate.seen.clear()
    assert await images.put_blob("iris", digest(data), Again(data)) is True
    assert await read(images, "iris", digest(data)) == data
    assert gate.count("^POST .*uploads/") == 2


class Again:
    """A source that can be read again."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return parts(self.data)


@pytest.mark.parametrize("kept", [0, 1, 3 * MB, 4 * MB])
async def test_a_registry_that_tells_how_much_it_has(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """As the specification has it: only the rest of the part goes up again."""
    monkeypatch.setattr(upload, "STRETCH", 4 * MB)
    data, there, calls = os.urandom(10 * MB), bytearray(), []

    async def handle(request: web.Request) -> web.Response:
        calls.append(request.method)
        body = await request.read()
        told = {"Location": "/v2/x/blobs/uploads/1", "Range": f"0-{max(len(there) - 1, 0)}"}
        if request.method == "HEAD":
            return web.Response(status=404)
        if request.method == "PATCH":
            if calls.count("PATCH") == 2:
                there.extend(body[:kept])
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            there.extend(body)
        return web.Response(status={"GET": 204, "PUT": 201}.get(request.method, 202), headers=told)

    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    store = await RegistryImages.open(f"oci://127.0.0.1:{runner.addresses[0][1]}")
    try:
        assert await store.put_blob("x", digest(data), Again(data)) is True
        assert there == data and calls.count("PATCH") == (3 if kept >= 3 * MB else 4)
    finally:
        await store.close()
        await runner.cleanup()


async def test_a_large_blob_goes_up_in_one_stream(images: RegistryImages, gate: Gate) -> None:
    data = os.urandom(9 * MB)
    await images.put_blob("iris", digest(data), parts(data, 100_000))
    assert gate.count("^PATCH") == 1 and gate.count("^PUT .*digest=") == 1
    assert await images.put_blob("rose", digest(data), never()) is False  # mounted
    assert gate.count("^POST .*mount=") == 1 and gate.count("^PATCH") == 1
    assert await read(images, "rose", digest(data)) == data


async def test_another_process_mounts_what_is_there_already(images: RegistryImages, gate: Gate) -> None:
    """It reads the repositories' newest manifests once; a registry that lists none costs it an upload."""
    await image(images, "iris", "1", b"layer")
    prefix = images._prefix.rstrip("/")
    for repo, answers in (("rose", True), ("tulip", False)):
        other = await RegistryImages.open(f"{gate.url}/{prefix}")
        gate.plan("_catalog", status=401, times=0 if answers else 1)
        assert await other.put_blob(repo, digest(b"layer"), chunks(b"layer")) is not answers
        assert await other.put_blob(f"{repo}2", digest(b"layer"), never()) is False
        await other.close()
    assert gate.count("_catalog") == 3  # once each


async def test_an_answer_that_is_lost_after_the_blob_was_kept(images: RegistryImages, gate: Gate) -> None:
    for data in (b"small", os.urandom(5 * MB)):
        gate.plan("^PUT .*digest=", after=True)
        assert await images.put_blob("iris", digest(data), parts(data)) is True
        assert await read(images, "iris", digest(data)) == data


async def test_an_upload_that_the_registry_lost(images: RegistryImages, gate: Gate) -> None:
    data = os.urandom(9 * MB)
    gate.plan("^PATCH", status=500, times=1)
    gate.plan("^GET .*uploads/", status=404)
    with pytest.raises(Unavailable, match="lost the upload; try again"):
        await images.put_blob("iris", digest(data), parts(data))
    assert await images.put_blob("iris", digest(data), parts(data)) is True


async def test_a_failed_upload_is_given_up_there(images: RegistryImages, gate: Gate, registry: Registry) -> None:
    data = os.urandom(9 * MB)

    async def broken() -> AsyncIterator[bytes]:
        yield data[:5 * MB]
        yield data[5 * MB:]
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        await images.put_blob("iris", digest(data), broken())
    assert gate.count("^DELETE .*uploads/") == 1
    assert not list(registry.data.glob(f"**/{images._prefix}iris/_uploads/*/data"))


@pytest.mark.parametrize("got", [0, 1, 700_000])
async def test_a_read_goes_on_where_it_was_cut(images: RegistryImages, gate: Gate, got: int) -> None:
    data = os.urandom(3 * MB)
    await images.put_blob("iris", digest(data), parts(data))
    for start in (0, 1000):
        gate.plan("^GET .*blobs/sha256", got=got, times=2)
        assert await read(images, "iris", digest(data), start) == data[start:]


async def test_a_registry_that_knows_no_ranges(images: RegistryImages, gate: Gate) -> None:
    data = os.urandom(3 * MB)
    await images.put_blob("iris", digest(data), parts(data))
    gate.plan("^GET .*blobs/sha256", ranges=False)
    assert await read(images, "iris", digest(data), 2 * MB + 7) == data[2 * MB + 7:]


async def test_from_the_end_on_there_is_nothing(registry: Registry) -> None:
    store = await urls.open_images(registry.url)
    await store.put_blob("iris", digest(b"layer"), chunks(b"layer"))
    assert await read(store, "iris", digest(b"layer"), 5) == b"" == await read(store, "iris", digest(b"layer"), 50)
    await store.close()


async def test_other_bytes_than_the_digest_says(images: RegistryImages, gate: Gate) -> None:
    await image(images, "iris", "1", b"layer")
    gate.plan("^GET .*blobs/sha256", status=200, body=b"other")
    with pytest.raises(Invalid, match="damaged"):
        await read(images, "iris", digest(b"layer"))
    known = digest(manifest(b"{}", b"layer"))
    for reference, headers in ((known, {}), ("1", {"Docker-Content-Digest": known})):
        gate.plan("^GET .*manifests/", status=200, body=b"{}", headers={"Content-Type": MANIFEST, **headers}, times=5)
        with pytest.raises(Invalid, match="damaged"):
            await images.get_manifest("iris", reference)
        gate.planned[-1].times = 2  # somebody was writing it
        assert await images.get_manifest("iris", reference) == (manifest(b"{}", b"layer"), MANIFEST)


async def call_all(images: RegistryImages) -> list[ModelyardError]:
    """Every method once: their errors."""
    calls = [images.check(), images.put_blob("iris", digest(b"x"), chunks(b"x")), read(images, "iris", digest(b"x")),
             images.put_manifest("iris", "1", manifest(b"x"), MANIFEST), images.get_manifest("iris", "1"),
             images.remove("iris", "1")]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(one, ModelyardError) for one in found), found
    return list(found)


@pytest.mark.parametrize(("status", "error", "told"), [
    (401, Denied, "docker login 127.0.0.1"), (403, Denied, "ask its owner"), (429, Unavailable, "takes no more calls"),
    (500, Unavailable, "failed with 500"), (503, Unavailable, "failed with 503"), (418, Invalid, "refused it with 418"),
])
async def test_each_refusal_is_its_own_error(images: RegistryImages, gate: Gate, status: int,
                                             error: type[ModelyardError], told: str) -> None:
    gate.plan("", status=status, times=1000, body=b'{"errors": [{"code": "WHY", "message": "because"}]}')
    for found in await call_all(images):
        assert isinstance(found, error) and told in found.message, found


async def test_a_moment_of_trouble_is_not_noticed(images: RegistryImages, gate: Gate) -> None:
    gate.plan("", status=503, times=2)
    gate.plan("", status=429, headers={"Retry-After": "1"})
    began = time.monotonic()
    assert await images.put_blob("iris", digest(b"x"), chunks(b"x")) is True
    assert time.monotonic() - began >= 1.0


async def test_silence_is_bounded(gate: Gate) -> None:
    gate.plan("", silent=True, times=1000)
    store, began = await RegistryImages.open(gate.url, timeout_s=0.4), time.monotonic()
    for found in await call_all(store):
        assert isinstance(found, Unavailable) and "within 0.4 s" in found.message, found
    assert time.monotonic() - began < 15
    await store.close()


async def test_a_manifest_that_two_put_at_once(images: RegistryImages, gate: Gate) -> None:
    gate.plan("^PUT .*manifests/", status=400, times=2, body=b'{"errors": [{"code": "DIGEST_INVALID"}]}')
    await image(images, "iris", "1", b"layer")
    gate.plan("^PUT .*manifests/", status=400, times=20, body=b'{"errors": [{"code": "MANIFEST_INVALID"}]}')
    with pytest.raises(Invalid, match="MANIFEST_INVALID"):
        await image(images, "iris", "2", b"other")


async def test_what_is_no_registry(gate: Gate) -> None:
    gate.plan("", status=404, times=1000, body=b"<html>")
    store = await RegistryImages.open(gate.url)
    with pytest.raises(Invalid, match="there is no OCI registry at"):
        await store.check()
    await store.close()


async def test_an_answer_without_an_end(images: RegistryImages, gate: Gate) -> None:
    gate.plan("manifests", status=200, body=bytes(9 * MB))
    with pytest.raises(Invalid, match="more than"):
        await images.get_manifest("iris", "1")


async def test_nobody_there_and_no_tls_there(gate: Gate, registry: Registry) -> None:
    for url, told in (("oci://127.0.0.1:9/x", "does not answer"),
                      (f"oci://127.0.0.1:{registry.port}/x?tls=on", r"\?tls=off")):
        store = await urls.open_images(url)
        with pytest.raises(Unavailable, match=told):
            await store.check()
        await store.close()


def token_wanted(gate: Gate, asked: list[tuple[str, dict[str, Any]]]) -> Callable[[web.Request], web.Response | None]:
    """Bearer tokens, as large registries have them: one for each scope, given for a password or an identity."""
    def wanted(request: web.Request) -> web.Response | None:
        if request.path == "/token":
            asked.append((request.headers.get("Authorization", ""), dict(request.query)))
            word = base64.b64encode(request.query.get("scope", "").encode()).decode()
            return web.json_response({"token": word, "expires_in": 300})
        repo = re.match(r"/v2/(.+)/(?:blobs|manifests|tags)/", request.path)
        actions = "pull" if request.method in ("GET", "HEAD") else "pull,push"
        scope = f"repository:{repo[1]}:{actions}" if repo else ""
        held = base64.b64decode(request.headers.get("Authorization", "").removeprefix("Bearer ") or "").decode()
        if held and held.startswith(scope):
            return None
        challenge = f'Bearer realm="http://127.0.0.1:{gate.port}/token",service="yard",scope="{scope}"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    return wanted


async def test_bearer_tokens(images: RegistryImages, gate: Gate, tmp_path: Path) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    gate.wants = token_wanted(gate, asked)
    (tmp_path / "docker/config.json").write_text(json.dumps({"auths": {
        f"127.0.0.1:{gate.port}": {"username": "somebody", "password": "hunter2"}}}))
    await image(images, "iris", "1", b"layer")
    assert await read(images, "iris", digest(b"layer")) == b"layer"
    basic = "Basic " + base64.b64encode(b"somebody:hunter2").decode()
    assert {auth for auth, _ in asked} == {basic} and {query["service"] for _, query in asked} == {"yard"}
    assert len(asked) <= 6, asked  # kept while they are good


async def test_no_password_is_given_to_a_token_server_without_tls() -> None:
    """To a registry with TLS, that is; the challenge is somebody's in between."""
    door = Door("r.example", True, 1.0)
    with pytest.raises(Denied, match="without TLS"):
        await door._allowed.renew("iris", "", ['Bearer realm="http://evil.example/token"'])
    await door.close()


async def test_a_registry_that_deletes_nothing_says_how_to_make_it(tmp_path: Path) -> None:
    need("registry")
    with Registry(tmp_path, deletes=False) as found:
        store = await urls.open_images(found.url)
        await image(store, "iris", "1", b"one")
        with pytest.raises(Denied, match=r"storage\.delete\.enabled"):
            await store.remove("iris", "1")
        await image(store, "iris", "1", b"two")  # a tag can move, all the same
        assert await store.get_manifest("iris", "1") == (manifest(b"{}", b"two"), MANIFEST)
        await store.close()


async def test_the_registry_s_own_collection_takes_what_no_tag_needs(tmp_path: Path) -> None:
    need("registry")
    with Registry(tmp_path) as found:
        store = await urls.open_images(found.url)
        await image(store, "iris", "1", b"shared", b"one")
        await image(store, "iris", "2", b"shared", b"two")
        await image(store, "rose", "1", b"shared", b"three")
        await store.remove("iris", "1")
        found.stop()
        run("docker-registry", "garbage-collect", str(tmp_path / "config.yml"))
        found.start()
        with pytest.raises(NotFound):
            await read(store, "iris", digest(b"one"))
        for repo, tag, data in (("iris", "2", b"two"), ("rose", "1", b"three")):
            assert await store.get_manifest(repo, tag) is not None
            both = [await read(store, repo, digest(one)) for one in (b"shared", data)]
            assert both == [b"shared", data]
        await store.close()


async def test_kill_9_of_the_registry_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    """It comes back within the tries: nothing is noticed."""
    need("registry")
    data = os.urandom(20 * MB)
    with Registry(tmp_path) as found:
        store = await RegistryImages.open(found.url, timeout_s=5.0)

        class Slow:
            killed = False

            async def __aiter__(self) -> AsyncIterator[bytes]:
                for n in range(0, len(data), MB):
                    if n == 10 * MB and not self.killed:
                        self.killed = True
                        await asyncio.to_thread(found.kill)
                        revived = asyncio.get_running_loop().run_in_executor(None, found.start)
                        del revived
                    yield data[n:n + MB]

        assert await store.put_blob("iris", digest(data), Slow()) is True
        assert hashlib.sha256(await read(store, "iris", digest(data))).digest() == hashlib.sha256(data).digest()
        with pytest.raises(NotFound):
            await read(store, "iris", digest(b"never"))
        await store.close()
