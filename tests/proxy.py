"""A bad network on order: a TCP proxy before a server, in a thread of its own.

    with Proxy(kafka.port) as wire:        # 127.0.0.1:{wire.port} → 127.0.0.1:{kafka.port}
        wire.freeze()                      # connections stay, nothing comes through, neither way
        wire.cut()                         # every connection is reset, new ones as well
        wire.slow(0.1, 1_000_000)          # each piece 0.1 s later, at so many bytes a second
        wire.cut_once(sent=1_000_000)      # the connection that carries this byte, from now on, is reset; others go on
        wire.heal()

``port`` to listen on may be given. What was held back by ``freeze`` comes through afterwards, as after packet loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Self

PIECE = 1 << 16


class Proxy:
    def __init__(self, to: int, port: int = 0) -> None:
        self.to, self.port = to, port
        self.passed = self.sent = self.got = 0
        """Bytes in all, to the server, and from it."""
        self._cuts: dict[str, int] = {}
        self._mode, self._late_s, self._bytes_s = "pass", 0.0, 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy to {to}", daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- from any thread --------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        self._open = asyncio.Event()
        self._open.set()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", self.port), self._loop).result(10)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def heal(self) -> None:
        """As if it were not there."""
        self._set("pass")

    def freeze(self) -> None:
        """A black hole: connections are taken and kept, and nothing is heard on them."""
        self._set("freeze")

    def cut(self) -> None:
        """Every connection ends with a reset, and so does every new one."""
        self._set("cut")

    def slow(self, late_s: float, bytes_s: float = 0.0) -> None:
        """Each piece arrives ``late_s`` later, and at most ``bytes_s`` bytes a second (0: any number)."""
        self._set("pass", late_s, bytes_s)

    def cut_once(self, sent: int | None = None, got: int | None = None) -> None:
        """So many bytes from now, all connections together, to the server or from it."""
        self._cuts = {way: left for way, left in (("sent", sent), ("got", got)) if left is not None}

    def _set(self, mode: str, late_s: float = 0.0, bytes_s: float = 0.0) -> None:
        done = threading.Event()

        def change() -> None:
            self._mode, self._late_s, self._bytes_s = mode, late_s, bytes_s
            (self._open.clear if mode == "freeze" else self._open.set)()
            if mode == "cut":
                for writer in list(self._writers):
                    writer.transport.abort()
            done.set()

        self._call(change)
        done.wait(10)

    def _call(self, fn: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(fn)

    # -- in the thread ----------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._mode == "cut":
                return
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.to)
            self._writers |= {writer, far_writer}
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, far_writer, "sent"))
                    group.create_task(self._pump(far_reader, writer, "got"))
            finally:
                self._writers -= {writer, far_writer}
                far_writer.transport.abort()
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            return
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        while piece := await reader.read(PIECE):
            last = self._is_cut(way, len(piece))
            await self._open.wait()
            if late := self._late_s + (len(piece) / self._bytes_s if self._bytes_s else 0.0):
                await asyncio.sleep(late)
            writer.write(piece)
            await writer.drain()
            self.passed += len(piece)
            setattr(self, way, getattr(self, way) + len(piece))
            if last:
                raise ConnectionResetError
        with contextlib.suppress(OSError):
            writer.write_eof()

    def _is_cut(self, way: str, size: int) -> bool:
        if way not in self._cuts:
            return False
        self._cuts[way] -= size
        return self._cuts[way] <= 0 and self._cuts.pop(way) <= 0

    async def _end(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
