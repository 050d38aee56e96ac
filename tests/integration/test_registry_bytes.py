"""What goes over the wire to and from a registry when connections break, counted before it; and what a removal asks."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from infra.stack.registry import Registry
from modelyard.adapters.images_registry import RegistryImages
from modelyard.adapters.images_registry_upload import PART
from modelyard.core.errors import Invalid, NotFound, Unavailable
from tests.backends import need
from tests.contract.test_images import MANIFEST, digest, image, manifest
from tests.gate import Gate
from tests.proxy import Proxy

pytestmark = pytest.mark.slow
MB = 1 << 20
SIZE = 64 * MB
SOCKETS = 8 * MB
"""What lies in them when a connection breaks."""
LITTLE = 256_000
"""Headers, and what lies in the buffers between when a connection breaks."""


@pytest.fixture(scope="module")
def data() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    need("registry")
    with Registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


class Source:
    """Bytes as a stream that can be read again; ``times``: so often it was."""

    def __init__(self, data: bytes) -> None:
        self.data, self.times = data, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.times += 1
        for n in range(0, len(self.data), MB):
            yield self.data[n:n + MB]


class Exact:
    """A registry that keeps what arrived of a part that broke off, and tells: as the specification has it."""

    def __init__(self) -> None:
        self.blob, self.starts = bytearray(), list[int]()

    async def handle(self, request: web.Request) -> web.Response:
        told = {"Location": "/v2/x/blobs/uploads/1"}
        if request.method == "PATCH":
            self.starts.append(len(self.blob))
            async for chunk in request.content.iter_any():
                self.blob.extend(chunk)
        told["Range"] = f"0-{max(len(self.blob) - 1, 0)}"
        return web.Response(status={"HEAD": 404, "GET": 204, "PUT": 201}.get(request.method, 202), headers=told)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()


@asynccontextmanager
async def behind(port: int, **how: float) -> AsyncIterator[tuple[Proxy, RegistryImages]]:
    with Proxy(port) as wire:
        store = await RegistryImages.open(f"oci://127.0.0.1:{wire.port}/w{os.urandom(4).hex()}", **how)
        try:
            yield wire, store
        finally:
            await store.close()


async def test_a_cut_costs_what_was_on_its_way(data: bytes) -> None:
    """The source is read again, and goes on where the registry has it, on the byte."""
    there = Exact()
    async with there.open() as port, behind(port) as (wire, store):
        wire.cut_once(sent=SIZE // 2 + MB)
        source = Source(data)
        assert await store.put_blob("x", digest(data), source) is True
    assert bytes(there.blob) == data and source.times == 2
    assert there.starts[0] == 0 and len(there.starts) == 2 and there.starts[1] % PART
    print(f"sent again after a cut: {wire.sent - SIZE} bytes")
    assert SIZE < wire.sent < SIZE + SOCKETS


async def test_what_cannot_be_read_again_is_not_made_up(data: bytes) -> None:
    """A stream that is gone once it was read: the upload fails as a whole, and may be tried again."""
    there = Exact()
    async with there.open() as port, behind(port) as (wire, store):
        wire.cut_once(sent=SIZE // 2 + MB)
        with pytest.raises(Unavailable, match="read again"):
            await store.put_blob("x", digest(data), Source(data).__aiter__())
        assert data.startswith(there.blob) and len(there.blob) < SIZE


async def test_a_source_that_fails_on_the_way_says_so_itself(registry: Registry, data: bytes) -> None:
    async def half() -> AsyncIterator[bytes]:
        for n in range(0, SIZE // 2, MB):
            yield data[n:n + MB]
        raise NotFound("the weights are gone")

    async with behind(registry.port) as (_, store):
        with pytest.raises(NotFound, match="the weights are gone"):
            await store.put_blob("iris", digest(data), half())
        with pytest.raises(Invalid, match="hash to"):
            await store.put_blob("iris", digest(b"others"), Source(data))
        assert await store.put_blob("iris", digest(data), Source(data)) is True


async def test_a_cut_before_a_registry_that_signs_offsets(registry: Registry, data: bytes) -> None:
    """CNCF Distribution 2.8 knows the upload no longer: all of it goes up again, once."""
    async with behind(registry.port) as (wire, store):
        wire.cut_once(sent=SIZE // 2 + MB)
        source = Source(data)
        assert await store.put_blob("iris", digest(data), source) is True
        print(f"sent again after a cut: {wire.sent - SIZE} bytes")
        assert source.times == 2 and wire.sent < SIZE + SIZE // 2 + PART + LITTLE
        before = wire.sent
        assert await store.put_blob("rose", digest(data), source) is False  # mounted
        assert source.times == 2 and wire.sent - before < 4000


async def test_a_read_goes_on_at_the_byte(registry: Registry, data: bytes) -> None:
    async with behind(registry.port) as (wire, store):
        await store.put_blob("iris", digest(data), Source(data))
        before, got = wire.got, bytearray()
        wire.cut_once(got=20 * MB)
        async for chunk in store.get_blob("iris", digest(data)):
            got += chunk
            if len(got) in range(40 * MB, 41 * MB):
                wire.cut_once(got=MB)
        assert bytes(got) == data
        again = wire.got - before - SIZE
    print(f"read again after two cuts: {again} bytes")
    assert 0 <= again < 8 * MB  # what was on its way in sockets when they broke


async def versions(store: RegistryImages, first: int, last: int) -> None:
    for n in range(first, last):
        await image(store, "iris", str(n), b"layer %d" % n)


async def test_a_removal_asks_no_more_for_many_versions(registry: Registry) -> None:
    """The versions are asked about once; then a removal takes as many calls in a repository of 10 as of 40."""
    async with Gate(registry.port).open() as gate:
        prefix, asked = f"r{os.urandom(4).hex()}", []
        there = await RegistryImages.open(f"{registry.url}/{prefix}")
        mine = await RegistryImages.open(f"{gate.url}/{prefix}")
        await versions(there, 1, 11)
        await mine.remove("iris", "1")
        for first, last in ((11, 12), (12, 42)):
            await versions(mine if first > 11 else there, first, last)
            await mine.remove("iris", str(first))  # asks about what others put since
            gate.seen.clear()
            await mine.remove("iris", str(first - 8))
            asked.append(sorted(call.partition(" ")[0] for call in gate.seen))
        print(f"calls of a removal: {asked[1]}")
        assert asked[0] == asked[1] == ["DELETE", "GET", "HEAD"]
        for store in (there, mine):
            await store.close()


async def test_a_remembered_version_that_another_process_moved(registry: Registry) -> None:
    """What both versions are now stays with the one; and so does what somebody tagged by hand."""
    url = f"{registry.url}/m{os.urandom(4).hex()}"
    one, two = await RegistryImages.open(url), await RegistryImages.open(url)
    await versions(one, 1, 6)
    await one.remove("iris", "1")  # now it knows all the others
    for tag in ("3", "latest"):
        assert await two.put_manifest("iris", tag, manifest(b"{}", b"layer %d" % (2 if tag == "3" else 4)), MANIFEST)
    gone = digest(manifest(b"{}", b"layer 3"))
    assert await one.get_manifest("iris", gone) is None
    for removed, kept, layer in (("2", "3", b"layer 2"), ("4", "latest", b"layer 4")):
        await one.remove("iris", removed)
        assert await one.get_manifest("iris", removed) is None
        assert await one.get_manifest("iris", kept) == (manifest(b"{}", layer), MANIFEST)
    for tag in ("3", "5", "latest"):
        await one.remove("iris", tag)
        assert await two.get_manifest("iris", tag) is None
    for store in (one, two):
        await store.close()
