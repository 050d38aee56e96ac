"""The SQLite store's own matters: its plans, its file, its errors."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

from modelyard.adapters import store_sqlite_find as finding
from modelyard.adapters.sqlite_file import SqliteFile
from modelyard.adapters.store_sqlite import SCHEMA, SqliteStore, _Row
from modelyard.core.documents import INDEXED_ALWAYS, Document, Range
from modelyard.core.errors import Conflict, Invalid, Unavailable

T0 = datetime(2026, 11, 23, tzinfo=UTC)


class Model(Document):
    kind: ClassVar[str] = "model"
    indexed: ClassVar[frozenset[str]] = frozenset({"name", "version", "tags", "properties", "models"})
    name: str
    version: int
    tags: dict[str, str] = {}
    properties: dict[str, str] = {}
    models: list[str] = []


def model(number: int) -> Model:
    return Model(
        id=f"m{number // 100}:{number % 100 + 1}", name=f"m{number // 100}", version=number % 100 + 1,
        created=T0 + timedelta(seconds=number), updated=T0 + timedelta(seconds=number),
        tags={"team": "flora", "serial": str(number), "cell": str(number % 100)},
        properties={"accuracy": f"0.{number % 50:02}"}, models=[f"p{number % 1000}"],
        due=T0 if number % 20_000 == 7 else None)


async def fill(store: SqliteStore, count: int) -> None:
    """As many commits as that, in one transaction."""
    space = await store._space("model", "default")
    fields = set(Model.indexed | INDEXED_ALWAYS) - {"deleted"}
    docs = [model(n).evolve(revision=1) for n in range(count)]
    rows = [_Row(d, space, d.model_dump_json().encode(), d.model_dump(mode="json", include=fields), [], None)
            for d in docs]

    def write(db: sqlite3.Connection) -> None:
        for row in rows:
            row.write(db, "registry")

    await store._file.write(write)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "yard.db", "registry")
    yield opened
    await opened.close()


SEARCHES: dict[str, dict[str, Any]] = {
    "everything, newest first": {"where": {}, "order": "-created"},
    "one name": {"where": {"name": "m7"}, "order": "-version"},
    "a rare tag": {"where": {"tags": {"serial": "77"}}},
    "a common tag": {"where": {"tags": {"team": "flora"}}, "order": "-created"},
    "a common tag by id": {"where": {"tags": {"team": "flora"}}, "order": "id"},
    "one in a hundred": {"where": {"tags": {"cell": "7"}}, "order": "-created"},
    "two tags": {"where": {"tags": {"cell": "7", "team": "flora"}}, "order": "-created"},
    "a key": {"where": {"tags": "cell"}, "order": "-created"},
    "a property": {"where": {"properties": {"accuracy": "0.07"}}, "order": "-created"},
    "contained in a list": {"where": {"models": "p7"}, "order": "-created"},
    "a range": {"where": {"created": Range(T0, T0 + timedelta(hours=1))}, "order": "-created"},
    "a range beside a tag": {"where": {"version": Range(5, 9), "tags": {"team": "flora"}}, "order": "created"},
    "what is due": {"where": {"due": Range(lt=T0 + timedelta(days=1)), "tags": {"team": "flora"}}, "order": "due"},
    "nothing": {"where": {"tags": {"team": "fauna"}}, "order": "-created"},
    "tombstones too": {"where": {"name": "m7"}, "order": "-version", "tombstones": True},
}


@pytest.mark.parametrize("name", SEARCHES)
async def test_every_plan_walks_indexes_only(store: SqliteStore, name: str) -> None:
    await fill(store, 300)
    how = {"order": "id", "tombstones": False, **SEARCHES[name]}
    query = finding.plan(Model, how["where"], how["order"], None, 100, how["tombstones"])
    leads: list[str | int] = ["order", *range(len(query.equal)), *(["range"] if query.ranged else [])]

    def explain(db: sqlite3.Connection) -> list[str]:
        steps = []
        for lead in leads:
            sql, args = finding.compose(2, query, lead)
            steps += [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", args)]
        return steps

    for step in await store._file.read(explain):
        if step.startswith("SCAN"):
            assert step == "SCAN x"  # the rows that the walk has found
        if step.startswith("SEARCH"):
            assert any(words in step for words in (
                "USING PRIMARY KEY (shelf=? AND field=?", "USING INTEGER PRIMARY KEY (rowid=?)")), step


async def test_pending_walks_its_own_index(store: SqliteStore) -> None:
    def explain(db: sqlite3.Connection) -> list[str]:
        return [row[3] for row in db.execute(
            "EXPLAIN QUERY PLAN SELECT s.workspace, s.kind, d.id, d.outbox FROM documents d CROSS JOIN spaces s "
            "ON s.space=d.space WHERE d.service=? AND d.waiting IS NOT NULL ORDER BY d.waiting LIMIT ?", ("r", 9))]

    steps = await store._file.read(explain)
    assert steps[0].startswith("SEARCH d USING INDEX documents_waiting")
    assert not any("SCAN" in s or "B-TREE" in s for s in steps)


async def counted(store: SqliteStore) -> list[None]:
    """Grows by one element for each thousand steps of SQLite's machine."""
    steps: list[None] = []
    await store._file.read(lambda db: db.set_progress_handler(lambda: steps.append(None), 1000))
    return steps


@pytest.mark.slow
async def test_searches_among_100_000_read_a_small_part(store: SqliteStore) -> None:
    """Counted in SQLite's own steps, which no neighbour on the machine changes: a scan takes over a million."""
    await fill(store, 100_000)
    steps = await counted(store)
    taken = {}
    for name, how in SEARCHES.items():
        steps.clear()
        assert bool(await store.find(Model, limit=100, **how)) == (name != "nothing"), name
        taken[name] = len(steps) * 1000
    assert max(taken.values()) < 400_000, str(taken)
    page: list[Model] = []
    steps.clear()
    for _ in range(20):  # a walk does not slow down on its way
        after = (page[-1].created, page[-1].id) if page else None
        page = await store.find(Model, {"tags": {"team": "flora"}}, order="-created", after=after, limit=100)  # type: ignore[arg-type]
    assert len(steps) * 1000 < 20 * 2 * max(taken["a common tag"], 20_000)
    assert page[-1].id == model(100_000 - 2000).id


# The file --------------------------------------------------------------------------------------------------------


async def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "yard.db"
    store = await SqliteStore.open(path, "registry")
    await store.commit(model(1))
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await store.close()
    path.chmod(0o644)
    await (await SqliteStore.open(path, "registry")).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("sync", "level"), [("normal", 1), ("full", 2)])
async def test_sync_is_what_was_asked_for(tmp_path: Path, sync: str, level: int) -> None:
    store = await SqliteStore.open(tmp_path / "yard.db", "registry", sync=sync)
    found = await store._file.read(lambda db: (db.execute("PRAGMA synchronous").fetchone()[0],
                                               db.execute("PRAGMA journal_mode").fetchone()[0]))
    assert found == (level, "wal")
    await store.close()


@pytest.mark.slow
async def test_many_open_a_new_file_at_once(tmp_path: Path) -> None:
    code = ("import asyncio, sys; from modelyard.adapters.store_sqlite import SqliteStore; "
            "asyncio.run(SqliteStore.open(sys.argv[1], 'registry'))")
    crowd = [await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path / "yard.db"))
             for _ in range(4)]
    stores = await asyncio.gather(*(SqliteStore.open(tmp_path / "yard.db", f"s{n}") for n in range(8)))
    assert [await process.wait() for process in crowd] == [0] * 4
    await asyncio.gather(*(store.close() for store in stores))


# Errors ----------------------------------------------------------------------------------------------------------


async def refused(work: Awaitable[Any], error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        await work
    for word in words:
        assert word in str(caught.value)


def write(path: Path, work: Callable[[sqlite3.Connection], Any]) -> None:
    with sqlite3.connect(path) as db:
        work(db)
    db.close()


async def test_what_is_not_ours_is_not_opened(tmp_path: Path) -> None:
    text, other, newer = tmp_path / "text.db", tmp_path / "other.db", tmp_path / "newer.db"
    await asyncio.to_thread(text.write_bytes, b"this is no database, but it is long enough to be one" * 30)
    await asyncio.to_thread(write, other, lambda db: db.execute("CREATE TABLE theirs(x)"))
    await (await SqliteStore.open(newer, "registry")).close()
    await asyncio.to_thread(write, newer, lambda db: db.execute("UPDATE parts SET version=version+1"))
    await refused(SqliteStore.open(text, "r"), Unavailable, str(text), "not a database")
    await refused(SqliteStore.open(other, "r"), Invalid, str(other), "another program")
    await refused(SqliteStore.open(newer, "r"), Invalid, "newer Modelyard", "upgrade")
    await refused(SqliteStore.open(tmp_path, "r"), Unavailable, str(tmp_path))
    await refused(SqliteStore.open(text / "below.db", "r"), Unavailable, "check that its folder")


async def test_a_locked_file_is_waited_for_and_then_named(tmp_path: Path) -> None:
    path = tmp_path / "yard.db"
    store = await SqliteStore.open(path, "registry", busy_s=0.4)
    await store.commit(model(1))
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    await refused(store.commit(model(2)), Unavailable, str(path), "locked by another program")
    assert 0.3 < time.monotonic() - began < 5
    assert await store.get(Model, model(1).id) is not None  # readers do not wait
    waiting = asyncio.create_task(store.commit(model(2)))
    await asyncio.sleep(0.1)
    holder.execute("ROLLBACK")
    await waiting
    holder.close()
    await store.close()


FULL = """
import asyncio, resource, signal, sys
from modelyard.core.errors import Unavailable
from tests.unit.adapters.test_store_sqlite import SqliteStore, model

async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = await SqliteStore.open(sys.argv[1], "registry")
    first = await store.commit(model(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    stored, refused = 1, 0
    for number in range(1, 600):
        try:
            await store.commit(model(number))
            stored += 1
        except Unavailable as exc:
            refused += 1
            assert "space" in str(exc) or "disk" in str(exc), exc
    assert refused and stored > 10, (stored, refused)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await store.commit(model(1000))
    found = await store.find(type(first), limit=10_000)
    assert len(found) == stored + 1, (len(found), stored)
    await store.close()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_full_disk_refuses_and_keeps_what_there_is(tmp_path: Path) -> None:
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", FULL, str(tmp_path / "yard.db")],
                                   cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


async def test_a_damaged_file_is_unavailable_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "yard.db"
    store = await SqliteStore.open(path, "registry")
    await fill(store, 500)
    await store.close()

    def damage() -> None:
        with path.open("r+b") as file:
            file.seek(4096 * 3)
            file.write(os.urandom(os.path.getsize(path) - 4096 * 4))

    await asyncio.to_thread(damage)
    again = await SqliteStore.open(path, "registry")
    await refused(again.find(Model, {"tags": {"cell": "7"}}), Unavailable, "damaged", "backup")
    await again.close()


async def test_a_file_that_was_removed_takes_no_writes(tmp_path: Path) -> None:
    path = tmp_path / "yard.db"
    store = await SqliteStore.open(path, "registry")
    await store.commit(model(1))
    await asyncio.to_thread(path.rename, tmp_path / "elsewhere.db")
    await refused(store.commit(model(2)), Unavailable, "removed or replaced", "restart")
    await refused(store.check(), Unavailable, "removed or replaced")
    await store.close()


async def test_a_read_only_file_is_unavailable(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "yard.db", "registry")
    await store._file.read(lambda db: db.execute("PRAGMA query_only=1"))
    await refused(store.commit(model(1)), Unavailable, "cannot be written", "writable")
    await store.close()


async def test_a_closed_store_says_so(store: SqliteStore) -> None:
    await store.close()
    await refused(store.get(Model, "x"), Unavailable, "closed")


async def test_numbers_that_sqlite_cannot_hold_are_invalid(store: SqliteStore) -> None:
    await refused(store.find(Model, {"version": 2**70}), Invalid, "64 bits")
    await refused(store.commit(model(1).evolve(version=2**70)), Invalid)
    await store.commit(model(1))


async def test_a_document_that_this_version_cannot_read_is_named(store: SqliteStore) -> None:
    class Odd(Document):
        kind: ClassVar[str] = "model"
    await store.commit(Odd(id="x"))
    await refused(store.get(Model, "x"), Invalid, "cannot be read")


async def test_one_that_fails_in_a_group_fails_alone(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "yard.db", "registry")
    await store.commit(model(50))
    gate = sqlite3.connect(tmp_path / "yard.db", isolation_level=None)
    gate.execute("BEGIN IMMEDIATE")  # so that what follows waits together
    tasks = [asyncio.create_task(store.commit(model(n))) for n in range(100)]
    await asyncio.sleep(0.1)
    gate.execute("ROLLBACK")
    gate.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [n for n, r in enumerate(results) if isinstance(r, Conflict)] == [50]
    assert len(await store.find(Model, limit=1000)) == 100
    await store.close()


async def test_opening_and_closing_leave_no_thread_and_no_file(tmp_path: Path) -> None:
    before, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        file = await SqliteFile.open(tmp_path / "yard.db", SCHEMA)
        file.listen(lambda: None)
        await file.close()
    assert not set(threading.enumerate()) - before
    assert len(os.listdir("/proc/self/fd")) <= files + 1
