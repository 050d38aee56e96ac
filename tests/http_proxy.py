"""A little HTTP proxy: tunnels (CONNECT) and plain forwarding. It alone knows where the hosts of a test are."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """``hosts``: ``NAME:PORT`` → where that is on loopback. ``login``: the Proxy-Authorization that it wants, if any;
    ``seen``: the first line of each request."""

    def __init__(self, hosts: Mapping[str, int]) -> None:
        self.hosts, self.login, self.port = hosts, "", 0
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *headers = head.rstrip().split("\r\n")
        self.seen.append(first)
        method, where, _ = first.split(" ")
        given = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in headers)}
        parts = urlsplit(where)
        port = self.hosts.get(where if method == "CONNECT" else parts.netloc)
        if self.login and given.get("proxy-authorization") != self.login:
            await _end(writer, "407 Proxy Authentication Required")
        elif port is None:
            await _end(writer, "403 Forbidden")
        else:
            far = await asyncio.open_connection("127.0.0.1", port)
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:  # one request a connection: the next may be for another host
                path = parts._replace(scheme="", netloc="").geturl() or "/"
                kept = [line for line in headers if not line.lower().startswith(("proxy-", "connection:"))]
                far[1].write("\r\n".join([f"{method} {path} HTTP/1.1", *kept, "Connection: close\r\n\r\n"])
                             .encode("latin-1"))
            await piped((reader, writer), far)


async def _end(writer: asyncio.StreamWriter, status: str) -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    await writer.drain()
    writer.close()


async def piped(one: Streams, other: Streams) -> None:
    """Both ways, until both have ended."""
    async def way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while chunk := await reader.read(1 << 16):
                writer.write(chunk)
                await writer.drain()
        writer.close()

    await asyncio.gather(way(one[0], other[1]), way(other[0], one[1]))


@asynccontextmanager
async def listening(serve: Callable[..., object], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server on loopback; its connections end with it."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await serve(reader, writer)  # type: ignore[misc]
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
