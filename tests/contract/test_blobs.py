"""What every blob store promises."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelyard.adapters import urls
from modelyard.core.errors import Invalid, NotFound
from modelyard.ports.blobs import BlobStore
from tests.backends import Backend, backends, url_of


@pytest.fixture(params=backends("blobs"))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    backend: Backend = request.param
    return url_of(backend, tmp_path)


@pytest.fixture
async def blobs(url: str) -> AsyncIterator[BlobStore]:
    store = await urls.open_blobs(url)
    await store.check()
    yield store
    await store.close()
    await store.close()


async def parts(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def whole(blobs: BlobStore, key: str, start: int = 0) -> bytes:
    return b"".join([chunk async for chunk in blobs.get(key, start)])


async def keys(blobs: BlobStore, prefix: str = "", after: str = "") -> list[str]:
    return [blob.key async for blob in blobs.list(prefix, after)]


@pytest.mark.parametrize("chunks", [(), (b"",), (b"x",), (b"a", b"", b"b" * 3_000_000, b"c"), (b"k" * 1000,) * 5000])
async def test_what_was_put_comes_back(blobs: BlobStore, chunks: tuple[bytes, ...]) -> None:
    data = b"".join(chunks)
    assert await blobs.put("a/b.c/d", parts(*chunks)) is True
    assert await whole(blobs, "a/b.c/d") == data
    found = await blobs.stat("a/b.c/d")
    assert found is not None and (found.key, found.size) == ("a/b.c/d", len(data))
    assert found.modified.tzinfo is not None
    for start in {0, len(data) // 2, max(0, len(data) - 1), len(data)}:
        assert await whole(blobs, "a/b.c/d", start) == data[start:]


async def test_put_replaces_or_leaves_alone(blobs: BlobStore) -> None:
    assert await blobs.put("k", parts(b"one"), if_absent=True) is True
    assert await blobs.put("k", parts(b"two"), if_absent=True) is False
    assert await whole(blobs, "k") == b"one"
    assert await blobs.put("k", parts(b"three")) is True
    assert await whole(blobs, "k") == b"three"


async def test_one_of_many_writers_makes_it(blobs: BlobStore) -> None:
    tries = [blobs.put("k", parts(bytes([n]) * 2_000_000), if_absent=True) for n in range(12)]
    won = [n for n, made in enumerate(await asyncio.gather(*tries)) if made]
    assert len(won) == 1 and await whole(blobs, "k") == bytes(won) * 2_000_000
    assert await keys(blobs) == ["k"]


async def test_a_reader_sees_one_version_to_its_end(blobs: BlobStore) -> None:
    await blobs.put("k", parts(b"a" * 5_000_000))
    reader = aiter(blobs.get("k"))
    seen = [await anext(reader)]
    await blobs.put("k", parts(b"b" * 5_000_000))
    seen += [chunk async for chunk in reader]
    assert b"".join(seen) == b"a" * 5_000_000


async def test_what_is_not_there(blobs: BlobStore) -> None:
    await blobs.put("folder/file", parts(b"x"))
    for key in ("nothing", "folder", "folder/file/below", "folder/other"):
        assert await blobs.stat(key) is None
        with pytest.raises(NotFound):
            await whole(blobs, key)
        await blobs.delete(key)
    assert await keys(blobs) == ["folder/file"]


async def test_delete_and_put_again(blobs: BlobStore) -> None:
    for _ in range(3):
        await blobs.put("a/b/c", parts(b"x"))
        await blobs.delete("a/b/c")
        await blobs.delete("a/b/c")
        assert await blobs.stat("a/b/c") is None and await keys(blobs) == []


async def test_putting_and_deleting_neighbours_at_once(blobs: BlobStore) -> None:
    """A folder that empties under a writer is the store's affair."""

    async def churn(n: int) -> None:
        for _ in range(30):
            await blobs.put(f"deep/er/{n}", parts(b"x"))
            await blobs.delete(f"deep/er/{n}")

    await asyncio.gather(*(churn(n) for n in range(6)))
    assert await keys(blobs) == []


async def test_lists_are_sorted_as_text_and_resumable(blobs: BlobStore) -> None:
    names = ["a", "a-b", "a.b", "a0", "b/a", "b/a.x", "b/a0/c", "b/b", "b.c/x", "ü/1", "z/.hidden/x", "Z"]
    random.Random(7).shuffle(names)
    for name in names:
        await blobs.put(name, parts(b"1"))
    assert await keys(blobs) == sorted(names)
    for prefix in ("", "a", "b/", "b", "b/a", "b/a0/", "z/.h", "nothing", "b/a0/c", "b/a0/c/d"):
        expected = sorted(n for n in names if n.startswith(prefix))
        assert await keys(blobs, prefix) == expected
        for after in ["", *names, "b/a.", "b/a0/"]:
            assert await keys(blobs, prefix, after) == [n for n in expected if n > after], (prefix, after)


@pytest.mark.slow
async def test_a_list_of_many_can_be_left(blobs: BlobStore) -> None:
    for n in range(1200):
        await blobs.put(f"many/{n:05}", parts(b""))
    assert len(await keys(blobs, "many/")) == 1200
    async for blob in blobs.list("many/"):
        assert blob.key == "many/00000"
        break
    assert (await keys(blobs, "many/", "many/01100"))[:2] == ["many/01101", "many/01102"]


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a/.", "a\0b", "a\nb", "x" * 300,
                                 "/".join(["a"] * 600)])
async def test_keys_that_are_none(blobs: BlobStore, key: str) -> None:
    for attempt in (blobs.put(key, parts(b"x")), whole(blobs, key), blobs.stat(key), blobs.delete(key)):
        with pytest.raises(Invalid):
            await attempt
    assert await keys(blobs) == []


@pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../../"])
async def test_prefixes_that_lead_out(blobs: BlobStore, prefix: str) -> None:
    with pytest.raises(Invalid):
        await keys(blobs, prefix)


async def test_a_stream_that_fails_leaves_nothing(blobs: BlobStore) -> None:
    class Gone(Exception):
        pass

    async def failing(size: int) -> AsyncIterator[bytes]:
        yield b"x" * size
        raise Gone

    async def cut() -> AsyncIterator[bytes]:
        yield b"x" * 3_000_000
        raise ConnectionResetError("the caller went")

    await blobs.put("there", parts(b"before"))
    for size in (10, 5_000_000):
        for key in ("new", "there"):
            with pytest.raises(Gone):
                await blobs.put(key, failing(size))
    with pytest.raises(ConnectionResetError):
        await blobs.put("new", cut())
    assert await keys(blobs) == ["there"] and await whole(blobs, "there") == b"before"


async def test_a_cancelled_put_leaves_nothing(blobs: BlobStore) -> None:
    async def slow() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1_500_000
            await asyncio.sleep(0)

    for wait in (0.0, 0.005, 0.02, 0.05):
        task = asyncio.create_task(blobs.put("k", slow()))
        await asyncio.sleep(wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await keys(blobs) == []


WRITER = """
import asyncio, sys
from modelyard.adapters import urls

async def endless():
    while True:
        yield b"x" * 1_000_000
        print("written", flush=True)
        await asyncio.sleep(0.01)

async def main():
    blobs = await urls.open_blobs(sys.argv[1])
    await blobs.put("half", endless())

asyncio.run(main())
"""


async def test_a_killed_writer_leaves_nothing(blobs: BlobStore, url: str, tmp_path: Path) -> None:
    def write_and_die() -> None:
        with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(5):
                writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)

    await asyncio.to_thread(write_and_die)
    assert await keys(blobs) == [] and await blobs.stat("half") is None
    again = await urls.open_blobs(url)
    await again.check()
    assert await again.put("half", parts(b"whole"), if_absent=True)
    left = await asyncio.to_thread(lambda: [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 5])
    assert left == [], "what the dead writer had begun is swept"


async def test_a_sweep_spares_the_living(blobs: BlobStore, url: str) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def waiting() -> AsyncIterator[bytes]:
        yield b"a" * 2_000_000
        begun.set()
        await go.wait()
        yield b"b"

    task = asyncio.create_task(blobs.put("slow", waiting()))
    await begun.wait()
    other = await urls.open_blobs(url)
    await other.check()
    go.set()
    assert await task is True and await whole(other, "slow") == b"a" * 2_000_000 + b"b"


