"""What every DocumentStore promises."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

from modelyard.adapters.urls import open_store
from modelyard.core.documents import Document, Part, Range, Time
from modelyard.core.errors import AlreadyApplied, Conflict, Invalid
from modelyard.core.events import Envelope, Fact, announce
from modelyard.kernel.observe import REGISTRY
from modelyard.ports.store import DocumentStore
from tests.backends import Backend, backends, url_of

T0 = datetime(2026, 11, 23, 12, tzinfo=UTC)


class Plant(Document):
    kind: ClassVar[str] = "plant"
    indexed: ClassVar[frozenset[str]] = frozenset({"name", "version", "tags", "models", "flowered", "height", "wild"})

    name: str = "iris"
    version: int = 1
    tags: dict[str, str] = {}
    models: list[str] = []
    flowered: Time | None = None
    height: float | None = None
    wild: bool = False
    colour: str = "blue"


class Tree(Plant):
    kind: ClassVar[str] = "tree"


class Odd(Plant):
    """As another version might write it: nothing that ``Plant`` can read."""

    colour: int = 3  # type: ignore[assignment]


@pytest.fixture(params=backends("store"))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    backend: Backend = request.param
    found = url_of(backend, tmp_path)
    yield found
    backend.clean(found)


@pytest.fixture
async def store(url: str) -> AsyncIterator[DocumentStore]:
    opened = await open_store(url, "registry")
    yield opened
    await opened.close()


def told(doc: Plant, *topics: str) -> tuple[Plant, tuple[Envelope, ...]]:
    return announce(doc, "registry", *(Fact(topic) for topic in topics or ("model.registered",)))


async def ids(store: DocumentStore, where: Any = None, **how: Any) -> list[str]:
    return [doc.id for doc in await store.find(Plant, where, **how)]


# Commit ----------------------------------------------------------------------------------------------------------


async def test_what_was_committed_is_read_back_whole(store: DocumentStore) -> None:
    plant = Plant(id="iris:1", tags={"a": "1", "ü": "€\n\"'"}, models=["x:1"], flowered=T0, height=0.5, wild=True,
                  made_by="cause-1", due=T0)
    stored = await store.commit(plant)
    assert stored == plant.evolve(revision=1)
    assert await store.get(Plant, "iris:1") == stored
    assert await store.get(Plant, "iris:2") is None
    assert await store.get(Plant, "iris:1", workspace="other") is None
    assert await store.get(Tree, "iris:1") is None


class NewerPot(Part):
    size: int = 1
    glaze: str = "none"


class Pot(Part):
    size: int = 1


class Potted(Document):
    kind: ClassVar[str] = "potted"
    pot: Pot = Pot()
    secret: str = ""


class NewerPotted(Document):
    kind: ClassVar[str] = "potted"
    hidden: ClassVar[frozenset[str]] = frozenset({"scent"})
    pot: NewerPot = NewerPot()
    secret: str = ""
    scent: str = ""


async def test_a_newer_versions_fields_outlive_a_write_by_this_one(store: DocumentStore) -> None:
    """Rolling upgrade: what N wrote, N-1 reads, changes and writes back."""
    await store.commit(NewerPotted(id="p", pot=NewerPot(size=2, glaze="blue"), scent="sweet"))
    old = await store.get(Potted, "p")
    assert old is not None and old.pot.size == 2
    assert "scent" not in old.view() and "scent" not in (await store.find(Potted))[0].view()
    assert old.view()["pot"] == {"size": 2}
    await store.commit(old.evolve(secret="kept"))
    new = await store.get(NewerPotted, "p")
    assert new is not None and (new.scent, new.secret, new.pot.size) == ("sweet", "kept", 2)
    assert new.pot.glaze == "blue"


async def test_a_stale_revision_is_a_conflict_and_changes_nothing(store: DocumentStore) -> None:
    first = await store.commit(Plant(id="p"))
    second = await store.commit(first.evolve(colour="white"))
    assert second.revision == 2
    for stale in (first.evolve(colour="red"), Plant(id="p", colour="red"), second.evolve(revision=7, colour="red")):
        with pytest.raises(Conflict):
            await store.commit(stale, told(stale)[1], cause="c")
    assert await store.get(Plant, "p") == second
    assert await store.pending(10) == []
    await store.commit(second, cause="c")  # the refused ones left no cause either


async def test_a_first_commit_of_a_later_revision_is_a_conflict(store: DocumentStore) -> None:
    with pytest.raises(Conflict):
        await store.commit(Plant(id="p", revision=3))
    assert await store.get(Plant, "p") is None


async def test_one_of_many_creations_wins(store: DocumentStore) -> None:
    results = await asyncio.gather(*(store.commit(Plant(id="p", version=n)) for n in range(20)), return_exceptions=True)
    won = [r for r in results if isinstance(r, Plant)]
    assert len(won) == 1
    assert all(isinstance(r, Conflict) for r in results if r is not won[0])
    assert await store.get(Plant, "p") == won[0]


async def test_many_at_once_are_each_answered_for_themselves(store: DocumentStore) -> None:
    """Reads of what is there, gone, absent and another's; and outboxes emptied at once."""
    here = [await store.commit(*told(Plant(id=f"p{n}", version=n, workspace=f"w{n % 3}"))) for n in range(12)]
    gone = await store.commit(here[0].evolve(deleted=True))
    asked = [(f"p{n}", f"w{w}") for w in range(3) for n in range(15)] * 2
    answers = await asyncio.gather(*(store.get(Plant, id, workspace=w, tombstone=n % 2 == 0)
                                     for n, (id, w) in enumerate(asked)))
    there = {(doc.id, doc.workspace): doc for doc in here}
    for n, ((id, w), doc) in enumerate(zip(asked, answers, strict=True)):
        assert doc == ((gone if n % 2 == 0 else None) if (id, w) == ("p0", "w0") else there.get((id, w)))
    waiting = await store.pending(100)
    assert len(waiting) == 12
    await asyncio.gather(*(store.sent(p) for p in waiting[1:]), *(store.sent(p) for p in waiting[1:3]))
    assert await store.pending(100) == waiting[:1]


async def test_a_cause_is_applied_once(store: DocumentStore) -> None:
    one = await store.commit(Plant(id="p"), cause="e1")
    two = await store.commit(one.evolve(version=2), cause="e2")
    for again in (two.evolve(version=9), one.evolve(version=9), Plant(id="p", version=9)):
        with pytest.raises(AlreadyApplied):
            await store.commit(again, told(again)[1], cause="e1")
    assert await store.get(Plant, "p") == two
    assert await store.pending(10) == []
    await store.commit(Plant(id="q"), cause="e1")  # the same cause on another document is its first


async def test_the_last_256_causes_are_known(store: DocumentStore) -> None:
    doc = Plant(id="p")
    for number in range(257):
        doc = await store.commit(doc, cause=f"e{number}")
    with pytest.raises(AlreadyApplied):
        await store.commit(doc, cause="e1")
    await store.commit(doc, cause="e0")


async def test_a_tombstone_is_hidden_and_remembered(store: DocumentStore) -> None:
    doc, events = told(Plant(id="p", name="iris"))
    doc = await store.commit(doc, events, cause="e1")
    gone = await store.commit(doc.evolve(deleted=True))
    assert await store.get(Plant, "p") is None
    assert await store.get(Plant, "p", tombstone=True) == gone
    assert await ids(store, {"name": "iris"}) == []
    assert await ids(store, {"name": "iris"}, tombstones=True) == ["p"]
    assert await ids(store, {"name": "iris", "deleted": True}) == ["p"]
    with pytest.raises(Conflict):
        await store.commit(Plant(id="p"))
    back = await store.commit(Plant(id="p", revision=gone.revision, sequence=gone.sequence))
    assert (back.revision, back.sequence) == (3, 1)
    with pytest.raises(AlreadyApplied):
        await store.commit(back, cause="e1")
    assert await ids(store, {"name": "iris"}) == ["p"]
    assert await ids(store, {"deleted": True}) == []


async def test_kinds_workspaces_and_services_are_apart(store: DocumentStore, url: str) -> None:
    other = await open_store(url, "deployer")
    try:
        await store.commit(Plant(id="p", colour="mine"))
        await other.commit(Plant(id="p", colour="theirs"), told(Plant(id="p"))[1])
        await store.commit(Tree(id="p"))
        await store.commit(Plant(id="p", workspace="w2"))
        mine = await store.get(Plant, "p")
        assert mine is not None and mine.colour == "mine"
        assert [d.colour for d in await other.find(Plant, workspace=None)] == ["theirs"]
        assert await store.pending(10) == []
        assert len(await other.pending(10)) == 1
        assert {d.workspace for d in await store.find(Plant, workspace=None)} == {"default", "w2"}
        assert len(await store.find(Plant)) == 1
    finally:
        await other.close()


async def test_everything_is_there_after_opening_again(url: str) -> None:
    first = await open_store(url, "registry")
    doc, events = told(Plant(id="p", tags={"k": "v"}))
    stored = await first.commit(doc, events, cause="e")
    await first.close()
    await first.close()
    again = await open_store(url, "registry")
    try:
        await again.check()
        assert await again.get(Plant, "p") == stored
        assert await ids(again, {"tags": {"k": "v"}}) == ["p"]
        assert [p.events for p in await again.pending(10)] == [events]
        with pytest.raises(AlreadyApplied):
            await again.commit(stored, cause="e")
    finally:
        await again.close()


async def test_commits_from_several_stores_are_all_kept(url: str) -> None:
    stores = [await open_store(url, "registry") for _ in range(3)]

    async def add(store: DocumentStore, number: int) -> None:
        while True:
            doc = await store.get(Plant, "p")
            try:
                await store.commit((doc or Plant(id="p", version=0)).evolve(version=(doc.version if doc else 0) + 1))
                return
            except Conflict:
                await asyncio.sleep(random.uniform(0, 0.01))

    try:
        await asyncio.gather(*(add(stores[n % 3], n) for n in range(60)))
        doc = await stores[0].get(Plant, "p")
        assert doc is not None and (doc.version, doc.revision) == (60, 60)
    finally:
        await asyncio.gather(*(store.close() for store in stores))


# Outbox ----------------------------------------------------------------------------------------------------------


async def test_events_wait_in_the_order_of_commits_until_sent(store: DocumentStore) -> None:
    doc, first = told(Plant(id="p"), "model.registered", "model.aliased")
    doc = await store.commit(doc, first)
    doc, second = told(doc.evolve(version=2), "model.updated")
    stored = await store.commit(doc, second)
    (waiting,) = await store.pending(10)
    assert (waiting.workspace, waiting.kind, waiting.id) == ("default", "plant", "p")
    assert waiting.events == (*first, *second)

    part = type(waiting)(waiting.workspace, waiting.kind, waiting.id, first)
    await store.sent(part)
    await store.sent(part)
    assert [p.events for p in await store.pending(10)] == [second]
    await store.sent(waiting)
    assert await store.pending(10) == []
    await store.sent(waiting)
    assert await store.get(Plant, "p") == stored  # no revision moved
    await store.commit(stored.evolve(version=3))


async def test_what_is_committed_while_publishing_stays_in_the_outbox(store: DocumentStore) -> None:
    doc, first = told(Plant(id="p"))
    doc = await store.commit(doc, first)
    (seen,) = await store.pending(10)
    doc, second = told(doc, "model.updated")
    await store.commit(doc, second)
    await store.sent(seen)
    assert [p.events for p in await store.pending(10)] == [second]


async def test_the_longest_waiting_comes_first(store: DocumentStore) -> None:
    docs = {}
    for name in ("a", "b", "c"):
        doc, events = told(Plant(id=name))
        docs[name] = await store.commit(doc, events)
    again, more = told(docs["a"], "model.updated")
    await store.commit(again, more)
    assert [p.id for p in await store.pending(2)] == ["a", "b"]
    await store.sent((await store.pending(1))[0])
    assert [p.id for p in await store.pending(9)] == ["b", "c"]


async def test_events_of_all_workspaces_are_pending_also_of_tombstones(store: DocumentStore) -> None:
    for workspace in ("default", "w2"):
        doc = await store.commit(Plant(id="p", workspace=workspace))
        gone, events = told(doc.evolve(deleted=True), "model.deleted")
        await store.commit(gone, events)
    assert {p.workspace for p in await store.pending(10)} == {"default", "w2"}


async def test_waiting_for_events_ends_with_the_time(store: DocumentStore) -> None:
    began = time.monotonic()
    assert await store.pending(10, wait=0.3) == []
    assert 0.3 <= time.monotonic() - began < 5


async def test_what_waits_already_is_given_at_once(store: DocumentStore) -> None:
    doc, events = told(Plant(id="p"))
    await store.commit(doc, events)
    async with asyncio.timeout(5):
        assert [p.events for p in await store.pending(10, wait=60.0)] == [events]


async def test_a_commit_through_this_store_wakes_at_once(store: DocumentStore) -> None:
    latencies = []
    for number in range(5):
        waiting = asyncio.create_task(store.pending(10, wait=30.0))
        await asyncio.sleep(0.05 * number)
        await store.commit(Plant(id=f"silent{number}"))
        doc, events = told(Plant(id=f"p{number}"))
        await store.commit(doc, events)
        began = time.monotonic()
        (found,) = await waiting
        latencies.append(time.monotonic() - began)
        assert found.events == events
        await store.sent(found)
    assert min(latencies) < 0.1  # well below any poll


async def test_a_commit_through_another_store_wakes_soon(store: DocumentStore, url: str) -> None:
    other, third = await open_store(url, "registry"), await open_store(url, "deployer")
    try:
        doc = await other.commit(Plant(id="p"))
        await third.commit(*told(Plant(id="theirs")))
        for _ in range(3):
            waiting = asyncio.create_task(store.pending(10, wait=30.0))
            await asyncio.sleep(0.3)
            doc, events = told(doc, "model.updated")
            doc = await other.commit(doc, events)
            async with asyncio.timeout(5):
                (found,) = await waiting
            assert found.events == events
            await store.sent(found)
    finally:
        await asyncio.gather(other.close(), third.close())


async def test_whoever_waits_for_events_may_give_up(store: DocumentStore) -> None:
    waiting = [asyncio.create_task(store.pending(10, wait=30.0)) for _ in range(3)]
    await asyncio.sleep(0.1)
    waiting[0].cancel()
    doc, events = told(Plant(id="p"))
    await store.commit(doc, events)
    async with asyncio.timeout(5):
        done = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert [[p.events for p in found] for found in done[1:] if isinstance(found, list)] == [[events]] * 2


# Find ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def garden(store: DocumentStore) -> DocumentStore:
    for number in range(1, 13):
        await store.commit(Plant(
            id=f"p{number:02}", name="iris" if number % 3 else "rose", version=number, created=T0, updated=T0,
            tags={"team": "flora" if number % 2 else "fauna", "n": str(number)} if number != 12 else {},
            models=[f"m:{number}", "m:all"], flowered=T0 + timedelta(hours=number) if number > 6 else None,
            height=number / 2, wild=number % 4 == 0))
    return store


@pytest.mark.parametrize(("where", "found"), [
    ({}, range(1, 13)),
    ({"name": "rose"}, (3, 6, 9, 12)),
    ({"version": 5}, (5,)),
    ({"height": 2.5}, (5,)),
    ({"wild": True}, (4, 8, 12)),
    ({"models": "m:7"}, (7,)),
    ({"models": "m:all", "name": "rose"}, (3, 6, 9, 12)),
    ({"models": "m:none"}, ()),
    ({"tags": {"team": "flora"}}, (1, 3, 5, 7, 9, 11)),
    ({"tags": {"team": "flora", "n": "3"}}, (3,)),
    ({"tags": {"team": "flora", "n": "4"}}, ()),
    ({"tags": "team"}, range(1, 12)),
    ({"tags": "none"}, ()),
    ({"tags": {"team": "flora"}, "name": "rose"}, (3, 9)),
    ({"version": Range(3, 6)}, (3, 4, 5)),
    ({"version": Range(gte=11)}, (11, 12)),
    ({"version": Range(lt=3)}, (1, 2)),
    ({"flowered": Range(gte=T0 + timedelta(hours=11))}, (11, 12)),
    ({"flowered": Range()}, range(7, 13)),
    ({"flowered": T0 + timedelta(hours=8)}, (8,)),
    ({"name": "iris", "version": Range(2, 6)}, (2, 4, 5)),
    ({"tags": {"team": "fauna"}, "name": "iris", "version": Range(lt=9)}, (2, 4, 8)),
    ({"id": "p03"}, (3,)),
    ({"id": Range("p03", "p05")}, (3, 4)),
])
@pytest.mark.parametrize("order", ["id", "-id", "version", "-version", "-created", "height"])
async def test_find(garden: DocumentStore, where: Any, found: Any, order: str) -> None:
    expected = [f"p{n:02}" for n in sorted(found, reverse=order.startswith("-"))]
    assert await ids(garden, where, order=order) == expected
    pages: list[str] = []
    after: Any = None
    while page := await garden.find(Plant, where, order=order, after=after, limit=2):
        pages += [doc.id for doc in page]
        after = (getattr(page[-1], order.removeprefix("-")), page[-1].id)
    assert pages == expected


async def test_documents_without_the_order_field_are_left_out(garden: DocumentStore) -> None:
    assert await ids(garden, order="-flowered", limit=2) == ["p12", "p11"]
    assert len(await ids(garden, {"models": "m:all"}, order="flowered")) == 6
    assert len(await ids(garden, order="id")) == 12


async def test_ties_go_by_id_in_the_same_direction(garden: DocumentStore) -> None:
    assert await ids(garden, {"name": "rose"}, order="name") == ["p03", "p06", "p09", "p12"]
    assert await ids(garden, {"name": "rose"}, order="-name") == ["p12", "p09", "p06", "p03"]


@pytest.mark.parametrize("order", ["id", "-version", "created"])
async def test_tombstones_take_their_place_among_the_living(garden: DocumentStore, order: str) -> None:
    for number in (2, 5, 12):
        doc = await garden.get(Plant, f"p{number:02}")
        assert doc is not None
        await garden.commit(doc.evolve(deleted=True))
    everything = sorted((f"p{n:02}" for n in range(1, 13)), reverse=order.startswith("-"))
    assert await ids(garden, order=order) == [i for i in everything if i not in ("p02", "p05", "p12")]
    assert await ids(garden, order=order, tombstones=True) == everything
    assert await ids(garden, order=order, tombstones=True, limit=3) == everything[:3]


async def test_the_index_follows_every_change(store: DocumentStore) -> None:
    doc = await store.commit(Plant(id="p", tags={"a": "1", "b": "2"}, models=["x"], flowered=T0))
    doc = await store.commit(doc.evolve(tags={"a": "2"}, models=["y", "x", "x"], flowered=None))
    assert await ids(store, {"tags": {"a": "1"}}) == await ids(store, {"tags": "b"}) == []
    assert await ids(store, {"tags": {"a": "2"}}) == await ids(store, {"models": "y"}) == ["p"]
    assert await ids(store, {"flowered": Range()}) == []
    await store.commit(doc.evolve(models=[]))
    assert await ids(store, {"models": "x"}) == []


async def test_keys_and_pairs_of_a_map_are_never_taken_for_each_other(store: DocumentStore) -> None:
    await store.commit(Plant(id="p", tags={"a=b": "c"}))
    await store.commit(Plant(id="q", tags={"a": "b=c"}))
    assert await ids(store, {"tags": {"a=b": "c"}}) == ["p"]
    assert await ids(store, {"tags": {"a": "b=c"}}) == ["q"]
    assert await ids(store, {"tags": "a"}) == ["q"]


async def test_a_walk_during_inserts_misses_and_repeats_nothing(store: DocumentStore) -> None:
    for number in range(40):
        await store.commit(Plant(id=f"p{number:03}", created=T0 + timedelta(seconds=number // 4)))
    seen: list[str] = []
    after: Any = None
    fresh = 100
    while page := await store.find(Plant, order="-created", after=after, limit=7):
        seen += [doc.id for doc in page]
        after = (page[-1].created, page[-1].id)
        for _ in range(5):
            fresh += 1
            await store.commit(Plant(id=f"p{fresh}", created=T0 + timedelta(seconds=random.randint(0, 60))))
    assert len(seen) == len(set(seen))
    assert {f"p{n:03}" for n in range(40)} <= set(seen)


@pytest.mark.parametrize(("where", "order"), [
    ({"colour": "blue"}, "id"), ({"nothing": 1}, "id"), ({}, "colour"), ({}, "tags"), ({}, "-models"),
    ({"version": Range(1), "height": Range(1)}, "id"), ({"models": Range("a")}, "id"), ({"tags": Range("a")}, "id"),
    ({"name": None}, "id"), ({"name": ["iris"]}, "id"), ({"tags": {"a": 1.5j}}, "id"),
])
async def test_a_search_that_no_index_answers_is_invalid(store: DocumentStore, where: Any, order: str) -> None:
    with pytest.raises(Invalid):
        await store.find(Plant, where, order=order)


async def test_a_limit_below_one_is_invalid(store: DocumentStore) -> None:
    with pytest.raises(Invalid):
        await store.find(Plant, limit=0)


async def test_a_cancelled_call_harms_nobody(store: DocumentStore) -> None:
    tasks = [asyncio.create_task(store.commit(Plant(id=f"p{n}"))) for n in range(50)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(d, (Plant, asyncio.CancelledError)) for d in done)
    kept = set(await ids(store))
    assert {d.id for d in done if isinstance(d, Plant)} <= kept
    await store.commit(Plant(id="after"))


# What cannot be read ---------------------------------------------------------------------------------------------


def unreadable() -> float:
    return sum(sample.value for metric in REGISTRY.collect() if metric.name == "modelyard_documents_unreadable"
               for sample in metric.samples if sample.labels["kind"] == "plant")


@pytest.mark.parametrize("order", ["id", "-id", "version", "-version", "height", "due"])
async def test_a_list_goes_past_what_cannot_be_read(
        store: DocumentStore, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """Others take its place, page by page; and it is told of, once."""
    before, good, word = unreadable(), [], secrets.token_hex(3)  # it is counted for the process
    for n in range(9):
        class_ = Plant if n in (1, 4, 6, 8) else Odd
        await store.commit(class_(
            id=f"{word}{n}", version=n, height=n / 2, due=T0 + timedelta(seconds=n), tags={"a": "b"}))
        good += [f"{word}{n}"] * (class_ is Plant)
    good = good[::-1] if order.startswith("-") else good
    space = None if order == "due" else "default"
    for limit in (2, 3, 9):
        found: list[Plant] = []
        while page := await store.find(Plant, {"tags": {"a": "b"}}, order=order, limit=limit, workspace=space, after=(
                (getattr(found[-1], order.removeprefix("-")), found[-1].id) if found else None)):
            found += page
            if len(page) < limit:
                break
        assert [doc.id for doc in found] == good, limit
    assert unreadable() == before + 5
    told = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
    assert len(told) == 5 and all(f"plant '{word}" in line for line in told)


async def test_one_that_cannot_be_read_says_so_and_is_no_other(store: DocumentStore) -> None:
    """``get`` of it, and a search for one: the highest is not the one below it."""
    before = unreadable()
    bad, _ = await store.commit(Odd(id="iris:2", version=2)), await store.commit(Plant(id="iris:1"))
    with pytest.raises(Invalid, match=r"plant 'iris:2': a stored plant cannot be read .*: Input should be") as found:
        await store.get(Plant, "iris:2")
    assert found.value.code == "unreadable"
    with pytest.raises(Invalid, match="iris:2"):
        await store.find(Plant, order="-version", limit=1)
    assert [doc.id for doc in await store.find(Plant, order="version", limit=1)] == ["iris:1"]
    await store.commit(Plant(id="iris:2", version=2, revision=bad.revision))
    assert (await store.find(Plant, order="-version", limit=1))[0].id == "iris:2" and unreadable() == before
