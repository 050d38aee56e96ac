"""Idempotency-Key: done once, answered alike, for a day; whatever dies in between."""

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from modelyard.core.errors import Conflict, Invalid, Unavailable
from modelyard.kernel import idempotency
from modelyard.kernel.idempotency import Request
from modelyard.kernel.loop import run_loop
from modelyard.kernel.run import Wakes
from tests.unit.kernel.garden import Plant, Soil, Yard, yard


async def post(here: Yard, body: Any, key: str | None = "k1", path: str = "/v1/plants",
               **headers: str) -> tuple[int, Any, Any]:
    return await here.call("POST", path, json=body, headers={"idempotency-key": key, **headers} if key else headers)


class Clock:
    def __init__(self) -> None:
        self.moment = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.moment


async def test_the_first_answer_is_given_again(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        first = await post(here, {"name": "rose"})
        again = await post(here, {"name": "rose"})
        assert first[0] == again[0] == 201 and first[2] == again[2] and here.soil.runs == 1
        assert again[1]["idempotency-replayed"] == "true" and "idempotency-replayed" not in first[1]
        for name in ("etag", "location", "content-type"):
            assert first[1][name] == again[1][name]
        assert first[1]["x-request-id"] != again[1]["x-request-id"]
        assert (await post(here, {"name": "rose"}, "k2"))[0] == 409
        assert (await post(here, {"name": "rose"}, None))[0] == 409


async def test_refusals_are_answers_too(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        first = await post(here, {"name": "x"})
        again = await post(here, {"name": "x"})
        assert first[0] == again[0] == 422 and first[2]["errors"] == again[2]["errors"] and here.soil.runs == 1
        assert again[1]["content-type"] == "application/problem+json"


async def test_come_again_is_no_answer_yet(tmp_path: Path) -> None:
    """What passes in a moment would otherwise be told to every retry for a day."""
    async with yard(tmp_path) as here:
        here.soil.fail = [Conflict("it is being removed just now", code="being-removed", retry_after=1)]
        first = await post(here, {"name": "rose"})
        assert (first[0], first[2]["code"], first[1]["retry-after"]) == (409, "being-removed", "1")
        assert (await post(here, {"name": "rose"}))[0] == 201 and here.soil.runs == 2


async def test_another_request_under_the_key(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        await post(here, {"name": "rose"})
        for body, path in [({"name": "lily"}, "/v1/plants"), ({"name": "rose"}, "/v1/plants?x=1")]:
            status, _, problem = await post(here, body, path=path)
            assert (status, problem["code"]) == (422, "idempotency-key-reused")
        assert (await post(here, {"name": "rose"}, path="/v1/plants?wait=5"))[0] == 201
        assert (await post(here, {"name": "rose"}, path="/v1/trees"))[0] == 201  # another service, another memory
        assert here.soil.runs == 2


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "a b", "tab\tx", "é"])
async def test_keys_have_a_form(tmp_path: Path, key: str) -> None:
    async with yard(tmp_path) as here:
        status, _, body = await post(here, {"name": "rose"}, None, **{"idempotency-key": key})
        assert status == 422 and body["errors"][0]["field"] == "Idempotency-Key" and here.soil.runs == 0


async def test_twenty_at_once_make_one(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        answers = await asyncio.gather(*(post(here, {"name": "rose"}) for _ in range(20)))
        assert {a[0] for a in answers} <= {201, 409} and here.soil.runs == 1
        assert all(a[2]["code"] == "in-flight" and a[1]["retry-after"] for a in answers if a[0] == 409)
        assert (await post(here, {"name": "rose"}))[0] == 201


async def test_in_flight(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        first = asyncio.create_task(post(here, {}, path="/v1/plants/rose/slow"))
        while not here.soil.runs:
            await asyncio.sleep(0.01)
        status, _, body = await post(here, {}, path="/v1/plants/rose/slow")
        assert (status, body["code"]) == (409, "in-flight")
        here.soil.gate.set()
        assert (await first)[0] == 202
        assert (await post(here, {}, path="/v1/plants/rose/slow"))[2] == {"runs": 1}


async def test_a_long_request_keeps_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "LEASE", timedelta(seconds=0.3))
    monkeypatch.setattr(idempotency, "RENEW_S", 0.05)
    async with yard(tmp_path) as here:
        first = asyncio.create_task(post(here, {}, path="/v1/plants/rose/slow"))
        await asyncio.sleep(0.8)
        assert (await post(here, {}, path="/v1/plants/rose/slow"))[2]["code"] == "in-flight"
        here.soil.gate.set()
        assert (await first)[0] == 202 and here.soil.runs == 1


async def test_server_faults_are_not_kept(tmp_path: Path) -> None:
    soil = Soil(fail=[Unavailable("no rain"), KeyError("rake")])
    async with yard(tmp_path, soil=soil) as here:
        assert [(await post(here, {"name": "rose"}))[0] for _ in range(3)] == [503, 201, 201]
        assert soil.runs == 2  # the second found what the first had made; the third was answered from memory
        assert [(await post(here, {"name": "lily"}, "k2"))[0] for _ in range(2)] == [500, 201]
        plants = (await here.call("GET", "/v1/plants?order=id"))[2]["items"]
        assert [p["id"] for p in plants] == ["lily", "rose"]


async def test_a_kept_refusal_of_the_handler(tmp_path: Path) -> None:
    async with yard(tmp_path, soil=Soil(fail=[Invalid("not in autumn")])) as here:
        assert [(await post(here, {"name": "rose"}))[0] for _ in range(2)] == [422, 422]


async def test_a_lapsed_request_is_run_again_and_finds_what_it_made(tmp_path: Path) -> None:
    """The process died between the handler's commit and the answer: here, by the state it leaves behind."""
    clock = Clock()
    async with yard(tmp_path, now=clock) as here:
        await post(here, {"name": "rose"})
        store = here.contexts["garden"].store
        (record,) = await store.find(Request, {}, workspace=None)
        await store.commit(record.evolve(status=0, body="", headers={}, until=clock() + timedelta(seconds=15)))
        assert (await post(here, {"name": "rose"}))[2]["code"] == "in-flight"
        clock.moment += timedelta(seconds=16)
        status, _, body = await post(here, {"name": "rose"})
        assert (status, body["id"], here.soil.runs) == (201, "rose", 2)
        (plant,) = await store.find(Plant, {})
        assert plant.made_by == record.token


async def test_the_lease_of_a_dead_process_does_not_delay(tmp_path: Path) -> None:
    dead = await asyncio.create_subprocess_exec(sys.executable, "-c", "pass")
    holder = f"{idempotency.PLACE} {dead.pid} 1"
    await dead.wait()
    async with yard(tmp_path) as here:
        await post(here, {"name": "rose"})
        store = here.contexts["garden"].store
        (record,) = await store.find(Request, {}, workspace=None)
        for of, wanted in [("elsewhere 1 1", 409), (idempotency.ME, 409), (holder, 201)]:
            (record,) = await store.find(Request, {}, workspace=None)
            until = datetime.now(UTC) + timedelta(seconds=15)
            await store.commit(record.evolve(status=0, body="", headers={}, until=until, holder=of))
            assert (await post(here, {"name": "rose"}))[0] == wanted


async def test_a_day_later_the_key_is_new(tmp_path: Path) -> None:
    clock = Clock()
    async with yard(tmp_path, now=clock) as here:
        assert (await post(here, {"name": "rose"}))[0] == 201
        clock.moment += timedelta(hours=23, minutes=59)
        assert (await post(here, {"name": "rose"}))[0] == 201 and here.soil.runs == 1
        clock.moment += timedelta(minutes=1)
        assert (await post(here, {"name": "lily"}))[2]["id"] == "lily"


async def test_requests_are_forgotten_by_the_loop(tmp_path: Path) -> None:
    clock = Clock()
    async with yard(tmp_path, now=clock) as here:
        for n in range(5):
            await post(here, {"name": f"rose{n}"}, f"k{n}")
        ctx = here.contexts["garden"]
        loop = asyncio.create_task(run_loop(ctx, idempotency.FORGET, wakes := Wakes()))
        await asyncio.sleep(0.2)
        assert len(await ctx.store.find(Request, {}, workspace=None)) == 5
        clock.moment += timedelta(hours=24)
        for _ in range(200):
            wakes.wake(idempotency.FORGET.name)
            await asyncio.sleep(0.02)
            if not await ctx.store.find(Request, {}, workspace=None):
                break
        assert await ctx.store.find(Request, {}, workspace=None) == []
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)


@pytest.mark.slow  # 8 MiB bodies
async def test_raw_bodies_count_as_well(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        async def send(data: bytes) -> tuple[int, Any]:
            status, _, body = await here.call("POST", "/v1/plants/rose/feed", data=data, headers={
                "idempotency-key": "k", "content-type": "application/octet-stream"})
            return status, body

        assert await send(b"x" * 100_000) == (201, {"bytes": 100_000})
        assert await send(b"x" * 100_000) == (201, {"bytes": 100_000})
        assert (await send(b"y" * 100_000))[0] == 422
        assert (await send(b"x" * (idempotency.RAW_LIMIT + 1)))[0] == 413
