"""Builders that are killed at any moment, that are two, that run out of disk: what is left, and how it goes on."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from infra.stack.registry import Registry
from modelyard.adapters.store_sqlite import SqliteStore
from modelyard.image_builder.model import Image
from tests.backends import need
from tests.gate import Gate
from tests.unit.image_builder.conftest import SCORE, Yard, running
from tests.unit.image_builder.test_bases import DEBIAN, LINKS, Layout, layer
from tests.wheelhouse import Index, house, wheel

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MB = 1 << 20


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "UV_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    need("registry")
    with Registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@asynccontextmanager
async def worker(data: Path, store: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A yard in a process of its own, and its URL. Killed at the end if it is still there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.integration.yard_worker", str(data), store, cwd=ROOT, start_new_session=True,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process, (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def lapsed(data: Path) -> None:
    """The lease of who was killed, as if its fifteen seconds were over."""
    store = await SqliteStore.open(data / "yard.db", "image-builder")
    doc = await store.get(Image, "iris:1")
    assert doc is not None and doc.lease
    await store.commit(doc.evolve(lease="dead 2026-01-01T00:00:00.000000Z", due=datetime.now(UTC)))
    await store.close()


def left(data: Path) -> list[str]:
    """Temporary files of builds and of uploads."""
    places = [data / "image-builder/tmp", data / "images/.uploads", data / "images/.tmp"]
    return [str(path) for place in places for path in (place.rglob("*") if place.is_dir() else ())]


async def test_a_builder_killed_in_every_phase(
        registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time the next one goes on with what is there: the requirements are resolved once more only when the answer
    was not there yet, and no layer that was up goes up again."""
    wheels, data, fresh = house(tmp_path / "wheels"), tmp_path / "data", f"k{os.urandom(4).hex()}"
    wheel(wheels, "tiny")
    async with Gate(registry.port).open() as gate:
        store = f"{gate.url}/{fresh}"
        with Index(wheels) as index:
            monkeypatch.setenv("UV_DEFAULT_INDEX", index.url)
            async with running(data, store) as yard:
                await yard.register("iris", os.urandom(6 * MB))
                spec = {"name": "iris", "models": ["iris"], "score": await yard.upload(SCORE), "requirements": ["tiny"]}
            resolved, sent = [], []
            for phase in ("/simple/tiny/", "/files/tiny", "^PUT .*digest=", "^PATCH", "^PUT .*manifests/1$",
                          "^PUT .*manifests/sha256"):
                async with worker(data, store) as (process, url):
                    there = index.hold(phase) if phase.startswith("/") else gate.hold(phase)
                    if not resolved:
                        await asked(url, spec)
                    await asyncio.wait_for(there.wait() if isinstance(there, asyncio.Event) else
                                           asyncio.to_thread(there.wait, 60), 60)
                    os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
                resolved.append(index.asked.count("/simple/tiny/"))
                sent.append(gate.count("^PUT .*digest="))
                index.let_go()
                gate.let_go()
                await lapsed(data)
            async with running(data, store) as yard:
                doc = await yard.over("iris:1")
                await yard.attached("iris:1")
                log = (await yard.call("GET", "/v1/images/iris:1/log")).raw.decode()
        assert doc["phase"] == "ready", log
        blobs = Counter(call.partition("digest=")[2] for call in gate.seen if re.match("PUT .*digest=", call))
        print(f"asked for the index page: {resolved}; uploads: {sent}, then {blobs.total()} of {len(blobs)} blobs")
        assert log.count("requirements:") <= 3 and resolved[3] == resolved[-1]
        assert sent[-1] - sent[-2] <= 3  # what is said of the image, and no layer
        assert blobs.total() <= len(blobs) + 4  # four at most were on their way when it died
        assert left(data) == []


async def asked(url: str, spec: dict[str, Any], **headers: str) -> dict[str, Any]:
    """Where the same request is under way elsewhere, a moment later."""
    sent = {k.replace("_", "-"): v for k, v in headers.items()}
    async with aiohttp.ClientSession() as http, asyncio.timeout(60):
        while True:
            async with http.post(f"{url}/v1/images", json=spec, headers=sent) as answer:
                body = await answer.json()
            if answer.status == 202:
                return dict(body)
            assert body["code"] == "in-flight", body
            await asyncio.sleep(0.1)


async def test_two_builders_of_one_name(registry: Registry, tmp_path: Path) -> None:
    """Two processes, one yard: every request has its own version and one builder; the same request is one image."""
    data, store = tmp_path / "data", f"{registry.url}/two{os.urandom(4).hex()}"
    async with running(data, store) as yard:
        spec = {"name": "iris", "score": await yard.upload(SCORE), "lock": await yard.upload(b"")}
        async with worker(data, store) as (process, there):
            found = await asyncio.gather(
                *(asked((yard.url, there)[n % 2], {**spec, "description": f"number {n}"}) for n in range(8)))
            same = await asyncio.gather(
                *(asked((yard.url, there)[n % 2], spec, Idempotency_Key="once") for n in range(4)))
            docs = [await yard.over(doc["id"]) for doc in (*found, *same)]
            assert process.returncode is None
        assert sorted(doc["version"] for doc in docs[:8]) == sorted({doc["version"] for doc in docs[:8]})
        assert {doc["phase"] for doc in docs} == {"ready"} and len({doc["id"] for doc in docs}) == 9
        assert len({doc["digest"] for doc in docs}) == 1 and len({doc["id"] for doc in same}) == 1
        for id in {doc["id"] for doc in docs}:
            log = (await yard.call("GET", f"/v1/images/{id}/log")).raw.decode()
            assert log.count(f"building {id}") == log.count("built sha256:") == 1, log


@pytest.mark.parametrize("phase", ["^PATCH", "^PUT .*digest=", "^PUT .*manifests/1$"])
async def test_deleted_while_it_goes_up(registry: Registry, tmp_path: Path, phase: str) -> None:
    """The call that is under way is given up; no tag, no open upload, no temporary file is left."""
    fresh = f"d{os.urandom(4).hex()}"
    async with Gate(registry.port).open() as gate, running(tmp_path / "data", f"{gate.url}/{fresh}") as yard:
        await yard.register("iris", os.urandom(9 * MB))
        spec = {"models": ["iris"], "score": await yard.upload(SCORE), "lock": await yard.upload(b"")}
        there = gate.hold(phase)
        await yard.post(name="iris", **spec)
        await asyncio.wait_for(there.wait(), 30)
        gone = await yard.call("DELETE", "/v1/images/iris:1")
        assert gone.json["phase"] == "cancelled"
        await yard.gone("iris:1")
        assert left(yard.images.data) == []
        gate.let_go()
        assert await yard.images.images.get_manifest("iris", "1") is None
        assert (await yard.over((await yard.post(name="iris", **spec))["id"]))["id"] == "iris:2"
    kept = registry.data / f"docker/registry/v2/repositories/{fresh}/iris/_uploads"
    assert list(kept.rglob("data")) == []  # notes on what it hashed so far are the registry's to sweep


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 40 MiB."""
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(folder)],
                                           check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all but so many bytes."""
    path, free = folder / "filler", os.statvfs(folder)
    path.write_bytes(bytes(free.f_bavail * free.f_frsize - leave))
    return path


async def told(yard: Yard, id: str, word: str) -> None:
    """Once the builder has given up for now, and says why."""
    async def there() -> bool:
        log = (await yard.call("GET", f"/v1/images/{id}/log")).raw.decode()
        return word in log

    await yard.until(there)


@pytest.mark.parametrize("what", ["model", "base"])
async def test_a_full_disk(tmp_path: Path, what: str) -> None:
    """The build waits, leaves nothing behind, and is done when there is room."""
    with small_disk(tmp_path / "disk"):
        async with running(tmp_path / "disk/data") as yard:
            await yard.register("iris", os.urandom(9 * MB))
            layout = Layout(tmp_path / "base")
            base = layout.tag(layout.image(layer({**DEBIAN, "etc/big": os.urandom(9 * MB)}, LINKS)))
            spec = {"models": ["iris"]} if what == "model" else {"base": base}
            filler = fill(tmp_path / "disk", 4 * MB)
            asked = await yard.post(name="full", score=await yard.upload(SCORE), lock=await yard.upload(b""), **spec)
            await told(yard, asked["id"], "is full")
            doc = (await yard.call("GET", f"/v1/images/{asked['id']}")).json
            assert doc["phase"] in ("queued", "building"), doc
            filler.unlink()
            doc = await yard.over(asked["id"])
            log = (await yard.call("GET", f"/v1/images/{asked['id']}/log")).raw.decode()
            assert doc["phase"] == "ready" and "free some space" in log and "Traceback" not in log, log
            assert left(yard.images.data) == []


async def test_a_file_that_may_not_be_so_large(tmp_path: Path) -> None:
    """As a full disk, for whoever may not mount one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with running(tmp_path / "data") as yard:
        await yard.register("iris", os.urandom(9 * MB))
        spec = {"models": ["iris"], "score": await yard.upload(SCORE), "lock": await yard.upload(b"")}
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MB, hard))
        try:
            asked = await yard.post(name="full", **spec)
            await told(yard, asked["id"], "interrupted: ")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log = (await yard.call("GET", f"/v1/images/{asked['id']}/log")).raw.decode()
        assert (await yard.over(asked["id"]))["phase"] == "ready"
        assert os.strerror(errno.EFBIG) in log or "is full" in log, log
        assert left(yard.images.data) == []
