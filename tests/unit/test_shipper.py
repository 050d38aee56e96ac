"""The shipper: for ever, in order, deleting only what the store has."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from modelyard.adapters.blobs_dir import DirBlobs, DirGrants, open_grant
from modelyard.core.errors import Unavailable
from modelyard.scoring import shipper as shipping
from modelyard.scoring.capture import CaptureLog
from modelyard.scoring.pace import BACKLOG, Pace
from modelyard.scoring.shipper import Grant, Shipper
from tests.unit.test_capture_log import ABOUT, REPLICA, call

PREFIX = "capture/iris/.segments/"


async def until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        await asyncio.sleep(0.01)


class Store:
    """A real folder of blobs, its grants, and a spool."""

    def __init__(self, folder: Path) -> None:
        self.blobs, self.grants, self.spool = DirBlobs(folder / "blobs"), DirGrants(folder / "blobs"), folder / "spool"
        self.spool.mkdir()
        self.files = folder / "blobs" / PREFIX

    def segment(self, number: int, body: bytes = b"x" * 100, replica: str = REPLICA) -> Path:
        path = self.spool / f"{replica}-{number:08d}.seg"
        path.write_bytes(body)
        return path

    async def lend(self, seconds: int = 60) -> str:
        return await self.grants.lend("default", "iris", seconds)

    def shipped(self) -> list[str]:
        return sorted(p.name for p in self.files.iterdir()) if self.files.exists() else []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@asynccontextmanager
async def running(shipper: Shipper) -> AsyncIterator[None]:
    task = asyncio.create_task(shipper.run())
    try:
        yield
    finally:
        shipper.stopping.set()
        await asyncio.wait_for(task, 10)


async def test_ships_what_is_closed_and_deletes_it(store: Store) -> None:
    shipper = Shipper(store.spool, await store.lend(), open_grant)
    async with running(shipper):
        for number in range(5):
            store.segment(number, bytes([number]) * 10)
        await until(lambda: len(store.shipped()) == 5 and not list(store.spool.iterdir()))
    assert [(store.files / name).read_bytes() for name in store.shipped()] == [bytes([n]) * 10 for n in range(5)]


async def test_a_live_writer_is_left_alone_and_a_dead_one_is_finished(store: Store) -> None:
    log = await asyncio.to_thread(CaptureLog.open, store.spool, REPLICA, ABOUT, {"enabled": True})
    await asyncio.to_thread(log.append, [call(1)])
    (store.spool / "1-ffffffff-00000001.live").write_bytes(b"its writer is dead")
    assert await Shipper(store.spool, await store.lend(), open_grant).once()
    assert store.shipped() == [f"{REPLICA}-00000000.seg", "1-ffffffff-00000001.seg"]
    assert [p.name for p in store.spool.iterdir()] == [f"{REPLICA}-00000001.live"]
    await asyncio.to_thread(log.close)


async def test_what_the_store_has_already_is_only_deleted(store: Store) -> None:
    url = await store.lend()
    await open_grant(url).put(store.segment(1).name, b"x" * 100)
    assert await Shipper(store.spool, url, open_grant).once()
    assert store.shipped() == [f"{REPLICA}-00000001.seg"] and not list(store.spool.iterdir())


async def test_it_tries_for_ever_with_longer_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(shipping, "LONGEST_WAIT_S", 0.04)
    url, tries = await store.lend(), 0

    class Failing:
        async def put(self, name: str, data: bytes) -> bool:
            nonlocal tries
            tries += 1
            if tries < 8:
                raise Unavailable("the store is away")
            return await open_grant(url).put(name, data)

    def opened(_: str) -> Grant:
        return Failing()

    store.segment(1)
    async with running(Shipper(store.spool, url, opened)):
        await until(lambda: store.shipped() == [f"{REPLICA}-00000001.seg"])
    assert tries == 8


async def test_a_lapsed_grant_is_renewed_by_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "LONGEST_WAIT_S", 0.05)
    old = await store.lend()
    await store.grants.revoke("default", "iris")
    store.segment(1)
    async with running(Shipper(store.spool, old, open_grant)):
        await asyncio.sleep(0.3)
        assert store.shipped() == []
        (store.spool / "grant").write_text(await store.lend() + "\n")
        await until(lambda: store.shipped() == [f"{REPLICA}-00000001.seg"])
    assert [p.name for p in store.spool.iterdir()] == ["grant"]


async def test_no_grant_is_waited_for(store: Store) -> None:
    store.segment(1)
    assert not await Shipper(store.spool, "", open_grant).once()
    assert len(list(store.spool.iterdir())) == 1


async def test_a_file_that_cannot_be_read_stops_no_other(store: Store) -> None:
    (store.spool / f"{REPLICA}-00000001.seg").mkdir()
    store.segment(2)
    assert not await Shipper(store.spool, await store.lend(), open_grant).once()
    assert store.shipped() == [f"{REPLICA}-00000002.seg"]


async def test_a_link_ships_nothing_of_what_it_leads_to(store: Store, tmp_path: Path) -> None:
    """Scoring code may have fewer rights than the shipper: it must not read other files by way of it."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"not yours")
    (store.spool / f"{REPLICA}-00000001.seg").symlink_to(secret)
    (store.spool / f"{REPLICA}-00000002.live").symlink_to(secret)
    os.mkfifo(store.spool / f"{REPLICA}-00000003.seg")
    store.segment(4)
    async with asyncio.timeout(5):
        assert not await Shipper(store.spool, await store.lend(), open_grant).once()
    assert store.shipped() == [f"{REPLICA}-00000004.seg"] and secret.read_bytes() == b"not yours"


def command(store: Store, url: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "modelyard.scoring", "ship", "--spool", str(store.spool), "--grant", url, *more]


async def test_once_as_a_program(store: Store) -> None:
    store.segment(1)
    url = await store.lend()
    done = await asyncio.to_thread(subprocess.run, command(store, url, "--once"), capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert store.shipped() == [f"{REPLICA}-00000001.seg"]
    await store.grants.revoke("default", "iris")
    store.segment(2)
    done = await asyncio.to_thread(subprocess.run, command(store, url, "--once"), capture_output=True, timeout=30)
    assert done.returncode == 1 and b"revoked" in done.stderr


async def test_sigterm_ships_what_is_closed_and_ends(store: Store) -> None:
    process = await asyncio.to_thread(subprocess.Popen, command(store, await store.lend()), stderr=subprocess.PIPE)
    try:
        store.segment(1)
        await until(lambda: bool(store.shipped()), 20)
        os.kill(process.pid, signal.SIGSTOP)
        store.segment(2)
        (store.spool / "1-ffffffff-00000001.live").write_bytes(b"its writer is dead")
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGCONT)
        assert await asyncio.to_thread(process.wait, 10) == 0
        assert len(store.shipped()) == 3 and not list(store.spool.iterdir())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def test_it_needs_the_standard_library_only() -> None:
    """It runs beside user code, on devices too: nothing of ours or others' may come along."""
    code = ("import sys, modelyard.scoring.shipper, modelyard.adapters.blobs_dir, modelyard.scoring.capture;"
            "print([m for m in sys.modules if m.split('.')[0] in "
            "('pydantic', 'numpy', 'aiohttp', 'grpc', 'orjson', 'pyarrow')])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "[]", done.stderr


def policies(pid: int) -> list[int]:
    """The scheduling policy of each thread."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            found.append(os.sched_getscheduler(int(task)))
    return found


async def test_it_works_at_idle_priority(store: Store) -> None:
    process = await asyncio.to_thread(subprocess.Popen, command(store, await store.lend()), stderr=subprocess.PIPE)
    try:
        store.segment(1)
        await until(lambda: bool(store.shipped()), 20)
        assert os.SCHED_IDLE in await asyncio.to_thread(policies, process.pid)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    finally:
        process.terminate()
        assert await asyncio.to_thread(process.wait, 10) == 0


async def paced() -> tuple[Pace, list[tuple[int, bool]]]:
    """How threads of the default executor are scheduled, by how many segments wait."""
    pace = Pace()
    seen = []
    for waiting in (0, BACKLOG, BACKLOG + 1, BACKLOG, 1, 0, 1):
        pace.waiting(waiting)
        seen.append((waiting, await asyncio.to_thread(lambda: os.sched_getscheduler(0) == os.SCHED_IDLE)))
    return pace, seen


def test_it_hurries_from_a_backlog_on_until_nothing_waits() -> None:
    pace, seen = asyncio.run(paced())
    pace.close()
    assert [idle for _, idle in seen] == [True, True, False, False, False, True, True], seen


async def test_a_backlog_is_told_and_worked_off(store: Store) -> None:
    for number in range(8):
        store.segment(number)
    heard: list[int] = []
    assert await Shipper(store.spool, await store.lend(), open_grant, heard.append).once()
    assert heard == [8, 7, 6, 5, 4, 3, 2, 1, 0]
