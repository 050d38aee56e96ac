"""The relay: bytes pass unchanged both ways, the dead are passed over, those who come too early wait."""

from __future__ import annotations

import asyncio
import random
import socket
from asyncio import selector_events
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from modelyard.supervisor import relay as relays
from modelyard.supervisor.relay import Relay

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Replica:
    """A unix socket with a conversation behind it."""

    def __init__(self, path: Path) -> None:
        self.path, self.connections, self.total = path, 0, 0

    def address(self, kind: str) -> str:
        return f"{self.path}.{kind}"

    def load(self, kind: str) -> int:
        return self.connections

    def opened(self, kind: str) -> Callable[[], None]:
        self.connections += 1
        self.total += 1
        return self._closed

    def _closed(self) -> None:
        self.connections -= 1

    @asynccontextmanager
    async def listening(self, talk: Talk) -> AsyncIterator[None]:
        async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await talk(reader, writer)
            except ConnectionError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_unix_server(guarded, self.address("rest"))
        try:
            yield
        finally:
            server.close()


class Front:
    """A relay on a free port, and who may be chosen."""

    def __init__(self) -> None:
        self.ready: list[Replica] = []
        self.relay = Relay("rest", lambda: self.ready)
        self.sock = socket.create_server(("127.0.0.1", 0))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.sock.getsockname())

    async def quiet(self, replica: Replica) -> None:
        async with asyncio.timeout(5):
            while replica.connections:
                await asyncio.sleep(0.01)


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    front = Front()
    await front.relay.start(front.sock)
    yield front
    front.relay.close()
    front.relay.abort()
    await asyncio.sleep(0.01)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


def named(name: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(name)
        await reader.read()

    return talk


async def test_bytes_pass_unchanged_and_a_slow_reader_holds_the_writer_back(front: Front, tmp_path: Path) -> None:
    one = Replica(tmp_path / "a")
    front.ready = [one]
    sent = random.Random(1).randbytes(24 << 20)
    async with one.listening(echo):
        reader, writer = await front.connect()

        async def send() -> None:
            for at in range(0, len(sent), 1 << 20):
                writer.write(sent[at:at + (1 << 20)])
                await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        await asyncio.sleep(0.3)
        assert not sending.done(), "nobody reads yet, so the relay must not swallow it all"
        assert await asyncio.wait_for(reader.read(-1), 30) == sent
        await sending
        writer.close()
        await front.quiet(one)


@pytest.mark.parametrize("first", ["caller", "server"])
async def test_what_an_older_python_reads_too_early_is_not_lost(
        front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Python 3.11.2 reads although it was told to pause when the connection was made."""
    def at_once(self: Any, fd: int, callback: Any, *args: Any) -> None:
        if not self.is_closing():
            self._loop._add_reader(fd, callback, *args)

    monkeypatch.setattr(selector_events._SelectorTransport, "_add_reader", at_once)
    one, sent = Replica(tmp_path / "a"), random.Random(2).randbytes(3 << 20)
    async with one.listening(echo if first == "caller" else named(sent)):
        reader, writer = await front.connect()
        sending = asyncio.create_task(send_all(writer, sent if first == "caller" else b""))
        await asyncio.wait([sending], timeout=0.1)  # it is read, or waits, before there is anybody to have it
        front.ready = [one]
        front.relay.changed()
        assert await asyncio.wait_for(reader.readexactly(len(sent)), 10) == sent
        await sending
        writer.close()
        await front.quiet(one)


async def send_all(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    writer.write_eof()
    await writer.drain()


async def test_a_half_closed_connection_is_answered(front: Front, tmp_path: Path) -> None:
    async def at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d" % len(await reader.read()))

    one = Replica(tmp_path / "a")
    front.ready = [one]
    async with one.listening(at_the_end):
        reader, writer = await front.connect()
        writer.write(b"12345")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 5) == b"5"
        writer.close()
        await front.quiet(one)


async def test_a_server_that_speaks_first_is_heard(front: Front, tmp_path: Path) -> None:
    one = Replica(tmp_path / "a")
    front.ready = [one]
    async with one.listening(named(b"hello")):
        reader, writer = await front.connect()
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        writer.close()
        await front.quiet(one)


async def test_the_one_with_the_fewest_connections_is_chosen(front: Front, tmp_path: Path) -> None:
    both = [Replica(tmp_path / "a"), Replica(tmp_path / "b")]
    front.ready = both
    async with both[0].listening(named(b"a")), both[1].listening(named(b"b")):
        open_ones = [await front.connect() for _ in range(6)]
        assert sorted([await r.readexactly(1) for r, _ in open_ones]) == [b"a"] * 3 + [b"b"] * 3
        for _, writer in open_ones:
            writer.close()
        await asyncio.gather(*(front.quiet(r) for r in both))


async def test_a_dead_replica_is_passed_over(front: Front, tmp_path: Path) -> None:
    dead, alive = Replica(tmp_path / "dead"), Replica(tmp_path / "alive")
    front.ready = [dead, alive]
    async with alive.listening(named(b"!")):
        for _ in range(5):
            reader, writer = await front.connect()
            assert await asyncio.wait_for(reader.readexactly(1), 5) == b"!"
            writer.close()
        await front.quiet(alive)
    assert dead.connections == 0


async def test_a_replica_that_goes_closes_what_it_had(front: Front, tmp_path: Path) -> None:
    async def gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    one = Replica(tmp_path / "a")
    front.ready = [one]
    async with one.listening(gone):
        reader, writer = await front.connect()
        writer.write(b"x")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()
        await front.quiet(one)


async def test_who_comes_before_a_replica_is_ready_waits(front: Front, tmp_path: Path) -> None:
    one = Replica(tmp_path / "a")
    reader, writer = await front.connect()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.3)
    async with one.listening(named(b"!")):
        front.ready = [one]
        front.relay.changed()
        assert await asyncio.wait_for(reader.readexactly(1), 5) == b"!"
        writer.close()
        await front.quiet(one)


async def test_the_wait_is_bounded(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "WAIT_S", 0.2)
    reader, writer = await front.connect()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_who_leaves_while_waiting_leaves_nothing(front: Front, tmp_path: Path) -> None:
    one = Replica(tmp_path / "a")
    _, writer = await front.connect()
    await asyncio.sleep(0.05)
    writer.transport.abort()
    async with one.listening(named(b"!")):
        front.ready = [one]
        front.relay.changed()
        await asyncio.sleep(0.3)
        await front.quiet(one)
        assert not front.relay.open
