"""The crash test: 2,000 times the life of an image under 20 SIGKILLs of registry, image builder and recorder.

On the embedded profile, and on Kafka and MongoDB (fault 1). Each round over 50 names: register a model,
post an image without wheels, change the model's tags five times, delete the image. A recorder, a program of its own on
the kernel's consumer, keeps every event that it is handed. At the end nothing is lost, nothing is done twice, and each
subject's events are numbered without a gap and in order.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelyard.adapters.urls import open_store
from modelyard.image_builder.model import Image
from modelyard.registry.model import Model
from tests.backends import MATRIX, url_of
from tests.e2e.test_journey import upload
from tests.e2e.yard import Yard, until

pytestmark = pytest.mark.slow

ROUNDS, NAMES, KILLS = 2_000, 50, 20
ON = [pytest.param((), 120, id="embedded"),
      pytest.param(("STORE", "BUS"), 180, id="kafka-and-mongo", marks=pytest.mark.fault)]
"""What is on real servers, and the seconds that the work should take, kills and all; it is ended after three times as
many."""
SCORE = b"def run(data):\n    return data\n"


class Client:
    """Calls until it gets an answer: lost connections and 5xx are repeated under the same Idempotency-Key."""

    def __init__(self, http: aiohttp.ClientSession, yard: Yard) -> None:
        self.http, self.yard = http, yard

    async def call(self, service: str, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        headers, url = {"idempotency-key": key} if key else {}, self.yard.url(service) + path
        while True:
            try:
                async with self.http.request(method, url, json=body, headers=headers) as answer:
                    text = await answer.text()
                    if answer.status < 500 and answer.status != 409:
                        return answer.status, json.loads(text) if text else None
            except (aiohttp.ClientError, OSError, TimeoutError):
                pass
            await asyncio.sleep(0.05)  # the service is being restarted; the next try decides


async def life(client: Client, n: int, artifact: str, lock: str) -> None:
    """One round. The image is gone when the builder's loop has released its holds, which the test's end waits for."""
    spec: dict[str, Any] = {"name": f"m{n % NAMES}", "artifact": artifact}
    status, model = await client.call("registry", "POST", "/v1/models", spec, f"model-{n}")
    assert status == 201, model
    spec = {"name": f"img-{n % NAMES}", "models": [model["id"]], "score": artifact, "lock": lock}
    status, image = await client.call("image-builder", "POST", "/v1/images", spec, f"image-{n}")
    assert status == 202, image
    path = f"/v1/images/{image['id']}"
    while image["phase"] not in ("ready", "failed"):
        _, image = await client.call("image-builder", "GET", path + "?wait=10")
    assert image["phase"] == "ready", image
    for change in range(5):
        tags = {"tags": {"n": str(change)}}
        status, model = await client.call("registry", "PATCH", f"/v1/models/{model['id']}", tags)
        assert status == 200, model
    status, gone = await client.call("image-builder", "DELETE", path)
    assert status in (200, 202, 204), gone


async def load(yard: Yard, artifact: str, lock: str, progress: list[int]) -> None:
    todo = iter(range(ROUNDS))

    async def worker(client: Client) -> None:
        for n in todo:
            await life(client, n, artifact, lock)
            progress[0] += 1

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http, asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(worker(Client(http, yard)))


def record(yard: Yard, notes: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(Path(__file__).with_name("recorder.py")), str(notes)],
                            env=yard.env, stdin=subprocess.DEVNULL)


async def kill_them(yard: Yard, recorder: list[subprocess.Popen[bytes]], notes: Path, progress: list[int]) -> int:
    """Kills and starts again, evenly over the work; every victim in turn, in a random order."""
    victims = ["registry", "image-builder", "recorder"] * 7
    random.Random(7).shuffle(victims)
    for count, victim in enumerate(victims[:KILLS], start=1):
        while progress[0] < count * ROUNDS // (KILLS + 2):
            await asyncio.sleep(0.02)
        if victim == "recorder":
            recorder[0].send_signal(signal.SIGKILL)
            recorder[0].wait()
            recorder[0] = record(yard, notes)
        else:
            yard.kill(victim)
            yard.launch(victim)
    return KILLS


def check_story(notes: Path) -> None:
    """What the recorder saw: every sequence of every subject once, repeats dropped, in order per topic and key."""
    sequences: dict[str, dict[int, str]] = defaultdict(dict)
    newest: dict[tuple[str, str], int] = {}
    for line in notes.read_text().splitlines():
        topic, subject, sequence, event = json.loads(line)
        repeat = sequences[subject].get(sequence) == event
        assert repeat or sequence not in sequences[subject], f"{subject} {sequence} was given to two events"
        if not repeat:
            assert newest.get((topic, subject), 0) < sequence, f"{topic} {subject}: {sequence} came too late"
            newest[topic, subject] = sequence
            sequences[subject][sequence] = event
    images = {s: seen for s, seen in sequences.items() if s.startswith("img-")}
    assert len(images) == ROUNDS and len(sequences) == 2 * ROUNDS
    for subject, seen in sequences.items():
        assert sorted(seen) == list(range(1, len(seen) + 1)), f"{subject}: {sorted(seen)}"
    assert all(len(seen) == (3 if s in images else 6) for s, seen in sequences.items())


async def check_effects(yard: Yard) -> None:
    """2,000 images built once and gone; 2,000 holds placed once and released once: a model has eight commits, its
    registration, five tag changes, one hold placed and one released, and a ninth when it was the latest no more. After
    a kill two may settle who is the latest at once: one marks again what the other has unmarked, sees it, and takes it
    back, which is two commits more, and no event."""
    url = yard.env.get("MODELYARD_STORE", f"sqlite://{yard.data}/yard.db")
    registry, builder = await open_store(url, "registry"), await open_store(url, "image-builder")
    try:
        models = await registry.find(Model, workspace=None, limit=10_000)
        images = await builder.find(Image, workspace=None, limit=10_000, tombstones=True)
        assert len({m.id for m in models}) == len(models) == ROUNDS
        assert [m.id for m in models if m.holds] == []
        extra = {m.id: m.revision - (8 if m.marks else 9) for m in models}
        assert [id for id, n in extra.items() if n < 0 or n % 2] == []
        assert len([id for id, n in extra.items() if n]) <= KILLS
        assert [(m.id, m.let_go) for m in models if len(m.let_go) != 1] == []
        assert len(images) == ROUNDS and all(i.deleted for i in images)
        assert await registry.pending(10) == [] == await builder.pending(10)
    finally:
        await registry.close()
        await builder.close()


def settled(yard: Yard, seconds: float = 30.0) -> None:
    """The recorder may have an event before the services have dealt with it: looks until all is as it must be, and once
    more a little later, for what is done twice may be done late."""
    end = time.monotonic() + seconds
    while True:
        try:
            asyncio.run(check_effects(yard))
            break
        except AssertionError:
            if time.monotonic() > end:
                raise
        time.sleep(1.0)
    time.sleep(2.0)
    asyncio.run(check_effects(yard))


@pytest.mark.parametrize(("servers", "seconds"), ON)
def test_two_thousand_lives_and_twenty_kills(servers: tuple[str, ...], seconds: float, tmp_path: Path) -> None:
    env = {f"MODELYARD_{name}": url_of(MATRIX[name.lower()][1], tmp_path) for name in servers}
    yard = Yard.start("apart", tmp_path / "data", ("registry", "image-builder"), **env)
    notes = tmp_path / "recorded.jsonl"
    recorder = [record(yard, notes)]
    try:
        artifact, lock = upload(yard, SCORE), upload(yard, b"")
        began, progress = time.monotonic(), [0]

        async def run() -> int:
            work = asyncio.create_task(load(yard, artifact, lock, progress))
            kills = asyncio.create_task(kill_them(yard, recorder, notes, progress))
            await work
            return await kills

        kills = asyncio.run(asyncio.wait_for(run(), seconds * 3))
        worked = time.monotonic() - began
        expected = ROUNDS * 9
        until(lambda: len(set(notes.read_text().splitlines())) >= expected, 30, every=0.5, why="all events recorded")
        told = len(notes.read_text().splitlines())
        print(f"\n{ROUNDS} lives, {kills} kills: {worked:.1f} s (goal {seconds:.0f}); {told} deliveries of {expected} "
              "events")
        check_story(notes)
        settled(yard)
    finally:
        os.kill(recorder[0].pid, signal.SIGKILL)
        recorder[0].wait()
        assert yard.stop() == []
