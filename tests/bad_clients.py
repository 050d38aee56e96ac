"""Clients that no server wishes for: who reads nothing, who only connects, who begins and leaves. Each is a context
manager that has what it does under way when it is entered, and everything closed when it is left."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import h2.config
import h2.connection

from tests.raw_h2 import RawClient, framed

INFER, STREAM = (f"/inference.GRPCInferenceService/{name}" for name in ("ModelInfer", "ModelStreamInfer"))
LEAVE = struct.pack("ii", 1, 0)
"""SO_LINGER: the connection is reset instead of closed."""


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    """An HTTP/1.1 request; ``length``: what it says that its body has, where it lies."""
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body) if length is None else length}\r\n\r\n").encode() + body


def connected(address: str, receive_bytes: int = 0) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.socket()
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(10)
    sock.connect((host, int(port)))
    return sock


@contextlib.contextmanager
def slow_readers(address: str, message: bytes, connections: int, calls: int) -> Iterator[None]:
    """On each connection so many calls whose answers nobody reads: their windows are never opened again."""
    with contextlib.ExitStack() as stack:
        for _ in range(connections):
            client = stack.enter_context(RawClient(address, credit=False))
            client.read(5)  # the server's settings: its windows
            asked = 0
            for _ in range(calls):
                whole = framed(message)
                if client.send(client.call(INFER), whole, end=True) < len(whole):
                    break  # it does not read from us any more either
                asked += 1
                client.read(0.001)
            assert asked, "nothing was asked"
        yield


@contextlib.contextmanager
def slow_readers_rest(address: str, path: str, body: bytes, connections: int, calls: int) -> Iterator[None]:
    """The same by HTTP/1.1: pipelined requests."""
    with contextlib.ExitStack() as stack:
        for _ in range(connections):
            sock = stack.enter_context(connected(address, 4096))
            sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                for _ in range(calls):
                    sock.sendall(post(path, body))
        yield


@contextlib.contextmanager
def idlers(address: str, count: int, preface: bool) -> Iterator[None]:
    """Connections on which nothing happens. ``preface``: HTTP/2 is begun on them."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(RawClient(address) if preface else connected(address))
        yield


@contextlib.contextmanager
def leavers(address: str, begun: bytes, every_s: float = 0.01) -> Iterator[None]:
    """A client that again and again connects, sends what it has begun, and is gone."""
    stop, failed = threading.Event(), []

    def come_and_go() -> None:
        while not stop.is_set():
            try:
                with connected(address) as sock:
                    sock.sendall(begun)
                    time.sleep(every_s / 2)  # what it sent is being read
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LEAVE)
                stop.wait(every_s / 2)
            except OSError as exc:
                failed.append(exc)
                return

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(15)
        assert not failed, failed


def half_streams(message: bytes, count: int = 20) -> bytes:
    """The bytes of an HTTP/2 connection with so many calls that are not sent to their end."""
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    http.initiate_connection()
    for n in range(count):
        stream = http.get_next_available_stream_id()
        http.send_headers(stream, [(":method", "POST"), (":scheme", "http"), (":path", STREAM if n % 2 else INFER),
                                   (":authority", "localhost"), ("content-type", "application/grpc"),
                                   ("te", "trailers")])
        http.send_data(stream, framed(message)[:-1] if n % 4 < 2 else framed(message))
    return http.data_to_send()
