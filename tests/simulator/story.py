"""What callers do in one seed, and what goes wrong meanwhile: both by dice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from typing import Any

import aiohttp
from yarl import URL

from .network import Answer
from .shaken import Process, Weather
from .world import INSTANCES, SERVICES, World

AGAIN = (409, 412, 423, 429, 500, 502, 503, 504)
STORY_S, HEAL_S = 40.0, 400.0


class Caller:
    """Somebody with a key for everything, who asks again until there is an answer."""

    def __init__(self, world: World, number: int, dice: random.Random) -> None:
        self.world, self.dice, self.number = world, dice, number
        self.process = Process(f"caller.{number}", world.weather, world.trace)
        self.keys = 0
        self.made: dict[str, list[str]] = {"model": [], "image": [], "deployment": []}

    async def ask(self, service: str, method: str, path: str, body: Any = None,
                  patience: int = 400) -> tuple[int, Any]:
        """The last answer: what is busy, away or cut is asked again with the same Idempotency-Key."""
        self.keys += 1
        headers, data = {"Idempotency-Key": f"{self.number}-{self.keys}"}, None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers["Content-Type"] = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for _ in range(patience):
            try:
                answer: Answer = await self.world.network.request(
                    self.process, method, URL(f"http://{service}{path}"), data, headers)
            except aiohttp.ClientConnectionError:
                answer = Answer(503, b"")
            said = json.loads(answer.body) if answer.body else {}
            if answer.status < 500 and said.get("code") not in ("in-flight", "being-removed", "conflict", "in-use-now"):
                return answer.status, said
            await asyncio.sleep(self.dice.uniform(0.2, 2.0))
        raise AssertionError(f"{method} {path} is not answered: {answer.status} {said}")

    async def live(self, turns: int) -> None:
        """A few turns, each one thing that a user does."""
        for _ in range(turns):
            await self.dice.choice(self.able())()
            await asyncio.sleep(self.dice.uniform(0.0, 3.0))

    def able(self) -> list[Any]:
        do: list[Any] = [self.register, self.register]
        if self.made["model"]:
            do += [self.build, self.build, self.tag, self.tag, self.alias, self.unregister]
        if self.made["image"]:
            do += [self.deploy, self.deploy, self.unbuild]
        if self.made["deployment"]:
            do += [self.scale, self.undeploy]
        return do

    async def artifact(self) -> str:
        data = f"artifact {self.dice.randrange(4)}".encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        status, said = await self.ask("registry", "PUT", f"/v1/artifacts/{digest}", data)
        assert status in (200, 201), (status, said)
        return digest

    async def register(self) -> None:
        name = self.dice.choice(("iris", "rose"))
        for _ in range(50):  # another caller's deletion may take the artifact in between
            digest = await self.artifact()
            status, said = await self.ask("registry", "POST", "/v1/models", {
                "name": name, "artifact": digest, "framework": "custom", "tags": {"by": str(self.number)}})
            if status == 201:
                self.made["model"].append(said["id"])
                return
            assert status == 422, (status, said)
        raise AssertionError("an artifact is always gone")

    async def tag(self) -> None:
        """Several changes of one model in a row: what follows must stay behind what waits."""
        ref = self.dice.choice(self.made["model"])
        for _ in range(self.dice.randint(1, 6)):
            await self.ask("registry", "PATCH", f"/v1/models/{ref}", {"tags": {"n": str(self.keys)}})

    async def alias(self) -> None:
        name, _, version = self.dice.choice(self.made["model"]).partition(":")
        if self.dice.random() < 0.3:
            await self.ask("registry", "DELETE", f"/v1/models/{name}/aliases/champion")
        else:
            await self.ask("registry", "PUT", f"/v1/models/{name}/aliases/champion", {"version": int(version)})

    async def unregister(self) -> None:
        ref = self.dice.choice(self.made["model"])
        status, _ = await self.ask("registry", "DELETE", f"/v1/models/{ref}")
        if status in (200, 204):
            self.made["model"].remove(ref)

    async def build(self) -> None:
        for _ in range(20):
            digest = await self.artifact()
            status, said = await self.ask("image-builder", "POST", "/v1/images", {
                "name": "scorer", "models": [self.dice.choice(self.made["model"])], "score": digest})
            if status == 202:
                self.made["image"].append(said["id"])
            if status in (202, 422):
                return
        raise AssertionError((status, said))

    async def unbuild(self) -> None:
        ref = self.dice.choice(self.made["image"])
        status, _ = await self.ask("image-builder", "DELETE", f"/v1/images/{ref}")
        if status in (200, 202, 204):
            self.made["image"].remove(ref)

    async def deploy(self) -> None:
        name = f"d{self.number}{self.dice.randrange(2)}"
        status, _ = await self.ask("deployer", "PUT", f"/v1/deployments/{name}", {
            "name": name, "image": self.dice.choice(self.made["image"]), "target": "local"})
        if status in (200, 201, 202) and name not in self.made["deployment"]:
            self.made["deployment"].append(name)

    async def scale(self) -> None:
        name = self.dice.choice(self.made["deployment"])
        await self.ask("deployer", "PATCH", f"/v1/deployments/{name}", {"replicas": self.dice.randint(1, 3)})

    async def undeploy(self) -> None:
        name = self.dice.choice(self.made["deployment"])
        status, _ = await self.ask("deployer", "DELETE", f"/v1/deployments/{name}")
        if status in (200, 202, 204):
            self.made["deployment"].remove(name)


async def misfortune(world: World) -> None:
    """Until cancelled: processes die and come back, things go away and return, groups are rebalanced."""
    dice = world.dice
    while True:
        await asyncio.sleep(dice.expovariate(1 / 1.5))
        what = dice.choice(("crash", "crash", "outage", "rebalance", "poison"))
        if what == "crash":
            name = dice.choice(INSTANCES)
            if name in world.lives:
                await world.crash(name)
                await asyncio.sleep(dice.uniform(0.0, 3.0))
                await world.start(name)
        elif what == "outage":
            port = dice.choice(("bus", "store", "blobs", "blobs", "images", "target", "network"))
            world.trace.note(f"the {port} goes away")
            world.weather.away.add(port)
            await asyncio.sleep(dice.uniform(0.1, 10.0))
            world.weather.away.discard(port)
        elif what == "rebalance":
            world.log.rebalance(dice.choice(list(SERVICES)))
        elif world.poisoned < 2:
            world.poisoned += 1
            world.log.append("model.registered", "default/poison", b"no event")


def rough(weather: Weather) -> None:
    """How rough this seed is: calm seas find other faults than storms."""
    dice = weather.dice
    weather.fail = dice.choice((0.0, 0.01, 0.05))
    weather.after = dice.choice((0.0, 0.01, 0.05))
    weather.conflict = dice.choice((0.0, 0.02))
    weather.twice = dice.choice((0.0, 0.1))
    weather.stall = dice.choice((0.0, 0.0, 0.003))
    weather.slow_s = dice.choice((0.002, 0.05, 0.3))


async def play(world: World) -> None:
    """The story of a seed: processes start, callers call through the storm, then it is quiet and all comes right."""
    rough(world.weather)
    for name in INSTANCES:
        await world.start(name)
    storm = world.loop.create_task(misfortune(world))
    callers = [Caller(world, n, random.Random(f"{n} {world.dice.random()}")) for n in range(3)]
    lives = [world.loop.create_task(c.live(6)) for c in callers]
    await asyncio.wait(lives, timeout=STORY_S)
    storm.cancel()
    await asyncio.gather(storm, return_exceptions=True)
    world.weather.heal()
    world.trace.note("all is well again")
    for name in INSTANCES:
        if name not in world.lives:
            await world.start(name)
    await asyncio.gather(*lives)
