"""A large upload and its download stream through: the registry's memory grows by little."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

SIZE = 2 << 30
BLOCK = bytes(range(256)) * 4096
SERVER = """
import asyncio, sys
from pathlib import Path
from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.store_sqlite import SqliteStore
from modelyard.kernel.forward import Peers
from modelyard.kernel.guard import Guard
from modelyard.kernel.server import Server
from modelyard.kernel.service import Context
from modelyard.kernel.web import application, mount
from modelyard.registry import SERVICE

async def main(folder):
    store = await SqliteStore.open(folder / "yard.db", "registry")
    ctx = Context(service="registry", store=store, blobs=DirBlobs(folder / "blobs"),
                  images=LayoutImages(folder / "images"), grants=DirGrants(folder / "blobs"), targets={},
                  peers=Peers({}, "t"), data=folder)
    app = application(Guard(service_token="t"))
    mount(app, SERVICE.routes(ctx), ctx)
    print(await Server(app).start("127.0.0.1", 0), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1])))
"""


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[str, int]]:
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(folder),
                                                  stdout=asyncio.subprocess.PIPE)
    assert server.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(await server.stdout.readline())}", server.pid
    finally:
        server.send_signal(signal.SIGKILL)
        await server.wait()


def peak(pid: int) -> int:
    """The most memory a process ever had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.slow
async def test_two_gibibytes_pass_through_little_memory(tmp_path: Path) -> None:
    sha = hashlib.sha256()
    for _ in range(SIZE // len(BLOCK)):
        sha.update(BLOCK)
    digest = f"sha256:{sha.hexdigest()}"

    async def body() -> AsyncIterator[bytes]:
        for _ in range(SIZE // len(BLOCK)):
            yield BLOCK

    async with serving(tmp_path) as (url, pid), aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as http:
        (await http.put(f"{url}/v1/artifacts/sha256:{'0' * 64}", data=b"warm up")).close()
        before, began = peak(pid), time.monotonic()
        async with http.put(f"{url}/v1/artifacts/{digest}", data=body(),
                            headers={"Content-Length": str(SIZE)}) as answer:
            assert answer.status == 201 and (await answer.json())["size"] == SIZE
        up, took = peak(pid) - before, time.monotonic() - began
        async with http.post(f"{url}/v1/models", json={"name": "big", "artifact": digest}) as answer:
            assert answer.status == 201
        received, again = 0, hashlib.sha256()
        async with http.get(f"{url}/v1/models/big/content") as answer:
            async for chunk in answer.content.iter_chunked(1 << 20):
                received += len(chunk)
                again.update(chunk)
        assert received == SIZE and f"sha256:{again.hexdigest()}" == digest
        print(f"upload {took:.1f} s, grew {up >> 20} MiB; with download {(peak(pid) - before) >> 20} MiB")
        assert peak(pid) - before <= 64 << 20
