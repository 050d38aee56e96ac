"""The stream worker: live windows of every deployment, from Kafka, with Faust. Provisional by design.

    await run(load(bus="kafka://127.0.0.1:9092"))        # until SIGTERM or Ctrl-C

It is no part of the all-in-one process and keeps no document: what it shows comes from the last quarter of an hour of
``capture.closed`` and ``telemetry.window``, and settled numbers come from the captured data (the telemetry service).
Why each setting of Faust below is what it is: docs/decisions/0012-faust.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import faust
import orjson
from faust.serializers import codecs
from prometheus_client import Counter, Gauge

from .adapters import urls
from .adapters.bus_kafka_stream import SILENT_S, Place, StreamKafka, Watchdog, partition_of
from .core.errors import Invalid, ModelyardError, Unavailable
from .core.events import Envelope
from .kernel.folder import lock, prepare, service_token
from .kernel.guard import Guard
from .kernel.observe import REGISTRY, fields, in_service, setup_logging
from .kernel.server import Server
from .settings import DEFAULT_PORT, Settings
from .telemetry import live
from .telemetry.live_site import NAME, Site
from .telemetry.windows import WINDOW_S, window_of

log = logging.getLogger(__name__)
TABLE, LARGEST, SERIALIZERS = "windows", 4 * 1024 * 1024, frozenset({"raw", "json"})
LOOK_S, RETRY_S, CHANGELOG_S, STOP_S = 5.0, 2.0, 30.0, 15.0
EX_TEMPFAIL = 75
EVENTS = Counter("modelyard_live_events_total", "Events that the live windows took in, by what came of them",
                 ["outcome"], registry=REGISTRY)
LATE = Counter("modelyard_live_late_total", "Windows that an event told of too late to be live", registry=REGISTRY)
WINDOWS = Gauge("modelyard_live_windows", "Windows that this worker keeps", registry=REGISTRY)
BEHIND = Gauge("modelyard_live_behind", "Events of this worker's partitions that it has not finished",
               registry=REGISTRY)


def refuse_codecs() -> None:
    """Takes every serializer but JSON and bytes out of Faust: its pickle codec runs what a message says."""
    for name in [n for n in codecs.codecs if n not in SERIALIZERS]:
        del codecs.codecs[name]


def faust_app(kafka: StreamKafka, url: str, folder: Path) -> faust.App:
    """A Faust application that makes no topic, opens no port and commits only what is finished."""
    refuse_codecs()
    link, session = kafka.link, kafka.session_s
    login = faust.SASLCredentials(username=link.user, password=link.password, mechanism=link.mechanism,
                                  ssl_context=link.tls) if link.protocol.startswith("SASL") else None
    return faust.App(
        link.name(NAME), broker=[f"kafka://{host}" for host in link.hosts], broker_credentials=login,
        ssl_context=None if login else link.tls, datadir=str(folder), store="memory://", autodiscover=False,
        key_serializer="raw", value_serializer="json", processing_guarantee="at_least_once", producer_acks=-1,
        web_enabled=False, canonical_url=url, topic_disable_leader=True, topic_allow_declare=False,
        topic_partitions=kafka.topics.partitions, table_standby_replicas=0, consumer_auto_offset_reset="earliest",
        broker_session_timeout=session, broker_heartbeat_interval=session / 4, broker_commit_interval=1.0,
        broker_rebalance_timeout=max(session, 20.0), stream_buffer_maxsize=256, producer_max_request_size=2 * LARGEST,
        consumer_max_fetch_size=2 * LARGEST,
        loghandlers=[], logging_config=None)


class Live:
    """One Faust agent over both topics, one table of windows, and what they say when asked."""

    def __init__(self, app: faust.App, kafka: StreamKafka, now: Callable[[], float] = time.time) -> None:
        self.app, self.now = app, now
        self.topics = [kafka.link.name(topic) for topic in live.TOPICS]
        self.changelog, self.partitions = changelog(kafka), kafka.topics.partitions
        self.windows = app.Table(TABLE, key_type=bytes, partitions=self.partitions)
        self._swept, self.worked = dict[int, float](), False
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        app.agent(app.topic(*self.topics, key_serializer="raw", value_serializer="raw"), concurrency=1,
                  name="live")(self._follow)
        app.on_rebalance_complete.connect(self._hold)

    async def _hold(self, *_: Any, **__: Any) -> None:
        """Faust resumes its partitions before it seeks to what was finished: what is fetched in between would be
        passed over as a gap. So nothing is fetched until it starts the flow, which it does behind the seek."""
        self.app.consumer.stop_flow()

    async def _follow(self, stream: Any) -> None:
        """One event after the other. Its offset is finished here, once its change is durable: left to Faust it would
        be finished as well when this is cancelled or fails half-way."""
        stream = stream.noack()
        async for event in stream.events():
            try:
                await self.take(event.message.partition, event.value)
            except ModelyardError as exc:
                EVENTS.labels("refused").inc()
                log.warning("an event is passed over: %s", exc.message, extra=fields(
                    origin=f"{event.message.topic}[{event.message.partition}]@{event.message.offset}"))
            except Exception as exc:  # noqa: BLE001 - whatever it is, the event must not count as finished
                if not self.broken.done():
                    self.broken.set_exception(exc)
                await asyncio.Event().wait()
            await stream.ack(event)

    async def take(self, partition: int, raw: bytes) -> None:
        """Folds one event into its windows. Returns when the changelog has what changed. Invalid: not an event."""
        now, changed = self.now(), False
        for name, (start, patch) in live.patches(Envelope.decode(raw or b"")).items():
            if live.expired(start, now):
                LATE.inc()
                continue
            key = name.encode()
            if (folded := live.fold(self.windows.data.get(key), patch)) is not None:
                changed = True
                await self._write(partition, key, folded)
        EVENTS.labels("counted" if changed else "known").inc()
        self.worked = True
        await self._sweep(partition, now)

    async def _write(self, partition: int, key: bytes, value: live.Value | None) -> None:
        """The changelog first, then memory: what is shown is never more than what is kept. Faust's own ``table[key]``
        would send it some time later, and an offset finished in between would lose it in a crash."""
        if value is not None and len(orjson.dumps(value)) > LARGEST:
            raise Invalid(f"the window {key.decode()} is larger than {LARGEST} bytes: too many segments to be live")
        async with asyncio.timeout(CHANGELOG_S):
            await self.windows.send_changelog(partition, key, value, value_serializer="json" if value else "raw")
        self.windows.data[key] = value
        if value is None:
            del self.windows.data[key]
        WINDOWS.set(len(self.windows.data))

    async def _sweep(self, partition: int, now: float) -> None:
        """Takes this partition's windows away that are no longer live, a few times a minute."""
        if now - self._swept.get(partition, 0.0) < WINDOW_S / 4:
            return
        self._swept[partition] = now
        for key in list(self.windows.data):
            deployment, _, start = key.decode().rpartition("@")
            if live.expired(int(start), now) and partition_of(deployment, self.partitions) == partition:
                await self._write(partition, key, None)

    def owner(self, workspace: str, deployment: str) -> str | None:
        """The URL of the worker that has this deployment's windows; None while nobody has."""
        number = partition_of(f"{workspace}/{deployment}", self.partitions)
        shares = self.app.assignor.table_metadata(self.changelog)
        return next((str(url).rstrip("/") for url, topics in shares.items()
                     if number in topics.get(self.changelog, ())), None)

    def show(self, workspace: str, deployment: str) -> list[dict[str, Any]]:
        """The live windows of a deployment, in order of time."""
        now, found = self.now(), []
        first = window_of(int(now) - live.KEEP_S, WINDOW_S) - WINDOW_S
        for start in range(first, int(now) + 2 * WINDOW_S, WINDOW_S):  # one more: clocks differ
            value = self.windows.data.get(live.key_of(workspace, deployment, start).encode())
            if value is not None and not live.expired(start, now):
                found += live.answers(deployment, value)
        return found

    @property
    def ready(self) -> bool:
        """Partitions are assigned and what their changelogs hold is read."""
        return bool(self.app.started and self.app.rebalancing_count and not self.app.rebalancing
                    and not self.app.in_recovery)

    def mine(self) -> set[Place]:
        """The partitions of the source topics that are this worker's now."""
        return {(tp.topic, tp.partition) for tp in self.app.assignor.assigned_actives() if tp.topic in self.topics}


def changelog(kafka: StreamKafka) -> str:
    """The topic of the table, as Faust calls it."""
    return f"{kafka.link.name(NAME)}-{TABLE}-changelog"


async def stopped(app: faust.App, within_s: float = STOP_S) -> None:
    """Stops Faust. TimeoutError when it does not end in time: it heeds no cancellation while it waits for an event."""
    stopping = asyncio.ensure_future(app.stop())
    done, _ = await asyncio.wait({stopping}, timeout=within_s)
    if not done:
        raise TimeoutError("Faust does not stop")


class Worker:
    """One worker: waits for Kafka, runs Faust, and looks after it. ``site`` says how it is."""

    def __init__(self, kafka: StreamKafka, site: Site, folder: Path, patience_s: float = SILENT_S) -> None:
        self.kafka, self.site, self._folder, self._patience_s = kafka, site, folder, patience_s
        self.was_ready = False

    async def work(self) -> None:
        """Until cancelled, or until it must start anew: Unavailable says why."""
        await self._prepared()
        here = Live(faust_app(self.kafka, self.site.url, self._folder), self.kafka)
        self.site.windows = here
        try:
            here.app.finalize()
            await here.app.start()
            await self._look_after(here)
        finally:
            self.was_ready = here.worked
            await stopped(here.app)

    async def _prepared(self) -> None:
        while True:
            try:
                await self.kafka.prepare(live.TOPICS, changelog(self.kafka))
                self.site.trouble = ""
                return
            except Unavailable as exc:
                if exc.message != self.site.trouble:
                    log.warning("waiting for Kafka: %s", exc.message)
                self.site.trouble = exc.message
            await asyncio.sleep(RETRY_S)

    async def _look_after(self, here: Live) -> None:
        """Returns never. Raises Unavailable when Faust crashed, was silent, or could not keep a change."""
        dog, unready = Watchdog(self._patience_s), time.monotonic()
        while True:
            await asyncio.wait({here.broken}, timeout=LOOK_S)
            if here.ready:
                here.worked, unready = True, time.monotonic()
            if here.broken.done() or here.app.crashed:
                reason = here.broken.exception() if here.broken.done() else here.app.crash_reason
                raise Unavailable(f"Faust stopped working: {reason!r}")
            try:
                behind = await self.kafka.behind(here.app.conf.id, live.TOPICS, here.changelog)
                self.site.trouble = ""
            except Unavailable as exc:
                self.site.trouble = exc.message
                unready = time.monotonic()
                dog.rest()
                continue
            mine = here.mine()
            BEHIND.set(sum(end - done for place, (done, end) in behind.items() if place in mine))
            if silent := dog.silent(behind, mine):
                raise Unavailable(f"no progress for {self._patience_s:g} s on {silent} although events wait there")
            if time.monotonic() - unready > 2 * self._patience_s:
                raise Unavailable(f"not ready for {2 * self._patience_s:g} s although Kafka answers")


async def run(settings: Settings, *, ready: Callable[[str, list[str]], None] | None = None) -> None:
    """Runs a stream worker until SIGTERM or Ctrl-C. Raises Invalid or Conflict, saying what to do. One that worked
    and cannot go on starts itself anew as a process: nothing of a wedged client is left."""
    setup_logging(settings.log_level)
    for name in ("faust", "mode"):  # they tell of every step at INFO
        logging.getLogger(name).setLevel("INFO" if settings.log_level == "debug" else "WARNING")
    in_service(NAME)
    kafka = await urls.open_stream(settings.bus)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(prepare, settings.data)
        stack.callback(os.close, await asyncio.to_thread(lock, settings.data, NAME))
        token = settings.service_token.get_secret_value() if settings.service_token else \
            await asyncio.to_thread(service_token, settings.data)
        site, name = Site(token), _reached_at(settings.host)
        stack.push_async_callback(site.peers.close)
        called = urlsplit(settings.services[NAME])
        guard = Guard({*settings.allowed_hosts, name, called.hostname or name},
                      token=await asyncio.to_thread(settings.secret), service_token=token)
        server = Server(site.application(guard))
        stack.push_async_callback(server.stop)
        port = settings.port if settings.port is not None else called.port or DEFAULT_PORT
        site.url = f"http://{name}:{await server.start(settings.host, port)}"
        (ready or (lambda *_: None))(site.url, [NAME])
        await _until(stop, Worker(kafka, site, settings.data / "stream"))


async def _until(stop: asyncio.Event, worker: Worker) -> None:
    work, told = asyncio.create_task(worker.work()), asyncio.create_task(stop.wait())
    await asyncio.wait({work, told}, return_when=asyncio.FIRST_COMPLETED)
    for task in (work, told):
        task.cancel()
    failure, _ = await asyncio.gather(work, told, return_exceptions=True)
    if stop.is_set():
        if isinstance(failure, TimeoutError):
            os._exit(0)  # Faust's thread does not end: everything finished is committed, so nothing is lost
        return
    if isinstance(failure, Invalid):
        raise failure
    log.error("the stream worker starts anew" if worker.was_ready else "the stream worker ends", exc_info=failure)
    if worker.was_ready:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    os._exit(EX_TEMPFAIL)


def _reached_at(host: str) -> str:
    """How other workers reach this one when it listens on ``host``."""
    return socket.gethostname() if host.strip("[]") in ("0.0.0.0", "::", "") else host
