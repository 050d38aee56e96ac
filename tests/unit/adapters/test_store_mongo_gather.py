"""What is asked while an answer is on its way goes out with the next question; nobody suffers for another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from modelyard.adapters.store_mongo_gather import SLOW_S, Gather
from modelyard.core.errors import Invalid, Unavailable


class Server:
    """Doubles numbers, once it is let; a negative number is a fault."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.let = asyncio.Event()
        self.fault: Exception | None = None

    async def __call__(self, what: Sequence[int]) -> list[int]:
        self.asked.append(list(what))
        await self.let.wait()
        if self.fault is not None:
            raise self.fault
        if min(what) < 0:
            raise Invalid("negative")
        return [2 * n for n in what]

    async def questions(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.asked) < count:
                await asyncio.sleep(0)


async def test_who_comes_meanwhile_goes_together() -> None:
    server = Server()
    ask = Gather(server)
    first = asyncio.create_task(ask(1))
    await server.questions(1)
    rest = [asyncio.create_task(ask(n)) for n in (2, 3, 2)]
    await asyncio.sleep(0)
    server.let.set()
    assert [await task for task in (first, *rest)] == [2, 4, 6, 4]
    assert server.asked == [[1], [2, 3, 2]]
    assert await ask(5) == 10
    await ask.close()


async def test_one_that_is_bad_harms_no_other() -> None:
    server = Server()
    ask = Gather(server)
    tasks = [asyncio.create_task(ask(n)) for n in (1, -1, 2)]
    server.let.set()
    assert await asyncio.gather(*tasks, return_exceptions=True) == [2, tasks[1].exception(), 4]
    assert isinstance(tasks[1].exception(), Invalid)
    await ask.close()


async def test_an_outage_is_told_to_all_and_asked_once() -> None:
    server = Server()
    server.fault = Unavailable("away")
    ask = Gather(server)
    tasks = [asyncio.create_task(ask(n)) for n in (1, 2, 3)]
    server.let.set()
    assert await asyncio.gather(*tasks, return_exceptions=True) == [server.fault] * 3
    assert server.asked == [[1, 2, 3]]
    server.fault = None
    assert await ask(4) == 8
    await ask.close()


async def test_an_answer_that_takes_long_holds_up_no_other() -> None:
    server = Server()
    ask = Gather(server)
    first = asyncio.create_task(ask(1))
    await server.questions(1)
    second = asyncio.create_task(ask(2))
    await asyncio.sleep(SLOW_S)
    await server.questions(2)
    assert not first.done() and server.asked == [[1], [2]]
    server.let.set()
    assert [await first, await second] == [2, 4]
    await ask.close()


async def test_who_was_cancelled_is_not_asked_for() -> None:
    server = Server()
    ask = Gather(server)
    first = asyncio.create_task(ask(1))
    await server.questions(1)
    second, third = asyncio.create_task(ask(2)), asyncio.create_task(ask(3))
    await asyncio.sleep(0)
    second.cancel()
    server.let.set()
    assert [await first, await third] == [2, 6]
    assert second.cancelled() and server.asked == [[1], [3]]
    await ask.close()


@pytest.mark.parametrize("begun", [True, False])
async def test_a_close_tells_those_who_wait_and_leaves_no_task(begun: bool) -> None:
    server = Server()
    ask = Gather(server)
    tasks = [asyncio.create_task(ask(1))]
    if begun:
        await server.questions(1)
        tasks.append(asyncio.create_task(ask(2)))
    await asyncio.sleep(0)
    await ask.close()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in found] == [Unavailable] * len(tasks)
    with pytest.raises(Unavailable):
        await ask(3)
    assert asyncio.all_tasks() == {asyncio.current_task()}
