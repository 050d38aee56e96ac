"""The MongoDB store's own matters: its plans, answers that are lost, its errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import AutoReconnect

from infra.stack.mongo import Mongo
from modelyard.adapters import store_mongo_find as finding
from modelyard.adapters.store_mongo import TOKENS, MongoStore
from modelyard.adapters.store_search import plan
from modelyard.adapters.urls import open_store
from modelyard.core.errors import AlreadyApplied, Conflict, Invalid, TooLarge, Unavailable
from modelyard.core.events import Fact, announce
from tests.backends import MATRIX, need, url_of
from tests.unit.adapters.test_store_sqlite import SEARCHES, Model, model

BACKEND = MATRIX["store"][1]
COUNT = 600


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    found = url_of(BACKEND, tmp_path)
    yield found
    BACKEND.clean(found)


@pytest.fixture
async def store(url: str) -> AsyncIterator[MongoStore]:
    opened = await open_store(url, "registry")
    assert isinstance(opened, MongoStore)
    yield opened
    await opened.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Mongo]:
    need("mongo")
    with Mongo(tmp_path / "mongo") as mongo:
        yield mongo


# Plans -----------------------------------------------------------------------------------------------------------


async def explained(store: MongoStore, filter_: Any, sort: Any, limit: int) -> tuple[set[str], int]:
    """The stages of a search's plan, and how many documents it read."""
    command = {"find": "registry", "filter": filter_, "sort": dict(sort), "limit": limit}
    told = await store._docs.database.command("explain", command, verbosity="executionStats")

    def stages(step: dict[str, Any]) -> Iterator[str]:
        yield step["stage"]
        for below in [*step.get("inputStages", []), *([step["inputStage"]] if "inputStage" in step else [])]:
            yield from stages(below)

    return set(stages(told["queryPlanner"]["winningPlan"])), told["executionStats"]["totalDocsExamined"]


async def test_every_search_walks_an_index_and_reads_little_else(store: MongoStore) -> None:
    todo = iter([model(n) for n in range(COUNT)])

    async def fill() -> None:
        for doc in todo:
            await store.commit(doc)

    await asyncio.gather(*(fill() for _ in range(16)))
    found: dict[str, tuple[set[str], int]] = {}
    for name, how in SEARCHES.items():
        query = plan(Model, how["where"], how.get("order", "id"), None, 50, how.get("tombstones", False))
        for spaces in (["default"], ["default", "other"]):
            stages, read = await explained(store, *finding.compose("model", spaces, query), 50)
            assert "COLLSCAN" not in stages and "IXSCAN" in stages, (name, stages)
            found[name] = max(found.get(name, (set(), 0)), (stages, read), key=lambda one: one[1])
    for name in ("everything, newest first", "one name", "a common tag", "a key", "one in a hundred", "a property",
                 "a rare tag", "contained in a list", "a range", "what is due", "nothing", "tombstones too"):
        assert found[name][1] <= 55, (name, found[name])  # nothing was read only to be sorted


async def test_pending_and_due_over_all_workspaces_walk_their_own_index(store: MongoStore) -> None:
    for number in range(100):
        await store.commit(model(number))
    await store.commit(*announce(model(100), "registry", Fact("model.registered")))
    others = {"q.t": {"$gt": 0}, "$or": [{"q.p": 1}, {"q.t": {"$lt": 2**62}}]}
    for which in ({"q.t": {"$gt": 0}}, others):
        stages, read = await explained(store, which, [("q.t", 1)], 10)
        assert "COLLSCAN" not in stages and "SORT" not in stages and read == 1
    query = plan(Model, {}, "due", None, 10, False)
    stages, read = await explained(store, *finding.compose("model", None, query), 10)
    assert "COLLSCAN" not in stages and "SORT" not in stages and read == 1  # one of those is due


async def test_a_walk_begins_behind_the_last_document(store: MongoStore) -> None:
    await asyncio.gather(*(store.commit(model(number)) for number in range(200)))
    for order in ("created", "-created", "id", "-id"):
        first = await store.find(Model, order=order, limit=150)
        last = (getattr(first[-1], order.removeprefix("-")), first[-1].id)
        query = plan(Model, {}, order, last, 10, False)
        stages, read = await explained(store, *finding.compose("model", ["default"], query), 10)
        assert "SORT" not in stages and read <= 12, (order, stages, read)


async def test_events_whose_commit_was_not_told_are_found_all_the_same(store: MongoStore) -> None:
    doc, events = announce(model(1), "registry", Fact("model.registered"))
    assert await store.pending(9, wait=0.05) == []
    await store.commit(doc, events)
    store._own.ids.clear()  # as after an answer that never came
    async with asyncio.timeout(5):
        (found,) = await store.pending(9, wait=30.0)
    assert found.events == events


async def test_a_commit_between_look_and_sent_is_not_forgotten(store: MongoStore) -> None:
    doc, first = announce(model(1), "registry", Fact("model.registered"))
    doc = await store.commit(doc, first)
    (seen,) = await store.pending(9, wait=1.0)
    doc, second = announce(doc, "registry", Fact("model.updated"))
    await store.commit(doc, second)
    await store.sent(seen)
    store._scan_at = time.monotonic() + 60  # so that it is known, not found
    (left,) = await store.pending(9, wait=1.0)
    assert left.events == second
    await store.sent(left)
    assert await store.pending(9, wait=0.05) == [] and not store._own.ids


# Lost answers ----------------------------------------------------------------------------------------------------


class Losing:
    """The driver's collection, whose next writes fail: after they were done, or before."""

    def __init__(self, real: Any, times: int, done: bool) -> None:
        self._real, self._times, self._done = real, times, done

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)
        if name not in ("insert_one", "update_one"):
            return method

        async def call(*args: Any) -> Any:
            self._times -= 1
            if self._times < 0:
                return await method(*args)
            if self._done:
                await method(*args)
            raise AutoReconnect("connection closed")

        return call


def losing(store: MongoStore, times: int = 1, done: bool = True) -> MongoStore:
    """The same store, over a connection like that."""
    other = MongoStore(store._link)
    other._docs = Losing(store._docs, times, done)  # type: ignore[assignment]
    return other


@pytest.mark.parametrize("done", [True, False])
async def test_a_commit_whose_answer_was_lost_is_done_once(store: MongoStore, done: bool) -> None:
    doc, first = announce(model(1), "registry", Fact("model.registered"))
    doc = await losing(store, done=done).commit(doc, first, cause="c1")
    assert doc.revision == 1
    later, second = announce(doc, "registry", Fact("model.updated"))
    later = await losing(store, done=done).commit(later, second, cause="c2")
    assert later.revision == 2 and await store.get(Model, doc.id) == later
    assert [p.events for p in await store.pending(9)] == [(*first, *second)]
    for cause in ("c1", "c2"):
        with pytest.raises(AlreadyApplied):
            await store.commit(later, cause=cause)


async def test_who_lost_an_answer_does_not_take_anothers_commit_for_his_own(store: MongoStore) -> None:
    doc = await store.commit(model(1))
    slow = losing(store, done=False)
    ours = asyncio.create_task(slow.commit(doc.evolve(tags={"by": "us"})))
    await asyncio.sleep(0)
    theirs = await store.commit(doc.evolve(tags={"by": "them"}))
    with pytest.raises(Conflict):
        await ours
    assert await store.get(Model, doc.id) == theirs
    with pytest.raises(Conflict):
        await losing(store, done=False).commit(model(1))


async def test_our_commit_is_known_though_others_came_after_it(store: MongoStore) -> None:
    doc = await store.commit(model(1))
    stuck = Losing(store._docs, 1, True)
    ours = MongoStore(store._link)
    ours._docs = stuck  # type: ignore[assignment]
    task = asyncio.create_task(ours.commit(doc.evolve(tags={"by": "us"})))
    while (seen := await store.get(Model, doc.id)) is None or seen.revision == 1:
        await asyncio.sleep(0)
    for _ in range(TOKENS - 1):
        seen = await store.commit(seen)
    assert (await task).tags == {"by": "us"}


async def test_a_sent_whose_answer_was_lost_may_be_repeated(store: MongoStore) -> None:
    doc, events = announce(model(1), "registry", Fact("model.registered"))
    await store.commit(doc, events)
    (waiting,) = await store.pending(1)
    await losing(store).sent(waiting)
    assert await store.pending(1) == []


# Errors ----------------------------------------------------------------------------------------------------------


async def test_an_unsuitable_document_is_refused_in_our_words(store: MongoStore) -> None:
    with pytest.raises(TooLarge, match="16 MiB"):
        await store.commit(model(1).evolve(tags={"big": "x" * 17_000_000}))
    with pytest.raises(Invalid, match="64 bits"):
        await store.commit(model(1).evolve(version=2**70))
    assert await store.get(Model, model(1).id, tombstone=True) is None


@pytest.mark.parametrize(("url", "words"), [
    ("mongodb://127.0.0.1:1/a b", "no name of a database"), ("mongodb://127.0.0.1:1/a/b", "no name of a database"),
    ("mongodb://127.0.0.1:port/", "Port"), ("mongodb://127.0.0.1:1/?authMechanism=magic", "authMechanism"),
    ("mongodb://127.0.0.1:1/?replicaset=rs0", "replicaSet"),
])
async def test_a_url_that_cannot_be_right_is_invalid(url: str, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        await open_store(url, "registry")


@pytest.mark.slow
async def test_a_refused_connection_is_told_within_seconds() -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 does not answer: is it running.*refused"):
        await open_store("mongodb://127.0.0.1:1/?replicaSet=rs0", "registry")
    assert time.monotonic() - began < 10


async def test_the_name_of_another_replica_set_is_told(url: str) -> None:
    with pytest.raises(Unavailable, match=r"\?replicaSet=rs0"):
        await open_store(url.replace("rs0", "rs9"), "registry")


@pytest.mark.slow
async def test_a_lone_server_is_refused_with_the_fix(tmp_path: Path) -> None:
    need("mongo")
    with Mongo(tmp_path / "mongo", replica_set=False) as lone:
        for url in (lone.url, f"{lone.url}?replicaSet=rs0"):
            with pytest.raises(Unavailable, match=r"no replica set.*--replSet rs0.*rs\.initiate"):
                await open_store(url, "registry")


@pytest.mark.slow
async def test_wrong_passwords_and_missing_permissions_are_told_with_the_fix(tmp_path: Path) -> None:
    need("mongo")
    with Mongo(tmp_path / "mongo", password="hunter2") as mongo:
        await (await open_store(mongo.url, "registry")).close()
        with MongoClient[Any](mongo.url) as client:
            client.yard.command("createUser", "reader", pwd="pw", roles=["read"])
        reader = mongo.url.replace("root:hunter2", "reader:pw").replace("admin", "yard").replace("/?", "/yard?")
        for url, words in ((mongo.url.replace("hunter2", "wrong-1"), "refuses the user or the password"),
                           (reader, "grant it the role readWrite"),
                           (f"mongodb://127.0.0.1:{mongo.port}/?replicaSet=rs0", "user|readWrite")):
            with pytest.raises(Unavailable, match=words) as caught:
                await open_store(url, "registry")
            assert "hunter2" not in str(caught.value) and "wrong-1" not in str(caught.value)


@pytest.mark.slow
async def test_an_outage_is_unavailable_in_time_and_over_by_itself(own: Mongo) -> None:
    store = await open_store(own.url.replace("?", "?timeout_s=1&"), "registry")
    try:
        kept = await store.commit(model(1))
        waiting = asyncio.create_task(store.pending(1, wait=600.0))
        for down, up in ((own.kill, own.start), (own.freeze, own.thaw)):
            await asyncio.to_thread(down)
            for call in (store.get(Model, kept.id), store.commit(model(2)), store.check()):
                began = time.monotonic()
                with pytest.raises(Unavailable):
                    await call
                assert time.monotonic() - began < 10
            await asyncio.to_thread(up)
            async with asyncio.timeout(15):
                while await answer(store) != kept:
                    await asyncio.sleep(0.1)
            await store.check()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    finally:
        await store.close()


async def answer(store: Any) -> Any:
    try:
        return await store.get(Model, model(1).id)
    except Unavailable:
        return None
