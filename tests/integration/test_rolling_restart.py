"""A rolling upgrade: two registries on one store take turns to restart under 500 registrations. Nothing is lost, and
callers who ask again see nothing but refused connections and 503."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from pathlib import Path

import aiohttp
import pytest

from modelyard.adapters import urls
from tests.backends import MATRIX, Backend, url_of
from tests.e2e.yard import Yard

pytestmark = pytest.mark.slow
COUNT, AT_ONCE, PAUSE_S, TURNS, WITHIN_S = 500, 8, 0.15, 3, 60.0
DATA = b"weights"
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
ON = [pytest.param((), id="embedded"), pytest.param((MATRIX["store"][1], MATRIX["bus"][1]), id="kafka-and-mongo")]


class Callers:
    """Registrations through either of two instances; what is refused is asked again under its key, of the other."""

    def __init__(self, http: aiohttp.ClientSession, bases: list[str]) -> None:
        self.http, self.bases = http, bases
        self.made: dict[int, str] = {}
        self.seen: dict[str, int] = {}

    async def register(self, n: int) -> None:
        spec = json.dumps({"name": f"m{n % 20}", "artifact": DIGEST, "framework": "custom"})
        headers = {"content-type": "application/json", "idempotency-key": f"m-{n}"}
        for attempt in range(2000):
            try:
                async with self.http.post(f"{self.bases[(n + attempt) % 2]}/v1/models", data=spec,
                                          headers=headers) as answer:
                    body = await answer.json()
                    if answer.status == 201:
                        self.made[n] = body["id"]
                        return
                    told = f"{answer.status} {body['code']}"
            except (aiohttp.ClientError, TimeoutError):
                told = "no connection"
            self.seen[told] = self.seen.get(told, 0) + 1
            await asyncio.sleep(0.05)
        raise AssertionError(f"registration {n} is never answered: {told}")

    async def upload(self) -> None:
        async with self.http.put(f"{self.bases[0]}/v1/artifacts/{DIGEST}", data=DATA,
                                 headers={"content-type": "application/octet-stream"}) as answer:
            assert answer.status < 300

    async def all(self) -> None:
        left = list(range(COUNT))

        async def caller() -> None:
            while left:
                await self.register(left.pop())
                await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))


def restart(yard: Yard, sig: signal.Signals) -> None:
    process = yard.processes["registry"]
    process.send_signal(sig)
    process.wait(30)
    yard.restart("registry")


@pytest.mark.parametrize("on", ON)
async def test_two_instances_take_turns_to_restart(on: tuple[Backend, ...], tmp_path: Path) -> None:
    store, bus = [url_of(b, tmp_path) for b in on] or [f"sqlite://{tmp_path}/yard.db", f"sqlite://{tmp_path}/yard.db"]
    env = {"MODELYARD_STORE": store, "MODELYARD_BUS": bus, "MODELYARD_BLOBS": f"file://{tmp_path}/blobs"}
    yards = [await asyncio.to_thread(Yard.start, "apart", tmp_path / name, ("registry",), **env) for name in "ab"]
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
            callers = Callers(http, [yard.url("registry") for yard in yards])
            await callers.upload()
            work = asyncio.create_task(callers.all())
            turns = 0
            for turn in range(TURNS):
                for yard in yards:  # the last turn by force
                    await asyncio.to_thread(restart, yard, signal.SIGKILL if turn == TURNS - 1 else signal.SIGTERM)
                    turns += not work.done()
            await asyncio.wait_for(work, WITHIN_S)
        print(f"{turns} restarts under load; callers saw {callers.seen}")
        assert turns >= 2, "the restarts were over too late to prove anything"
        assert set(callers.seen) <= {"no connection", "503 unavailable", "409 in-flight"}
        assert len(set(callers.made.values())) == COUNT
        await all_told_once(store, bus, callers)
    finally:
        for yard in yards:
            await asyncio.to_thread(yard.stop)


async def all_told_once(store: str, bus: str, callers: Callers) -> None:
    """Each model has its event, with the number 1, and no other event says that it was registered."""
    opened, told, after = await urls.open_bus(bus), {}, "beginning"
    try:
        async with asyncio.timeout(WITHIN_S):
            while len(told) < COUNT:
                found, after = await opened.read(["model.registered"], after, 500, wait=1.0)
                for _, event in found:
                    told.setdefault(event.subject, set()).add((event.id, int(event.sequence)))
    finally:
        await opened.close()
    assert set(told) == set(callers.made.values())
    assert all(len(events) == 1 and {n for _, n in events} == {1} for events in told.values())
