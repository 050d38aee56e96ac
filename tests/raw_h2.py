"""A client of HTTP/2 that writes what it is told, right or wrong, and sees what comes back frame by frame."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.exceptions

Header = tuple[str, str]


@dataclass
class Heard:
    """What came back on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    trailers: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> str:
        """``grpc-status``, wherever it is."""
        return self.trailers.get("grpc-status") or self.headers.get("grpc-status", "")

    @property
    def refused(self) -> bool:
        """It was not answered with success; a server may also reset the stream or cut the connection."""
        return self.status not in ("", "0") or self.reset is not None or (not self.ended and not self.trailers)

    @property
    def message(self) -> str:
        return self.trailers.get("grpc-message") or self.headers.get("grpc-message", "")


class RawClient:
    """One connection. ``credit=False``: flow-control windows are never opened again, as by a client that reads
    nothing."""

    def __init__(self, address: str, credit: bool = True) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(
            client_side=True, header_encoding="utf-8", validate_outbound_headers=False,
            normalize_outbound_headers=False))
        # The library takes a GOAWAY for the end; gRPC's say that there will be no new calls.
        open_, goaway = h2.connection.ConnectionState.CLIENT_OPEN, h2.connection.ConnectionInputs.RECV_GOAWAY
        machine = self.http.state_machine
        machine._transitions = machine._transitions | {(open_, goaway): (None, open_)}
        self.credit = credit
        self.heard: dict[int, Heard] = {}
        self.pings: list[bytes] = []
        self.goaway: int | None = None
        self.closed = False
        self.http.initiate_connection()
        self._push()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def call(self, path: str, *more: Header, method: str = "POST", kind: str | None = "application/grpc",
             te: bool = True, end: bool = False) -> int:
        """Sends the headers of a call; its stream's number."""
        stream = self.http.get_next_available_stream_id()
        self.heard[stream] = Heard()
        headers = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "localhost")]
        headers += ([("content-type", kind)] if kind else []) + ([("te", "trailers")] if te else []) + list(more)
        self.http.send_headers(stream, headers, end_stream=end)
        self._push()
        return stream

    def send(self, stream: int, data: bytes, end: bool = False) -> int:
        """As much as the server's windows take now; how much that was. ``end`` only when it was all."""
        at = 0
        while at < len(data):
            room = min(self.http.local_flow_control_window(stream), self.http.max_outbound_frame_size, len(data) - at)
            if not room:
                break
            self.http.send_data(stream, data[at:at + room])
            at += room
        if end and at == len(data):
            self.http.end_stream(stream)
        self._push()
        return at

    def reset(self, stream: int, code: int = 8) -> None:
        self.http.reset_stream(stream, code)
        self._push()

    def ping(self, data: bytes = b"ping-me!") -> None:
        self.http.ping(data)
        self._push()

    def until(self, done: Callable[[], bool], seconds: float = 10) -> None:
        """Reads until ``done``, or fails."""
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"nothing of the kind came in {seconds} s: {self.heard}"
            assert not self.closed, f"the connection was closed: {self.heard}"
            self.read(0.05)

    def answer(self, stream: int, seconds: float = 10) -> Heard:
        """What came back on a stream, once it ended or the connection did."""
        heard = self.heard[stream]
        self.until(lambda: heard.ended or heard.reset is not None or self.closed, seconds)
        return heard

    def read(self, seconds: float) -> None:
        """Takes in what comes within so many seconds (one packet)."""
        self.socket.settimeout(seconds)
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return
        try:
            events = self.http.receive_data(data)
        except h2.exceptions.ProtocolError:  # the server goes on after its GOAWAY, which the library does not like
            self.closed = True
            return
        for event in events:
            self._hear(event)
        self._push()

    def _hear(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived():
                self.heard[event.stream_id].headers = dict(event.headers)
            case h2.events.TrailersReceived():
                self.heard[event.stream_id].trailers = dict(event.headers)
            case h2.events.DataReceived():
                self.heard[event.stream_id].body += event.data
                if self.credit and event.flow_controlled_length:
                    self.give_credit(event.stream_id, event.flow_controlled_length)
            case h2.events.StreamEnded():
                self.heard[event.stream_id].ended = True
            case h2.events.StreamReset():
                self.heard[event.stream_id].reset = int(event.error_code or 0)
            case h2.events.PingAckReceived():
                self.pings.append(event.ping_data)
            case h2.events.ConnectionTerminated():
                self.goaway = int(event.error_code or 0)
                self.closed = self.goaway != 0

    def give_credit(self, stream: int, size: int) -> None:
        """Opens the windows again, as if so much had been read."""
        self.http.increment_flow_control_window(size)
        with contextlib.suppress(h2.exceptions.StreamClosedError):  # its end came in the same packet
            self.http.increment_flow_control_window(size, stream)

    def _push(self) -> None:
        data = self.http.data_to_send()
        if data and not self.closed:
            self.socket.settimeout(10)
            try:
                self.socket.sendall(data)
            except ConnectionError:
                self.closed = True


def framed(*messages: bytes, flag: int = 0) -> bytes:
    """Messages as gRPC frames."""
    return b"".join(bytes([flag]) + len(m).to_bytes(4, "big") + m for m in messages)


def unframed(body: bytes | bytearray) -> list[bytes]:
    """The messages of a body of whole frames."""
    found, at = [], 0
    while at < len(body):
        end = at + 5 + int.from_bytes(body[at + 1:at + 5], "big")
        assert body[at] == 0 and len(body) >= max(end, at + 5), "a frame is cut"
        found.append(bytes(body[at + 5:end]))
        at = end
    return found
