"""The connection to MongoDB: the one file that knows motor. What the driver raises leaves it as ours.

Reads are of what a majority has: nobody acts on a state that a crash could take back. Writes are acknowledged by a
majority and journaled.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

from bson.errors import BSONError
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection
from pymongo import IndexModel, UpdateOne, WriteConcern, errors
from pymongo.read_concern import ReadConcern

from ..core.errors import Invalid, ModelyardError, TooLarge, Unavailable

T = TypeVar("T")
DATABASE = "modelyard"
SELECT_S = 3.0
"""So long a primary is looked for: an election is over by then, and whoever asks for readiness waits no longer."""
PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.4)
AUTH = frozenset({18, 8000, 11, 334})
DENIED = frozenset({13, 31})
LARGE = frozenset({10334, 17419, 17420})
TRANSIENT = frozenset({6, 7, 43, 50, 63, 64, 89, 91, 100, 112, 134, 150, 175, 189, 202, 234, 262, 286, 317, 358, 9001,
                       10058, 10107, 11600, 11602, 13388, 13435, 13436})
OPTIONS = ("replicaSet", "authSource", "authMechanism", "tls", "tlsCAFile")


class Link:
    """Opened by ``Link.open``. ``documents`` is the collection of one service; ``newest`` reads it as it stands now,
    once that is sure (slower)."""

    def __init__(self, client: AsyncIOMotorClient[Any], where: str, database: str, service: str,
                 timeout_s: float) -> None:
        self.where, self.service, self.timeout_s = where, service, timeout_s
        self._client, self._closed = client, False
        plain = client[database][service]
        majority = WriteConcern("majority", j=True, wtimeout=int(timeout_s * 1000))
        self.documents: AsyncIOMotorCollection[Any] = plain.with_options(
            write_concern=majority, read_concern=ReadConcern("majority"))
        self.newest: AsyncIOMotorCollection[Any] = plain.with_options(read_concern=ReadConcern("linearizable"))

    @classmethod
    async def open(cls, url: str, service: str, *, timeout_s: float = 5.0, pool: int = 32, **options: str) -> Link:
        """Connects and looks whether it is a replica set. Raises Invalid for a URL that is none, else Unavailable
        with what to do."""
        parts = urlsplit(url)
        database, where = unquote(parts.path.strip("/")) or DATABASE, parts.netloc.rpartition("@")[2]
        if any(c in database for c in '/\\. "$*<>:|?\0') or len(database) > 60:
            raise Invalid(f"store: '{database[:80]}' is no name of a database; write mongodb://{where}/modelyard")
        settings: dict[str, Any] = {name: options[name] for name in OPTIONS if name in options} | {
            "appname": f"modelyard {service}", "serverSelectionTimeoutMS": int(SELECT_S * 1000),
            "connectTimeoutMS": int(SELECT_S * 1000), "socketTimeoutMS": int(timeout_s * 1000),
            "waitQueueTimeoutMS": int(timeout_s * 1000), "maxPoolSize": int(pool), "heartbeatFrequencyMS": 2000,
            "retryWrites": False}  # who may have written is told by tokens; the server need not keep account as well
        try:
            client = await asyncio.to_thread(AsyncIOMotorClient, url, io_loop=asyncio.get_running_loop(), **settings)
        except (errors.PyMongoError, ValueError, TypeError, OSError) as exc:
            told = str(exc).replace(parts.password or "\0", "***")
            raise Invalid(f"store: mongodb://{where}/…: {told[:300]}") from exc
        link = cls(client, where, database, service, timeout_s)
        try:
            await link.check()
        except BaseException:
            await link.close()
            raise
        return link

    async def check(self) -> None:
        """Returns when the primary of a replica set answers and lets this user read and write. Raises Unavailable."""
        try:
            told = await self._client.admin.command("hello")
            if told.get("msg") == "isdbgrid":
                return
            if "setName" not in told:
                raise Unavailable(
                    f"MongoDB at {self.where} is no replica set, and what is committed could not be made sure: start "
                    "mongod with --replSet rs0, run rs.initiate(), and write ?replicaSet=rs0 in the store's URL")
            await self.documents.find_one({"_id": 0}, {"_id": 1})
            await self.documents.update_one({"_id": 0}, {"$unset": {"b": 1}})  # of a record that there never is
        except errors.ServerSelectionTimeoutError as exc:
            raise Unavailable(await self._lost(str(exc)), retry_after=2) from exc
        except Exception as exc:  # noqa: BLE001 - whatever the driver raises
            self.refuse(exc)

    async def index(self, wanted: Sequence[Mapping[str, Any]]) -> None:
        """Makes the indexes that are not there."""
        models = [IndexModel(**one) for one in wanted]
        await self.steady(lambda: self.documents.create_indexes(models))

    async def update_each(self, wanted: Sequence[tuple[Mapping[str, Any], Any]]) -> list[None]:
        """Several (filter, update) in one request, each for itself; for what may be repeated."""
        one_by_one = [UpdateOne(which, update) for which, update in wanted]
        await self.steady(lambda: self.documents.bulk_write(one_by_one, ordered=False))
        return [None] * len(wanted)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._client.close)

    async def steady(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks, and again for a while when an election or a lost connection came between: for what may be
        repeated. Raises ours."""
        end = time.monotonic() + self.timeout_s
        for pause in (*PAUSES_S, *[PAUSES_S[-1]] * 100):
            try:
                return await ask()
            except Exception as exc:  # noqa: BLE001 - whatever the driver raises
                if not passing(exc) or time.monotonic() + pause > end:
                    self.refuse(exc)
            await asyncio.sleep(pause)
        raise AssertionError("a minute of pauses is longer than any timeout")

    def refuse(self, exc: Exception) -> NoReturn:
        """Raises ours for what the driver raised."""
        code = getattr(exc, "code", None)
        if isinstance(exc, ModelyardError):
            raise exc
        if isinstance(exc, errors.DocumentTooLarge) or code in LARGE:
            raise TooLarge("a document with its unpublished events may take 16 MiB in MongoDB, this one would be "
                           "larger") from exc
        if isinstance(exc, OverflowError):
            raise Invalid("a number in an indexed field has more than 64 bits") from exc
        if isinstance(exc, BSONError):
            raise Invalid(f"MongoDB cannot keep this document: {exc}") from exc
        if code in AUTH or "authentication failed" in str(exc).lower():
            raise Unavailable(f"MongoDB at {self.where} refuses the user or the password: put the right ones into the "
                              "store's URL (mongodb://USER:PASSWORD@HOST…, percent-encoded), with ?authSource= when "
                              "the user is of another database", retry_after=5) from exc
        if code in DENIED:
            raise Unavailable(f"MongoDB at {self.where} does not let this user work with the database "
                              f"'{self.documents.database.name}': grant it the role readWrite there ({_short(exc)})",
                              retry_after=5) from exc
        if isinstance(exc, errors.PyMongoError):
            raise Unavailable(f"MongoDB at {self.where} does not answer as it should: {_short(exc)}",
                              retry_after=2) from exc
        raise exc

    async def _lost(self, told: str) -> str:
        """Why no primary was found, as far as the first host tells when it is asked alone."""
        host = self.where.partition(",")[0]
        probe: AsyncIOMotorClient[Any] = await asyncio.to_thread(
            AsyncIOMotorClient, f"mongodb://{host}/", io_loop=asyncio.get_running_loop(), directConnection=True,
            serverSelectionTimeoutMS=500, connectTimeoutMS=500, socketTimeoutMS=500)
        try:
            hello = await probe.admin.command("hello")
        except errors.PyMongoError:
            hello = None
        finally:
            await asyncio.to_thread(probe.close)
        if hello is None:
            return f"MongoDB at {self.where} does not answer: is it running, and reachable from here? ({_short(told)})"
        if hello.get("isreplicaset"):
            return f"MongoDB at {host} is of no replica set yet: run rs.initiate() there"
        if "setName" not in hello:
            return (f"MongoDB at {host} is no replica set: start mongod with --replSet rs0, run rs.initiate(), and "
                    "write ?replicaSet=rs0 in the store's URL")
        return (f"MongoDB at {host} is of the replica set '{hello['setName']}', whose primary was not found: the URL "
                f"must name that set (?replicaSet={hello['setName']}), and its members' names "
                f"({', '.join(hello.get('hosts', [])[:5])}) must be reachable from here")


class Feed:
    """What others commit, told by a change stream on a thread of its own. It only wakes: whoever is woken looks for
    himself, so what the stream misses costs time and nothing else."""

    WAIT_MS, AGAIN_S = 500, 1.0

    def __init__(self, link: Link, match: Mapping[str, Any], notice: Callable[[], None]) -> None:
        self._link, self._notice = link, notice
        self._steps = [{"$match": match}, {"$project": {"_id": 1}}]
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self.live = False

    def start(self) -> None:
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._work, name="mongo change stream", daemon=True)
            self._thread.start()

    async def stop(self) -> None:
        """Its thread ends after the answer that it waits for; for a server that answers no more nobody waits."""
        self._ended.set()
        end = time.monotonic() + 2 * self.WAIT_MS / 1000
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def _work(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(errors.PyMongoError):
                self._follow()
            self.live = False
            self._ended.wait(self.AGAIN_S)

    def _follow(self) -> None:
        with self._link.documents.delegate.watch(self._steps, max_await_time_ms=self.WAIT_MS) as stream:
            while stream.alive and not self._ended.is_set():
                told = stream.try_next()
                if told is not None or not self.live:  # what came before it began is looked for once
                    with contextlib.suppress(RuntimeError):  # the loop is gone, and so is whoever waited
                        self._loop.call_soon_threadsafe(self._notice)
                self.live = True


def passing(exc: Exception) -> bool:
    """Whether the same may work a moment later. A server that was looked for in vain is waited for by the caller."""
    if isinstance(exc, errors.ServerSelectionTimeoutError):
        return False
    if isinstance(exc, errors.BulkWriteError):
        told = exc.details or {}
        return all(one.get("code") in TRANSIENT for one in (*told.get("writeErrors", ()),
                                                            *told.get("writeConcernErrors", ())))
    if isinstance(exc, errors.OperationFailure):
        transient = exc.code in TRANSIENT or exc.has_error_label("RetryableWriteError")
        return transient or isinstance(exc, errors.WTimeoutError | errors.ExecutionTimeout)
    return isinstance(exc, errors.ConnectionFailure)


def taken(exc: Exception) -> bool:
    """Whether a document with this id is there already."""
    return isinstance(exc, errors.DuplicateKeyError)


def _short(told: object) -> str:
    """What the driver said, without its settings and the server's whole answer."""
    return str(told).partition(", full error")[0].partition(" (configured timeouts")[0][:200]
