"""Lists: keyset pages with opaque cursors, their limits, and what they refuse."""

import asyncio
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.unit.kernel.garden import Plant, Yard, yard


async def fill(here: Yard, names: list[str]) -> None:
    store = here.contexts["garden"].store
    for n, name in enumerate(names):
        await store.commit(Plant(id=name, name=name, height=n % 3, tags={"bed": str(n % 2)}))


async def walk(here: Yard, query: str) -> list[str]:
    found: list[str] = []
    after = ""
    while True:
        status, _, body = await here.call("GET", f"/v1/plants?{query}{after}")
        assert status == 200, body
        found += [item["id"] for item in body["items"]]
        if body["next"] is None:
            return found
        after = f"&after={quote(body['next'])}"


async def test_pages_join_into_the_list(tmp_path: Path) -> None:
    names = [f"p{n:03}" for n in range(57)]
    async with yard(tmp_path) as here:
        await fill(here, names)
        for limit in (1, 7, 56, 57, 58, 1000):
            assert await walk(here, f"limit={limit}") == names[::-1]
            assert await walk(here, f"limit={limit}&order=id") == names
        heights = await walk(here, "limit=10&order=height")
        assert sorted(heights) == names and heights == sorted(names, key=lambda n: (int(n[1:]) % 3, n))
        assert await walk(here, "limit=5&tag=bed=1&order=id") == names[1::2]
        assert await walk(here, "name=p003") == ["p003"]
        assert len((await here.call("GET", "/v1/plants"))[2]["items"]) == 57


async def test_nothing_missed_or_repeated_while_items_come(tmp_path: Path) -> None:
    before = [f"p{n:03}" for n in range(60)]
    async with yard(tmp_path) as here:
        await fill(here, before)

        async def more() -> None:
            for n in range(60):
                await here.call("POST", "/v1/plants", json={"name": f"new{n:03}"})

        for order in ("-created", "created", "id", "-id"):
            adding = asyncio.create_task(more())
            seen = await walk(here, f"limit=3&order={order}")
            await adding
            assert len(seen) == len(set(seen)) and set(before) <= set(seen)


@pytest.mark.parametrize(("query", "field"), [
    ("limit=0", "limit"), ("limit=1001", "limit"), ("limit=-1", "limit"), ("limit=ten", "limit"), ("limit=", "limit"),
    ("limit=99999999999999999999", "limit"), ("after=%00", "after"), ("after=abc", "after"), ("after=W10", "after"),
    ("after=bnVsbA", "after"), ("after=WzEsMiwzXQ", "after"), ("order=colour", "order"), ("order=tags", "order"),
    ("order=made_by", "order"), ("color=red", "color"), ("limit=5&Limit=5", "Limit"),
])
async def test_bad_parameters_are_named(tmp_path: Path, query: str, field: str) -> None:
    async with yard(tmp_path) as here:
        status, headers, body = await here.call("GET", f"/v1/plants?{query}")
        assert (status, body["code"]) == (422, "invalid")
        assert [e["field"] for e in body["errors"]] == [field]
        assert headers["content-type"] == "application/problem+json"


async def test_a_cursor_belongs_to_its_order(tmp_path: Path) -> None:
    async with yard(tmp_path) as here:
        await fill(here, ["aa", "bb", "cc"])
        cursor = (await here.call("GET", "/v1/plants?limit=1&order=id"))[2]["next"]
        status, _, body = await here.call("GET", f"/v1/plants?limit=1&order=-id&after={cursor}")
        assert status == 422 and body["errors"][0]["field"] == "after"
