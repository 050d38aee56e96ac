"""Stream workers for a test: the real program on a real Kafka, events to feed it, and what it says of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from aiokafka import AIOKafkaProducer

from modelyard.core.documents import rfc3339
from modelyard.core.events import Envelope, event_id
from modelyard.kernel.forward import SERVICE_TOKEN
from tests.e2e.yard import free_port

TOKEN = "a service token of these tests"


def closed(deployment: str, segment: int, slot: float, calls: int, sequence: int = 1, **data: Any) -> Envelope:
    """A segment with ``calls`` calls in the ten seconds of ``slot``."""
    body = {"deployment": deployment, "image": "iris-scorer:7",
            "cells": [[int(slot) // 10 * 10, "iris:4", "OK", {"100": calls}]], **data}
    return _event("capture.closed", deployment, f"{deployment}:0-1a2b3c4d:{segment}", sequence, body)


def settled(deployment: str, start: int, requests: int, sequence: int = 1) -> Envelope:
    """A settled window of one minute."""
    moments = {name: rfc3339(datetime.fromtimestamp(at, UTC)) for name, at in (("start", start), ("end", start + 60))}
    body = {"deployment": deployment, "image": "iris-scorer:7", "model": "iris:4", "requests": requests, "errors": {},
            "latency_ms": {"p50": 1.0, "p90": 1.0, "p99": 1.0}, **moments}
    return _event("telemetry.window", deployment, f"{deployment}:{moments['start']}:iris-scorer:7:iris:4", sequence,
                  body)


def _event(topic: str, deployment: str, subject: str, sequence: int, data: dict[str, Any]) -> Envelope:
    return Envelope(id=event_id(), source="/modelyard/telemetry", type=f"{topic}.v1", subject=subject, data=data,
                    time=datetime.now(UTC), partitionkey=f"default/{deployment}", sequence=f"{sequence:020d}")


@dataclass
class Topics:
    """A corner of a Kafka: ``url`` is the bus's, with its prefix and options."""

    url: str
    producer: AIOKafkaProducer
    prefix: str

    async def send(self, events: Iterable[Envelope]) -> None:
        """Returns when Kafka has them all."""
        sent = [await self.producer.send(f"{self.prefix}.{e.topic}", e.encode(), key=e.partitionkey.encode())
                for e in events]
        await asyncio.gather(*sent)


@asynccontextmanager
async def topics(url: str) -> AsyncIterator[Topics]:
    host, prefix = url.partition("?")[0].removeprefix("kafka://").split("/")
    async with AIOKafkaProducer(bootstrap_servers=host, acks="all") as producer:
        yield Topics(url, producer, prefix)


class StreamWorker:
    """``modelyard serve stream`` as a process; ``kill`` and ``start`` again as often as needed."""

    def __init__(self, bus: str, data: Path, **env: str) -> None:
        self.data, self.port = data, free_port()
        self.url, self.log = f"http://127.0.0.1:{self.port}", data.with_suffix(".log")
        self._env = {**os.environ, "MODELYARD_BUS": bus, "MODELYARD_DATA": str(data),
                     "MODELYARD_SERVICE_TOKEN": TOKEN, **env}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> StreamWorker:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([sys.executable, "-m", "modelyard", "serve", "stream", "--port",
                                              str(self.port)], env=self._env, stdout=log, stderr=log,
                                             stdin=subprocess.DEVNULL)
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    async def ask(self, path: str) -> tuple[int, Any]:
        headers = {SERVICE_TOKEN: TOKEN}
        async with aiohttp.ClientSession(headers=headers) as http, http.get(self.url + path) as answer:
            return answer.status, await answer.json()

    async def windows(self, deployment: str) -> list[dict[str, Any]]:
        """Its live windows; none while it is not ready."""
        with contextlib.suppress(OSError, aiohttp.ClientError):
            status, body = await self.ask(f"/internal/v1/live/{deployment}")
            if status == 200:
                return list(body["windows"])
        return []

    async def total(self, deployment: str) -> int:
        return sum(w["requests"] for w in await self.windows(deployment))

    async def ready(self, seconds: float = 40.0) -> None:
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, aiohttp.ClientError):
                if (await self.ask("/readyz"))[0] == 200:
                    return
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            await asyncio.sleep(0.1)

    async def comes_to(self, wanted: dict[str, int], seconds: float = 60.0) -> None:
        """Its totals are these, and stay so for two more seconds."""
        end, since = time.monotonic() + seconds, None
        while since is None or time.monotonic() < since + 2:
            seen = {name: await self.total(name) for name in wanted}
            since = (since or time.monotonic()) if seen == wanted else None
            assert time.monotonic() < end, f"{seen}, wanted {wanted}: {self.log.read_text()[-2000:]}"
            assert all(seen[name] <= wanted[name] for name in wanted), f"more than there was: {seen}"
            await asyncio.sleep(0.2)


