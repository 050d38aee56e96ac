"""HTTP without sockets: the same routes, frames and problems, and ``Peers`` as it is; only the wire is a call.

What a server does goes on when its caller dies, as over a wire; when the server dies the caller sees a cut connection.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import aiohttp
from aiohttp import streams, web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import HttpVersion11
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from modelyard.core.errors import Unavailable
from modelyard.kernel.forward import Peers

from .shaken import Process

LIMIT = 1 << 16


class Answer:
    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body

    async def read(self) -> bytes:
        return self.body


class Network:
    """Which processes answer for which host."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.servers: dict[str, dict[Process, web.Application]] = {}

    def listen(self, host: str, process: Process, app: web.Application) -> None:
        self.servers.setdefault(host, {})[process] = app

    def gone(self, process: Process) -> None:
        for there in self.servers.values():
            there.pop(process, None)

    async def request(self, caller: Process, method: str, url: URL, data: bytes | None,
                      headers: dict[str, str]) -> Answer:
        """One request to one of the servers of a host. A ClientConnectionError whenever it may or may not be done."""
        async def there() -> Answer:
            servers = self.servers.get(url.host or "")
            if not servers:
                raise aiohttp.ClientConnectionError(f"nobody answers at {url.host}")
            process, app = self.dice.choice(list(servers.items()))
            task = asyncio.get_running_loop().create_task(_answered(app, method, url, data, headers))
            process.tasks.add(task)
            task.add_done_callback(process.tasks.discard)
            await asyncio.wait({task})
            if task.cancelled() or process.dead:
                raise aiohttp.ClientConnectionError("the connection was cut")
            return task.result()

        try:
            return cast(Answer, await caller.around(f"{method} {url.path}", "network", there))
        except Unavailable as exc:
            raise aiohttp.ClientConnectionError(exc.message) from exc


class Session:
    """What ``Peers`` sees of aiohttp's client."""

    closed = False

    def __init__(self, network: Network, process: Process) -> None:
        self.network, self.process = network, process

    @asynccontextmanager
    async def request(self, method: str, url: URL, *, data: bytes | None = None, headers: dict[str, str],
                      **how: Any) -> AsyncIterator[Answer]:
        yield await self.network.request(self.process, method, url, data, headers)

    async def close(self) -> None:
        return


def peers(network: Network, process: Process, names: Any, token: str) -> Peers:
    """The real client of one process, on this wire."""
    made = Peers({name: f"http://{name}" for name in names}, token)
    made._session = cast(Any, Session(network, process))
    return made


class _Wire:
    """What a request touches of its connection: nothing is ever full, cut or peeked at."""

    transport = peername = sockname = sslcontext = None
    ssl_context = None
    _reading_paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        return

    def resume_reading(self, **how: bool) -> None:
        return


async def _answered(app: web.Application, method: str, url: URL, data: bytes | None, headers: dict[str, str]) -> Answer:
    loop, wire, payload = asyncio.get_running_loop(), cast(Any, _Wire()), streams.EMPTY_PAYLOAD
    sent = CIMultiDict({"Host": url.host or "", **headers})
    if data is not None:
        payload = streams.StreamReader(wire, LIMIT, loop=loop)
        payload.feed_data(data)
        payload.feed_eof()
        sent["Content-Length"] = str(len(data))
    target = url.relative()
    message = RawRequestMessage(method, str(target), HttpVersion11, CIMultiDictProxy(sent), (), False, None, False,
                                False, target)
    request = web.Request(message, payload, wire, wire, cast(Any, asyncio.current_task()), loop)
    response = await app._handle(request)
    body = getattr(response, "body", b"")
    return Answer(response.status, bytes(body) if isinstance(body, bytes | bytearray) else b"")
