"""gRPC over h2corn: HTTP/2 in Rust, the calls in this process's event loop, gRPC itself in ``h2_app``.

The listening socket is ours and outlives the servers on it. To send clients away, another server takes over the
socket and the old one says GOAWAY: what is under way there is answered, and nobody meets a closed door.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any, cast

from h2corn import Config, Server
from h2corn._lib import prepare_tls
from h2corn._server import load_tls_material

from .dataplane import DataPlane
from .h2_app import H2App
from .transport import Tls, Transport, listen

AGE_S = 300.0
"""Connections are sent on after this long, so that they spread over replicas that were not there before. Whoever knows
of such replicas calls ``spread``, and nobody waits."""
FOR_EVER_S = 30 * 86_400.0
STREAMS = 2_000
WINDOW = 8 << 20
STALLED_S = 300.0
"""A caller that reads nothing of its answer for so long is cut off."""
LAST_S = 1.0


class H2Transport(Transport):
    """Servers of h2corn, one after the other, on one socket."""

    name = "grpc"
    library = "h2corn"

    def __init__(self, address: str, plane: DataPlane, tls: Tls | None = None) -> None:
        self._address = address
        self._app = H2App(plane)
        self._config = _config(tls)
        self._tls: Any = None
        self._socket: socket.socket | None = None
        self._server: Server | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._ageing: asyncio.Task[None] | None = None

    async def start(self) -> str:
        self._socket, address = listen(self._address)
        try:
            self._tls = prepare_tls(self._config, load_tls_material(self._config))
        except (ValueError, RuntimeError) as exc:
            raise OSError(f"the TLS files cannot be used: {exc}") from exc
        await self._take_over()
        self._ageing = asyncio.create_task(self._age())
        return address

    async def loaded(self) -> None:
        self._app.health.say(True)

    async def drain(self) -> None:
        """Connections end when their calls do; new ones are taken as before, for whoever has not heard yet."""
        self._app.health.say(False, closing=True)
        await self._take_over()

    async def spread(self) -> None:
        await self._take_over()

    async def stop(self, grace_s: float) -> None:
        if self._ageing is not None:
            self._ageing.cancel()
        if self._server is not None:
            self._app.cork.leave()
            self._server.shutdown()
        self._app.leave()
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)
        if self._running:
            self._app.drop()
            await asyncio.wait(self._running, timeout=LAST_S)
        if self._socket is not None:
            self._socket.close()

    async def _take_over(self) -> None:
        """A new server on the socket; the one before it says GOAWAY and ends when its last call does."""
        assert self._socket is not None
        before, server = self._server, Server(cast(Any, self._app), self._config)
        # Not serve(): it would print a banner for each server, and close a socket that we still need.
        task = asyncio.create_task(server._serve_worker_fds([os.dup(self._socket.fileno())], prepared_tls=self._tls))
        self._running.add(task)
        task.add_done_callback(self._ended)
        await server.wait_started()
        await self._app.cork.look()
        self._server = server
        if before is not None:
            before.shutdown()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        with suppress(asyncio.CancelledError, RuntimeError):  # RuntimeError: calls that ignored their cancellation
            task.result()

    async def _age(self) -> None:
        seen = 0
        while True:
            await asyncio.sleep(AGE_S)
            if self._app.seen != seen:
                seen = self._app.seen
                await self._take_over()


def _config(tls: Tls | None) -> Config:
    """Sizes of gRPC's bodies and how long they take are looked at by us: the server would answer with what says nothing
    to gRPC, and a timer of its own for each call wakes its thread twice, which costs as much as the call."""
    return Config(
        bind=("fd://0",), grpc=True, http1=False, access_log=False, lifespan="off", date_header=False,
        runtime_threads=1, max_concurrent_streams=STREAMS,
        h2_initial_stream_window_size=WINDOW, h2_initial_connection_window_size=2 * WINDOW,
        timeout_graceful_shutdown=FOR_EVER_S, timeout_keep_alive=0, timeout_handshake=20.0,
        h2_timeout_response_stall=STALLED_S,
        **_tls_files(tls))


def _tls_files(tls: Tls | None) -> dict[str, Any]:
    if tls is None:
        return {}
    files = {"certfile": tls.cert, "keyfile": tls.key}
    return files if tls.client_ca is None else {**files, "ca_certs": tls.client_ca, "cert_reqs": "required"}
