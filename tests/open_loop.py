"""Open-loop load: calls begin at their time, whatever became of those before them, as independent callers' do."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import aiohttp
import grpc

from tests.bad_clients import INFER

Caller = Callable[[], Awaitable[str]]
"""Makes one call and says how it ended; "OK" is what was hoped for."""
STEP_S = 0.002
CHANNELS = 4


@dataclass
class Seen:
    """``outcomes``: how many calls ended how. ``took``: seconds of those that ended OK, in order of size."""

    seconds: float
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    took: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.outcomes["OK"] / self.seconds

    def quantile_s(self, part: float) -> float:
        return self.took[min(int(len(self.took) * part), len(self.took) - 1)] if self.took else 0.0


async def offer(call: Caller, rate: float, seconds: float) -> Seen:
    """So many calls a second for so long; when all of them have ended, what became of them."""
    seen, tasks = Seen(seconds), set[asyncio.Task[None]]()

    async def one() -> None:
        began = time.perf_counter()
        outcome = await call()
        seen.outcomes[outcome] += 1
        if outcome == "OK":
            seen.took.append(time.perf_counter() - began)

    began, made = time.perf_counter(), 0
    while (now := time.perf_counter() - began) < seconds:
        while made < now * rate:
            task = asyncio.create_task(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            made += 1
        await asyncio.sleep(STEP_S)
    while tasks:
        await asyncio.wait(tasks)
    seen.took.sort()
    return seen


async def closed(call: Caller, callers: int, seconds: float) -> Seen:
    """So many callers that wait for their answers: what the server can do at its best."""
    seen, end = Seen(seconds), time.perf_counter() + seconds

    async def one() -> None:
        while time.perf_counter() < end:
            seen.outcomes[await call()] += 1

    await asyncio.gather(*(one() for _ in range(callers)))
    return seen


@contextlib.asynccontextmanager
async def by_grpc(address: str, message: bytes, timeout_s: float) -> AsyncIterator[Caller]:
    """Plain stubs without retry on a few channels. Outcomes are status names."""
    channels = [grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)])
                for _ in range(CHANNELS)]
    infer = [channel.unary_unary(INFER) for channel in channels]
    turn = 0

    async def call() -> str:
        nonlocal turn
        turn += 1
        try:
            await infer[turn % CHANNELS](message, timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            return exc.code().name
        return "OK"

    try:
        yield call
    finally:
        for channel in channels:
            await channel.close()


@contextlib.asynccontextmanager
async def by_rest(url: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[Caller]:
    """A connection for each call under way. Outcomes are the HTTP status, "OK" for 200; a 503 without Retry-After says
    so."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async def call() -> str:
            try:
                async with session.post(url, data=body, headers=headers) as answer:
                    await answer.read()
                    if answer.status == 503 and int(answer.headers.get("Retry-After", "0")) < 1:
                        return "503 without Retry-After"
                    return "OK" if answer.status == 200 else str(answer.status)
            except (aiohttp.ClientError, OSError) as exc:
                return repr(exc)

        yield call
