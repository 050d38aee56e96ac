"""One connection of a caller, as long as it speaks plain HTTP/1.1: bytes in, calls to the plane, bytes out.

There is no task and no stream: what one turn of the event loop brings goes into the model's queue in that turn, and
so is batched. At the first request that is not plain (chunked, HTTP/1.0, malformed …) the connection goes over to
aiohttp for good.
"""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import Callable
from typing import Any, cast

from ..core.errors import ModelyardError
from . import rest_wire
from .calls import Answer
from .dataplane import DataPlane
from .rest import Reply, Site, refusal
from .rest_wire import Head

Other = Callable[[], asyncio.Protocol]
APART_BYTES = 65_536
"""A larger body is not copied behind its head."""


class Door:
    """What the connections of one address share. ``other`` gives, when it is there, what makes the protocol that takes
    what is not plain."""

    def __init__(self, plane: DataPlane, site: Site, other: Callable[[], asyncio.Future[Other]]) -> None:
        self.plane, self.site, self.other = plane, site, other
        self.limit = plane.limits.max_message_bytes
        self.open: set[Connection] = set()
        self.time = asyncio.get_running_loop().time

    def __call__(self) -> Connection:
        return Connection(self)

    def sweep(self, idle_s: float, body_s: float) -> None:
        """Ends connections on which nothing has come for so long: between requests, and in the middle of one."""
        now = self.time()
        for connection in list(self.open):
            connection.expire(now - idle_s, now - body_s)

    def close(self) -> None:
        """Ends every connection; what was written still leaves."""
        for connection in list(self.open):
            connection.close()


class Connection(asyncio.Protocol):
    """One request at a time; what comes behind it waits, and its caller is not read from meanwhile."""

    __slots__ = ("_begun", "_busy", "_door", "_head", "_job", "_kept", "_later", "_missing", "_parts", "_since",
                 "_stalled", "_taking", "_transport", "_work")

    def __init__(self, door: Door) -> None:
        self._door = door
        self._transport: asyncio.Transport | None = None
        self._head: Head | None = None
        self._kept = b""
        """The bytes that ``_head`` was read from: callers mostly send the same again."""
        self._begun = b""
        """A head that is not whole."""
        self._later = b""
        self._parts: list[bytes] = []
        self._missing = 0
        self._job: Any = None
        self._work: asyncio.Future[Reply] | None = None
        self._busy = self._taking = self._stalled = False
        self._since = door.time()

    @property
    def unfinished(self) -> bool:
        """An answer is under way."""
        return self._busy or (self._transport is not None and self._transport.get_write_buffer_size() > 0)

    @property
    def reading(self) -> bool:
        """In the middle of a request, or of handing one over."""
        return self._missing > 0 or bool(self._begun) or self._taking

    def expire(self, idle: float, body: float) -> None:
        """Nothing came since: the connection ends, of a request that is not whole with an answer."""
        if self._transport is None or self.unfinished:
            return
        if self.reading and self._since < body:
            reply = refusal(408)
            self._transport.write(rest_wire.head(reply, True) + reply.body)
            self.close()
        elif not self.reading and self._since < idle:
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._door.open.add(self)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a caller's machine that is gone is noticed

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._door.open.discard(self)
        self._parts, self._later, self._begun = [], b"", b""
        if self._job is not None:
            self._door.plane.cancel(self._job)

    def pause_writing(self) -> None:
        self._stalled = True

    def resume_writing(self) -> None:
        self._stalled = False
        self._go_on()

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():  # TLS still reads while it closes
            return
        self._since = self._door.time()
        if self._missing:
            self._body(data)
        elif self._busy or self._stalled or self._later:
            self._later += data
            transport.pause_reading()
        else:
            self._take(self._begun + data)

    def _body(self, data: bytes) -> None:
        """More of a body of which something is missing."""
        missing = self._missing
        self._parts.append(data if len(data) <= missing else data[:missing])
        self._missing = max(0, missing - len(data))
        if not self._missing:
            body, self._parts = b"".join(self._parts), []
            self._later = data[missing:]
            assert self._head is not None
            self._ask(self._head, body)
            self._go_on()

    def _go_on(self) -> None:
        """With what came behind a request that has its answer now."""
        if self._taking or self._busy or self._stalled or self._transport is None or self._transport.is_closing():
            return
        if self._later:
            data, self._later = self._later, b""
            self._take(data)
        if not self._later and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _take(self, data: bytes) -> None:
        """Requests, from the beginning of one, until one has to wait for its answer or its body."""
        self._taking, self._begun = True, b""
        while data and not (self._busy or self._stalled):
            end = data.find(b"\r\n\r\n") + 4
            if end < 4 and rest_wire.begun(data):
                self._begun, data = data, b""
                break
            raw = data[:end]
            if raw != self._kept:
                head = rest_wire.read(self._door.site, raw, self._door.limit)
                if head is None:
                    self._hand_over(data)
                    return
                self._head, self._kept = head, raw
            assert self._head is not None
            stop = end + self._head.length
            if len(data) < stop:
                self._parts, self._missing, data = [data[end:]], stop - len(data), b""
                break
            body, data = data[end:stop], data[stop:]
            self._ask(self._head, body)
            if self._transport is None or self._transport.is_closing():
                data = b""
        self._taking = False
        if data:
            self._later = data

    def _ask(self, head: Head, body: bytes) -> None:
        door, found = self._door, head.found
        try:
            if found.work is not None:
                self._busy = True
                self._work = asyncio.ensure_future(found.work())
                self._work.add_done_callback(self._worked)
                return
            if found.ask is None:
                self._answer(door.site.tell(found, head.headers, head.query))
                return
            call = found.ask(found, head.headers, body)
        except ModelyardError as exc:
            self._answer(door.site.failed(exc, head.headers))
            return
        except Exception:  # noqa: BLE001 - whatever it is, the caller is told and the server goes on
            traceback.print_exc()
            self._answer(refusal(500))
            return
        self._busy = True
        job = door.plane.submit(call, self._done)
        if self._busy:
            self._job = job

    def _done(self, answer: Answer) -> None:
        self._busy, self._job = False, None
        if self._transport is not None:
            self._answer(self._door.site.answered(answer))
            if self._later:
                self._go_on()

    def _worked(self, work: asyncio.Future[Reply]) -> None:
        self._busy, self._work = False, None
        if work.cancelled():
            self.close()
            return
        if (error := work.exception()) is not None:
            traceback.print_exception(error)
        if self._transport is not None:
            self._answer(work.result() if error is None else refusal(500))
            self._go_on()

    def _answer(self, reply: Reply) -> None:
        asked, transport = self._head, self._transport
        assert asked is not None and transport is not None
        last = asked.last or self._door.plane.draining
        head, body = rest_wire.head(reply, last), b"" if asked.bare else reply.body
        if len(body) < APART_BYTES:
            transport.write(head + body)
        else:
            transport.writelines((head, body))
        if last:
            transport.close()

    def _hand_over(self, data: bytes) -> None:
        """To aiohttp, with what is not plain and all that comes behind it; until it is there nothing more is read."""
        assert self._transport is not None
        self._later = data
        self._transport.pause_reading()
        self._door.other().add_done_callback(self._switch)

    def _switch(self, opened: asyncio.Future[Other]) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if opened.cancelled() or opened.exception() is not None:
            self.close()
            return
        transport, self._transport = self._transport, None
        self._door.open.discard(self)
        data, self._later = self._later, b""
        other = opened.result()()
        transport.set_protocol(other)
        other.connection_made(transport)
        transport.resume_reading()
        other.data_received(data)
