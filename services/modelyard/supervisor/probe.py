"""Real calls to a replica, with nothing but sockets: HTTP for admin and REST, and one true gRPC call."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, ACK = 1, 1
SERVICE = "/inference.GRPCInferenceService"


class NoAnswer(Exception):
    """Nobody listens, the answer took too long, or it was not one."""


async def _within(seconds: float, call: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(seconds):  # not wait_for: that can swallow a cancellation on Python 3.11
            return await call
    except (OSError, EOFError, ValueError, TimeoutError, asyncio.LimitOverrunError) as exc:
        raise NoAnswer(str(exc) or type(exc).__name__) from exc


async def http(path: str, method: str, target: str, timeout_s: float = 5.0) -> int:
    """The status of an HTTP call over a unix socket. Raises NoAnswer."""
    return await _within(timeout_s, _http(path, method, target))


async def _http(path: str, method: str, target: str) -> int:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
                     "Connection: close\r\n\r\n".encode())
        line = await reader.readline()
        return int(line.split(b" ", 2)[1]) if line.startswith(b"HTTP/1.") else 0
    finally:
        writer.close()


async def grpc_ready(path: str, model: str | None = None, timeout_s: float = 5.0) -> bool:
    """ServerReady, or ModelReady of ``model``, asked over gRPC. Raises NoAnswer."""
    if model is None:
        return await _within(timeout_s, _unary(path, f"{SERVICE}/ServerReady", b"")) == b"\x08\x01"
    name = model.encode()
    body = b"\x0a" + _varint(len(name)) + name
    return await _within(timeout_s, _unary(path, f"{SERVICE}/ModelReady", body)) == b"\x08\x01"


def _varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return struct.pack("!I", len(body))[1:] + struct.pack("!BBI", kind, flags, stream) + body


def _headers(pairs: dict[str, str]) -> bytes:
    """HPACK literals without indexing or Huffman: legal, and needs no table."""
    return b"".join(b"\x00" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in pairs.items())


async def _unary(path: str, method: str, message: bytes) -> bytes:
    """One unary call; the reply's message, empty when there was none (an error status)."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        head = _headers({":method": "POST", ":scheme": "http", ":path": method, ":authority": "localhost",
                         "content-type": "application/grpc", "te": "trailers"})
        writer.write(PREFACE + _frame(SETTINGS, 0, 0, b"") + _frame(HEADERS, 4, 1, head)
                     + _frame(DATA, END_STREAM, 1, b"\x00" + struct.pack("!I", len(message)) + message))
        reply = b""
        while True:
            length, kind, flags, stream = struct.unpack("!IBBI", b"\x00" + await reader.readexactly(9))
            body = await reader.readexactly(length)
            if kind == SETTINGS and not flags & ACK:
                writer.write(_frame(SETTINGS, ACK, 0, b""))
            elif kind == DATA and stream == 1:
                reply += body
            if kind in (RST_STREAM, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
                return reply[5:]
    finally:
        writer.close()
