"""The public sockets: bytes of each connection go to one replica and back, and nothing is looked at.

A connection belongs to one replica for its life. A new one goes to the ready replica of the serving generation that
has the fewest of its kind; when that one turns out to be dead it goes to another; when none is ready it waits, bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable
from typing import Protocol

WAIT_S = 20.0
HIGH_WATER = 512 * 1024


class Backend(Protocol):
    """What the relay needs of a replica."""

    connections: int

    def load(self, kind: str) -> int: ...

    def address(self, kind: str) -> str: ...

    def opened(self, kind: str) -> Callable[[], None]: ...


Choices = Callable[[], Iterable[Backend]]
"""The replicas that may take a new connection at this moment."""


class _End(asyncio.Protocol):
    """One end of a relayed connection, not reading before its ``peer``, the other end, is there."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.transport: asyncio.Transport | None = None
        self.peer: _End | None = None
        self.ended = False
        self._done = done
        self._early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(HIGH_WATER)
        transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        if self.peer is None:
            self._kept(data)
        else:
            self.peer.transport.write(data)  # type: ignore[union-attr]

    def _kept(self, data: bytes) -> None:
        """Python before gh-103607 (3.11.2, which Debian 12 has) begins to read although ``connection_made`` has paused
        it, and believes that it has not: what was read is kept for the peer, and reading is paused indeed."""
        assert self.transport is not None
        self._early += data
        self.transport.resume_reading()
        self.transport.pause_reading()

    def flow(self) -> None:
        """Both ends are there: reads begin, behind what was read too early."""
        assert self.transport is not None and self.peer is not None and self.peer.transport is not None
        if self._early:
            self.peer.transport.write(self._early)
            self._early = b""
        if self.ended and self.peer.transport.can_write_eof():
            self.peer.transport.write_eof()
        self.transport.resume_reading()

    def eof_received(self) -> bool:
        """The other direction goes on until it ends too."""
        self.ended = True
        other = self.peer
        if other is None:  # read too early, as above
            return True
        if other.ended or other.transport is None or other.transport.is_closing():
            return False
        if other.transport.can_write_eof():
            other.transport.write_eof()
        return True

    def pause_writing(self) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.close()
        self._done()


class _Public(_End):
    """The caller's end: finds a replica first, reads afterwards."""

    def __init__(self, relay: Relay) -> None:
        super().__init__(self._gone)
        self._relay = relay
        self._joining: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._relay.open.add(self)
        self._joining = asyncio.get_running_loop().create_task(self._join())

    async def _join(self) -> None:
        assert self.transport is not None
        other = await self._relay.connect()
        if other is None or self.transport.is_closing():
            self.transport.close()
            if other is not None and other.transport is not None:
                other.transport.close()
            return
        self.peer, other.peer = other, self
        if other.ended:
            self.transport.close()
            return
        self.flow()
        other.flow()

    def _gone(self) -> None:
        self._relay.open.discard(self)
        if self._joining is not None and not self._joining.done() and self.peer is None:
            self._joining.cancel()


class Relay:
    """One public socket. ``kind`` is ``grpc`` or ``rest``: which of a replica's private sockets it leads to."""

    def __init__(self, kind: str, choices: Choices) -> None:
        self.kind = kind
        self.open: set[_Public] = set()
        self._choices = choices
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Event()

    async def start(self, sock: socket.socket) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: _Public(self), sock=sock, backlog=4096)

    def changed(self) -> None:
        """The choices are others now: connections that wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def choose(self, choices: Iterable[Backend]) -> Backend:
        """Who gets the next connection."""
        return min(choices, key=lambda b: (b.load(self.kind), b.connections))

    async def connect(self) -> _End | None:
        """A connection to some ready replica, not reading yet; None when there was none for ``WAIT_S``."""
        loop = asyncio.get_running_loop()
        until = loop.time() + WAIT_S
        dead: set[int] = set()
        while True:
            changed = self._changed
            choices = [b for b in self._choices() if id(b) not in dead]
            if choices:
                backend = self.choose(choices)
                end = await self._reach(backend)
                if end is not None:
                    return end
                dead.add(id(backend))
                continue
            left = until - loop.time()
            if left <= 0:
                return None
            dead.clear()
            with contextlib.suppress(TimeoutError):  # a death is noticed in moments: a short nap when none is announced
                async with asyncio.timeout(min(left, 0.1)):
                    await changed.wait()

    async def _reach(self, backend: Backend) -> _End | None:
        closed = backend.opened(self.kind)
        end = _End(closed)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: end, backend.address(self.kind))
        except OSError:
            if end.transport is None:
                closed()
            return None
        except BaseException:
            if end.transport is None:
                closed()
            else:
                end.transport.abort()
            raise
        return end

    def close(self) -> None:
        """Listens no longer; open connections go on."""
        if self._server is not None:
            self._server.close()

    def abort(self) -> None:
        """Cuts what is open."""
        for end in list(self.open):
            if end.transport is not None:
                end.transport.abort()
