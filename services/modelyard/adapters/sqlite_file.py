"""One SQLite file, one connection, one thread: what the store and the bus on SQLite share.

Every call runs on the connection's own thread, so the event loop never waits for a disk. Writes that wait together
go into one transaction, each under a savepoint of its own. Writers of one process take turns by a lock, writers of
several processes by SQLite's; the retry is ours, because SQLite's busy handler sleeps longer and longer and starves
whoever waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import Invalid, Unavailable
from .sqlite_errors import WHAT_TO_DO, busy_text, is_busy, translated
from .sqlite_watch import Watch

T = TypeVar("T")
APPLICATION_ID = 0x4D596172  # "MYar": what `file` and other programs see
POLL_S, WATCHED_POLL_S = 0.012, 0.25
"""How often a listener looks whether another connection has written: where the kernel cannot tell, and where it can."""
GROUP = 64
_turns: dict[str, threading.Lock] = {}


@dataclass(frozen=True)
class Schema:
    """The tables of one part (``documents``, ``bus``) at one version."""

    part: str
    version: int
    statements: Sequence[str]


@dataclass
class _Job:
    fn: Callable[[sqlite3.Connection], Any]
    write: bool
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None


class SqliteFile:
    """Opened by ``SqliteFile.open``; ``read`` and ``write`` run a function with the connection on the thread."""

    def __init__(self, path: Path, schema: Schema, sync: str, busy_s: float) -> None:
        self.path = path
        self._schema, self._sync, self._busy_s = schema, sync, busy_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"sqlite {schema.part}", daemon=True)
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        self._listener: Callable[[], None] | None = None
        self._watch: Watch | None = None
        self._poll_s = POLL_S
        self._inode = 0

    @classmethod
    async def open(cls, path: Path, schema: Schema, *, sync: str = "normal", busy_s: float = 10.0) -> SqliteFile:
        """Creates the file (mode 0600) and the part's tables where missing. ``sync``: ``normal`` survives the death
        of the process, ``full`` also that of the machine. Raises Unavailable or Invalid with what to do."""
        if sync not in ("normal", "full"):
            raise Invalid(f"sync={sync} is unknown: write sync=normal or sync=full")
        self = cls(path, schema, sync, busy_s)
        self._thread.start()
        await self._opened
        return self

    async def read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Runs ``fn`` in one snapshot; it may run again when the file is busy."""
        return await self._submit(fn, write=False)

    async def write(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Runs ``fn`` in a write transaction: all of it or, when it raises, none. Durable when this returns."""
        return await self._submit(fn, write=True)

    def listen(self, listener: Callable[[], None] | None) -> None:
        """From now on ``listener`` is called in the event loop soon after another connection has written; None ends
        it. It may be called when nothing was written."""
        self._listener = listener
        if listener is not None and self._watch is None:
            self._watch = Watch(lambda: self._listener and self._listener())
            self._poll_s = WATCHED_POLL_S if self._watch.start(self.path) else POLL_S
        self._jobs.put(_Job(lambda db: None, False, self._loop.create_future()))

    async def check(self) -> None:
        """Returns when the file answers and may be written. Raises Unavailable."""

        def look(db: sqlite3.Connection) -> None:
            self._same_file()
            db.execute("SELECT count(*) FROM parts").fetchone()
            if not os.access(self.path, os.W_OK) or not os.access(self.path.parent, os.W_OK):
                raise Unavailable(f"{self.path} {WHAT_TO_DO[sqlite3.SQLITE_READONLY]}")

        await self.read(look)

    async def close(self) -> None:
        """Ends the thread after what was given to it. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            if self._watch is not None:
                self._watch.stop()
        while self._thread.is_alive():  # noqa: ASYNC110 - a thread ends by itself, nothing tells of it
            await asyncio.sleep(0.001)

    async def _submit(self, fn: Callable[[sqlite3.Connection], T], *, write: bool) -> T:
        if self._closed:
            raise Unavailable(f"the database {self.path} was closed")
        job = _Job(fn, write, self._loop.create_future())
        self._jobs.put(job)
        result: T = await job.future
        return result

    # On the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            db = self._connect()
        except Exception as exc:  # noqa: BLE001 - a thread's failure belongs to whoever opens the file
            self._post(_settle, self._opened, None, translated(exc, self.path, self._busy_s))
            return
        self._post(_settle, self._opened, None, None)
        with contextlib.closing(db):
            self._serve(db)

    def _serve(self, db: sqlite3.Connection) -> None:
        """Jobs in the order they came, until None comes; between them, a look at what others wrote."""
        seen, looked = _data_version(db), 0.0
        held: list[_Job | None] = []
        while True:
            jobs: list[_Job] = []
            with contextlib.suppress(queue.Empty):
                first = held.pop() if held else self._jobs.get(timeout=self._poll_s if self._listener else None)
                if first is None:
                    return
                jobs.append(first)
                while first.write and len(jobs) < GROUP and not held:
                    job = self._jobs.get_nowait()
                    if job is not None and job.write:
                        jobs.append(job)
                    else:
                        held.append(job)
            if jobs:
                self._run(db, jobs)
                self._post(_settle_all, jobs)
            if self._listener and (now := time.monotonic()) - looked >= self._poll_s:
                looked = now
                if (version := _data_version(db)) != seen:
                    seen = version
                    self._post(self._listener)

    def _run(self, db: sqlite3.Connection, jobs: list[_Job]) -> None:
        try:
            if jobs[0].write:
                self._transaction(db, jobs)
            else:
                jobs[0].result = self._patiently(lambda: _snapshot(db, jobs[0].fn))
        except Exception as exc:  # noqa: BLE001 - it goes to the callers, who wait on the event loop
            for job in jobs:
                job.error = job.error or translated(exc, self.path, self._busy_s)

    def _transaction(self, db: sqlite3.Connection, jobs: list[_Job]) -> None:
        """One transaction for all; a job that raises is undone alone."""
        turn = _turns.setdefault(str(self.path), threading.Lock())
        if not turn.acquire(timeout=self._busy_s):
            raise Unavailable(busy_text(self.path, self._busy_s))
        try:
            self._patiently(lambda: db.execute("BEGIN IMMEDIATE"))
            try:
                self._same_file()
                for job in jobs:
                    self._savepoint(db, job)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        finally:
            turn.release()

    def _savepoint(self, db: sqlite3.Connection, job: _Job) -> None:
        db.execute("SAVEPOINT job")
        try:
            job.result = job.fn(db)
        except Exception as exc:
            if not db.in_transaction:
                raise  # SQLite gave up the whole transaction (disk full, I/O error)
            db.execute("ROLLBACK TO job")
            job.error = translated(exc, self.path, self._busy_s)
        db.execute("RELEASE job")

    def _patiently(self, fn: Callable[[], T]) -> T:
        """Again while another process writes; short waits, so that turns are taken within a millisecond or two."""
        end = time.monotonic() + self._busy_s
        wait = 0.0001
        while True:
            try:
                return fn()
            except sqlite3.OperationalError as exc:
                if not is_busy(exc) or time.monotonic() > end:
                    raise
            time.sleep(wait * random.uniform(0.5, 1.5))
            wait = min(wait * 1.5, 0.002)

    def _connect(self) -> sqlite3.Connection:
        self.path = self.path.resolve()
        with contextlib.suppress(FileExistsError):
            self.path.parent.mkdir(mode=0o700, parents=True)
        # Never opened but by SQLite: closing any descriptor of the file drops every lock that this process has on it,
        # and another process that ends would then take the log away from under us.
        with contextlib.suppress(FileExistsError):
            os.mknod(self.path, 0o600 | stat.S_IFREG)
        about = os.stat(self.path)
        if about.st_mode & 0o077:
            os.chmod(self.path, 0o600)
        self._inode = about.st_ino
        db = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=True, cached_statements=256)
        try:
            self._patiently(lambda: self._prepare(db))
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise Invalid(f"the file system of {self.path} cannot share a database between processes (no write-ahead "
                          "log); put the data folder on a local disk")
        for pragma in (f"synchronous={self._sync}", "cache_size=-8192", "journal_size_limit=67108864",
                       "foreign_keys=OFF", "temp_store=MEMORY"):
            db.execute(f"PRAGMA {pragma}")
        db.execute("BEGIN IMMEDIATE")
        try:
            self._migrate(db)
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _migrate(self, db: sqlite3.Connection) -> None:
        (owner,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if owner != APPLICATION_ID and (owner or tables):
            raise Invalid(f"{self.path} is a database of another program; give another path")
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute("CREATE TABLE IF NOT EXISTS parts(part TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID")
        schema = self._schema
        row = db.execute("SELECT version FROM parts WHERE part=?", (schema.part,)).fetchone()
        if row and row[0] > schema.version:
            raise Invalid(f"{self.path} was written by a newer Modelyard ({schema.part} version {row[0]}, this one "
                          f"knows {schema.version}); upgrade Modelyard or use another data folder", code="newer-data")
        for statement in schema.statements:
            db.execute(statement)
        db.execute("INSERT OR IGNORE INTO parts VALUES (?, ?)", (schema.part, schema.version))

    def _same_file(self) -> None:
        """A file that was removed or replaced under us would take writes and lose them."""
        try:
            same = os.stat(self.path).st_ino == self._inode
        except OSError:
            same = False
        if not same:
            raise Unavailable(f"{self.path} was removed or replaced while in use; restart to open what is there now")

    def _post(self, fn: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended: nobody waits
            self._loop.call_soon_threadsafe(fn, *args)


def _snapshot(db: sqlite3.Connection, fn: Callable[[sqlite3.Connection], T]) -> T:
    db.execute("BEGIN")
    try:
        return fn(db)
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _data_version(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA data_version").fetchone()[0]
    return version


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return  # whoever waited was cancelled
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _settle_all(jobs: list[_Job]) -> None:
    for job in jobs:
        _settle(job.future, job.result, job.error)
