"""No answered call is lost when server and shipper are killed together, again and again, under load: by REST, and by
gRPC on both transports, call by call and in streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest

from modelyard.core.inference import Inference, write_request
from modelyard.core.layout import segments_prefix
from modelyard.core.tensors import Tensor
from modelyard.telemetry import rows
from modelyard.telemetry.model import Process
from modelyard.telemetry.spans import Span
from tests.contract.transports import INFER, STREAM, streamed
from tests.unit.scoring.roots import make_root
from tests.unit.telemetry.bench import Bench, bench

CLIENTS = 12
AHEAD = 4
"""Messages of a stream that wait for their answers."""
SCORE = "def init():\n    pass\n\n\ndef run(data):\n    return {'sum': float(sum(data['data']))}\n"
OWN_CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]


@dataclass
class Life:
    """A scoring server and a shipper in one process group, as one container would hold them."""

    server: subprocess.Popen[bytes]
    shipper: subprocess.Popen[bytes]
    socket: Path
    grpc: str
    log: Path

    @classmethod
    def begin(cls, root: Path, folder: Path, number: int, grant: str, transport: str) -> Life:
        base = getattr(sys, "_base_executable", sys.executable)
        launch = [base, "-I", "-S", str(root / "launch.py")]
        socket, log = folder / f"{number}.http", folder / f"{number}.log"
        environ = {"PATH": os.environ["PATH"], "MODELYARD_DEPLOYMENT": "iris", "MODELYARD_IMAGE": "iris-scorer:7",
                   "MODELYARD_REPLICA": str(number % 2), "MODELYARD_CAPTURE": json.dumps({"enabled": True})}
        with log.open("wb") as out:
            server = subprocess.Popen(
                [*launch, "serve", "--grpc", f"unix:{folder}/{number}.grpc", "--http", f"unix:{socket}", "--admin",
                 f"unix:{folder}/{number}.admin", "--spool", str(folder / "spool"), "--transport", transport],
                env=environ, stdout=out, stderr=out, process_group=0)
            shipper = subprocess.Popen(
                [*launch, "ship", "--spool", str(folder / "spool"), "--grant", grant], env=environ, stdout=out,
                stderr=out, process_group=server.pid)
        return cls(server, shipper, socket, f"unix:{folder}/{number}.grpc", log)

    def kill(self) -> None:
        """SIGKILL to both at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait(10)
        self.shipper.wait(10)

    async def ready(self) -> None:
        end = time.monotonic() + 40
        while True:
            assert time.monotonic() < end and self.server.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_unix_connection(str(self.socket))
                try:
                    if await score(reader, writer, "warm") == 200:
                        return
                finally:
                    writer.close()
            await asyncio.sleep(0.02)


async def score(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request_id: str) -> int:
    """One call on a kept connection; the status once the whole answer is here."""
    body = b'{"data": [1, 2, 3]}'
    writer.write(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Request-Id: "
                 + request_id.encode() + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(length)
    return int(head.split(b" ", 2)[1])


def message(request_id: str) -> bytes:
    return write_request(Inference("iris", id=request_id, tensors=[Tensor("data", np.arange(3.0))]))


async def connected(channel: grpc.aio.Channel) -> None:
    """Raises TimeoutError, an OSError, when nobody is there."""
    async with asyncio.timeout(2):
        await channel.channel_ready()


@dataclass
class Load:
    """Clients that call without pause; ``answered`` are the request ids whose answer came whole."""

    kind: str = "score"
    answered: list[str] = field(default_factory=list)
    begun: int = 0
    target: Life | None = None
    pause_s: float = 0.0
    """Between two calls of a client, while the next server needs the machine to start."""

    @property
    def cut(self) -> int:
        """Calls that were begun on a connection, and never answered."""
        return self.begun - len(self.answered)

    async def client(self) -> None:
        call = getattr(self, self.kind)
        while (life := self.target) is not None:
            try:
                await call(life)
            except (OSError, asyncio.IncompleteReadError, grpc.aio.AioRpcError):
                await asyncio.sleep(0.005)

    def next_id(self) -> str:
        self.begun += 1
        return f"call-{self.begun}"

    async def score(self, life: Life) -> None:
        reader, writer = await asyncio.open_unix_connection(str(life.socket))
        try:
            while self.target is life:
                request_id = self.next_id()
                if await score(reader, writer, request_id) == 200:
                    self.answered.append(request_id)
                await asyncio.sleep(self.pause_s)
        finally:
            writer.close()

    async def unary(self, life: Life) -> None:
        async with grpc.aio.insecure_channel(life.grpc, OWN_CHANNEL) as channel:
            await connected(channel)
            infer = channel.unary_unary(INFER)
            while self.target is life:
                request_id = self.next_id()
                await infer(message(""), metadata=[("x-request-id", request_id)], timeout=20)
                self.answered.append(request_id)
                await asyncio.sleep(self.pause_s)

    async def stream(self, life: Life) -> None:
        async with grpc.aio.insecure_channel(life.grpc, OWN_CHANNEL) as channel:
            await connected(channel)
            call = channel.stream_stream(STREAM)(timeout=60)
            for _ in range(AHEAD):
                await call.write(message(self.next_id()))
            while self.target is life:
                if (answer := await call.read()) is grpc.aio.EOF:
                    return
                told = streamed(answer)
                assert not told.error_message, told.error_message
                self.answered.append(told.infer_response.id)
                await call.write(message(self.next_id()))
                await asyncio.sleep(self.pause_s)


async def attack(root: Path, folder: Path, grant: str, kind: str, transport: str, kills: int, calls: int) -> Load:
    """Kills life after life under load; the next one is warm already, so that calls never rest long."""
    load = Load(kind)
    lives = [Life.begin(root, folder, 0, grant, transport)]
    try:
        await lives[0].ready()
        load.target = lives[0]
        clients = [asyncio.create_task(load.client()) for _ in range(CLIENTS)]
        for number in range(1, kills + 1):
            following = Life.begin(root, folder, number, grant, transport)
            lives.append(following)
            load.pause_s = 0.02
            await following.ready()
            load.pause_s = 0.0
            full = len(load.answered) + calls // kills // 2
            while len(load.answered) < full or len(load.answered) < calls * number // kills:
                await asyncio.sleep(0.002)
            await asyncio.to_thread(lives[-2].kill)
            load.target = following
        load.target = None
        await asyncio.gather(*clients)
    finally:
        for life in lives:
            life.kill()
    return load


async def collect(here: Bench) -> list[dict[str, object]]:
    """Ingests everything that arrived, and reads it back as a client of the SDK does."""
    prefix = segments_prefix("default", "iris")
    while await here.keys(prefix):
        stream = await here.step()
    return [row async for table in rows.tables(here.ctx, stream, Span(None, None))
            for row in table.select(["request_id", "replica", "sequence", "status"]).to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "transport", "kills", "calls"), [
    ("score", "h2", 20, 20_400), ("unary", "h2", 5, 2_500), ("stream", "h2", 5, 5_000), ("unary", "grpc", 5, 2_500),
    ("stream", "grpc", 5, 5_000)], ids=["rest", "h2", "h2 stream", "grpc", "grpc stream"])
async def test_no_answered_call_is_lost(tmp_path: Path, record_property: pytest.RecordProperty, kind: str,
                                        transport: str, kills: int, calls: int) -> None:
    async with bench(tmp_path / "data") as here:
        await here.deployed()
        grant = await here.ctx.grants.lend("default", "iris", 600)
        root = make_root(tmp_path / "root", SCORE)
        began = time.monotonic()
        load = await attack(root, tmp_path, grant, kind, transport, kills, calls)
        attacked = time.monotonic() - began
        done = await asyncio.to_thread(subprocess.run, [
            sys.executable, str(root / "launch.py"), "ship", "--spool", str(tmp_path / "spool"), "--grant", grant,
            "--once"], capture_output=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert [p.name for p in (tmp_path / "spool").iterdir()] == []
        found = await collect(here)
        ids = [str(row["request_id"]) for row in found]
        figures = {"answered": len(load.answered), "cut": load.cut, "recorded": len(found), "kills": kills,
                   "missing": len(set(load.answered) - set(ids)), "attack_s": round(attacked, 1)}
        record_property("figures", figures)
        print(figures)
        assert figures["answered"] >= calls * 0.98 and load.cut >= kills
        assert figures["missing"] == 0
        assert len({(row["replica"], row["sequence"]) for row in found}) == len(found), "nothing twice"
        processes = await here.ctx.store.find(Process, limit=1000)
        assert len(processes) == kills + 1
        assert {p.state for p in processes} == {"open-ended"}, "killed, and nothing missing"
        status, proof = await here.get("/v1/capture/iris/verify")
        assert status == 200 and proof["complete"] is True and not proof["totals"]["missing"], proof
