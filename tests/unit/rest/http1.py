"""HTTP/1.1 as bytes on a socket, against REST servers in this process."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelyard.scoring.dataplane import DataPlane
from modelyard.scoring.transport_direct import DirectTransport
from modelyard.scoring.transport_rest import RestTransport

CARRIERS = {"aiohttp": RestTransport, "direct": DirectTransport}
WAIT_S = 20.0
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Answered:
    """One response. ``head``: all of it, with what differs from call to call blanked."""

    status: int
    head: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Caller:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, bare: bool = False) -> Answered:
        """The next response. ``bare``: one without its body. Raises EOFError when the connection ends before it."""
        async with asyncio.timeout(WAIT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            headers = {name.lower(): value for name, value in re.findall(r"([\w-]+): (.*)\r\n", head)}
            status = int(head.split(" ", 2)[1])
            size = 0 if bare or status == 100 else int(headers["content-length"])
            body = await self.reader.readexactly(size)
        for unlike in (r"[0-9a-f]{32}", r"(?<=Date: ).*"):
            head = re.sub(unlike, "…", head)
        return Answered(status, head, body, headers)

    async def ended(self) -> bool:
        """Whether the server has closed, or closes soon, without another byte."""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read(1) == b""
        return True

    async def is_open(self) -> bool:
        """Whether another request is answered."""
        self.send(LIVE)
        return (await self.answer()).body == b'{"live":true}'


@contextlib.asynccontextmanager
async def carried(plane: DataPlane, carrier: str, address: str = "127.0.0.1:0", **how: Any) \
        -> AsyncIterator[tuple[RestTransport, str]]:
    """A REST server over the plane, and its address."""
    transport = CARRIERS[carrier](address, plane, **how)
    try:
        yield transport, await transport.start()
    finally:
        await transport.stop(5)


@contextlib.asynccontextmanager
async def calling(address: str, **how: Any) -> AsyncIterator[Caller]:
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address[5:])
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), **how)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()


def post(body: bytes = b"[1]", path: str = "/score", headers: Sequence[str] = (), length: int | None = None) -> bytes:
    """A plain request."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(path: str = "/v2", method: str = "GET", version: str = "1.1", headers: Sequence[str] = ("Host: x",)) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", *headers, "", ""]).encode()


def chunked(*chunks: bytes, path: str = "/score", headers: Sequence[str] = ()) -> bytes:
    head = "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", *headers, "", ""]).encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
