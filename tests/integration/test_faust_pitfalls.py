"""What Faust gets wrong, one test a pitfall (C12–C18), on a real Kafka: none of it reaches the live windows."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import importlib.util
import time
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka.admin import NewPartitions
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.admin.records_to_delete import RecordsToDelete
from aiokafka.structs import TopicPartition
from faust.serializers import codecs

from infra.stack import server_class
from modelyard.adapters import urls
from modelyard.adapters.bus_kafka_stream import StreamKafka
from modelyard.core.errors import Invalid, Unavailable
from modelyard.stream import Live, Worker, changelog, faust_app, refuse_codecs, stopped
from modelyard.telemetry import live
from modelyard.telemetry.live_site import Site
from tests.backends import need, required, server
from tests.e2e.yard import free_port
from tests.integration.streams import StreamWorker, Topics, closed, settled, topics

pytestmark = pytest.mark.slow
PARTITIONS = 4
NAMES = tuple(f"iris-{n}" for n in range(6))


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Topics]:
    """A corner of the running Kafka, with its topics."""
    kafka = server("kafka")
    if kafka is None:
        (pytest.fail if "kafka" in required() else pytest.skip)("kafka is not available here")
    word = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    url = f"{kafka}/t{word}?session_s=6&partitions={PARTITIONS}"
    where = await urls.open_stream(url)
    await where.prepare(live.TOPICS, changelog(where))
    async with topics(url) as opened:
        yield opened


@asynccontextmanager
async def here(bus: Topics, folder: Path, now: Callable[[], float] = time.time,
               before: Callable[[Live], None] = lambda _: None) -> AsyncIterator[Live]:
    """Faust in this process, ready."""
    kafka = await urls.open_stream(bus.url)
    found = Live(faust_app(kafka, f"http://127.0.0.1:{free_port()}", folder), kafka, now)
    before(found)
    found.app.finalize()
    await found.app.start()
    try:
        async with asyncio.timeout(60):
            while not found.ready:
                await asyncio.sleep(0.05)
        yield found
    finally:
        await stopped(found.app)


async def shown(found: Live, wanted: dict[str, int], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while (seen := {n: sum(w["requests"] for w in found.show("default", n)) for n in wanted}) != wanted:
        assert time.monotonic() < end, f"{seen}, wanted {wanted}"
        await asyncio.sleep(0.05)


async def finished(kafka: StreamKafka) -> int:
    """Offsets that the group has committed, in all."""
    found = await kafka.behind(kafka.link.name("stream"), live.TOPICS)
    return sum(done for done, _ in found.values())


def test_c12_the_version_is_pinned_to_the_one_that_was_tested() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["faust"] == ["faust-streaming==0.15.3"]
    assert importlib.metadata.version("faust-streaming") == "0.15.3"


async def test_c13_members_come_and_go_without_opentracing(bus: Topics, tmp_path: Path) -> None:
    """Every rebalance failed in earlier releases. Either worker answers for all deployments, its own or not."""
    assert importlib.util.find_spec("opentracing") is None
    one, two = (StreamWorker(bus.url, tmp_path / name) for name in ("one", "two"))
    wanted = dict.fromkeys(NAMES, 30)
    try:
        one.start()
        await one.ready()
        await bus.send(closed(name, n, time.time(), 10) for name in NAMES for n in range(3))
        await one.comes_to(wanted)
        two.start()
        await two.ready()
        await asyncio.gather(one.comes_to(wanted), two.comes_to(wanted))
        assert one.stop() == 0
        await bus.send(closed(name, 3, time.time(), 1) for name in NAMES)
        await two.comes_to(dict.fromkeys(NAMES, 31))
    finally:
        assert two.stop() == 0
        one.stop()


async def test_c14_nothing_is_committed_past_what_is_unfinished(bus: Topics, tmp_path: Path) -> None:
    """One event at a time, and one that was cancelled half-way comes again."""
    reached, kafka = asyncio.Event(), await urls.open_stream(bus.url)

    def stuck(found: Live) -> None:
        take = found.take

        async def slow(partition: int, raw: bytes) -> None:
            if b":7" in raw.partition(b'"subject":')[2][:40]:
                reached.set()
                await asyncio.Event().wait()
            await take(partition, raw)

        found.take = slow  # type: ignore[method-assign]
        found.app.conf.stream_wait_empty = False  # or stopping would wait for it for ever

    events = [closed("iris", n, time.time(), 1) for n in range(1, 20)]
    async with here(bus, tmp_path, before=stuck) as found:
        assert all(agent.concurrency == 1 for agent in found.app.agents.values())
        await bus.send(events)
        await asyncio.wait_for(reached.wait(), 20)
        await asyncio.sleep(2.5)  # two commits, had there been anything to commit
        assert await finished(kafka) == 6
    assert await finished(kafka) == 6, "stopping commits what is finished and no more"
    async with here(bus, tmp_path) as found:
        await shown(found, {"iris": 19})


async def test_c15_kill_9_neither_doubles_nor_loses(bus: Topics, tmp_path: Path) -> None:
    worker = StreamWorker(bus.url, tmp_path / "data").start()
    try:
        await worker.ready()
        count = 0
        for _ in range(3):
            for _ in range(20):
                await bus.send(closed(name, count, time.time(), 7) for name in NAMES)
                count += 1
            worker.kill()
            await bus.send(closed(name, count - 1, time.time(), 7) for name in NAMES)  # said again
            worker.start()
        await worker.comes_to(dict.fromkeys(NAMES, count * 7), 90)
    finally:
        worker.stop()


async def test_c16_windows_outlive_a_restart_and_expire_after_it(bus: Topics, tmp_path: Path) -> None:
    clock = [time.time()]
    async with here(bus, tmp_path, lambda: clock[0]) as found:
        await bus.send(closed(name, n, clock[0] - 60 * n, 10) for name in NAMES for n in range(5))
        await bus.send([closed("iris-0", 99, clock[0] - 1000, 10)])  # too late to be live
        await shown(found, dict.fromkeys(NAMES, 50))
    async with here(bus, tmp_path, lambda: clock[0]) as found:
        await shown(found, dict.fromkeys(NAMES, 50))
        clock[0] += live.KEEP_S + 400
        assert [found.show("default", name) for name in NAMES] == [[]] * len(NAMES), "none is shown past its time"
        await bus.send(closed(f"other-{n}", 1, clock[0], 1) for n in range(40))  # some on every partition
        await shown(found, {f"other-{n}": 1 for n in range(40)})
        assert all(key.startswith(b"default/other-") for key in found.windows.data), "nor kept"
    async with here(bus, tmp_path, lambda: clock[0]) as found:
        await shown(found, {f"other-{n}": 1 for n in range(40)})
        assert len(found.windows.data) == 40, "nor does a restart bring them back"


async def test_c16_a_changelog_whose_records_are_gone_does_not_stall_it(bus: Topics, tmp_path: Path) -> None:
    async with here(bus, tmp_path) as found:
        await bus.send(closed(name, n, time.time(), 1) for name in NAMES for n in range(5))
        await shown(found, dict.fromkeys(NAMES, 5))
        name = found.changelog
    kafka = await urls.open_stream(bus.url)
    async with kafka.topics.admin("emptying a topic") as admin:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, {"cleanup.policy": "delete"})])
        await admin.delete_records({TopicPartition(name, n): RecordsToDelete(-1) for n in range(PARTITIONS)})
    async with here(bus, tmp_path) as found:
        await bus.send(closed(name, 9, time.time(), 3) for name in NAMES)
        await shown(found, dict.fromkeys(NAMES, 3))


async def test_c16_a_changelog_that_is_deleted_makes_it_start_anew(bus: Topics, tmp_path: Path) -> None:
    """What it cannot keep it does not count as finished; the same process begins again, and nobody has to help."""
    kafka, worker = await urls.open_stream(bus.url), StreamWorker(bus.url, tmp_path / "data").start()
    try:
        await worker.ready()
        await bus.send([closed("iris", 1, time.time(), 5)])
        await worker.comes_to({"iris": 5})
        async with kafka.topics.admin("deleting a topic") as admin:
            await admin.delete_topics([changelog(kafka)])
        await bus.send([closed("iris", 2, time.time(), 7)])
        end = time.monotonic() + 120
        while await worker.total("iris") not in (7, 12):  # what was settled meanwhile would come from telemetry
            assert time.monotonic() < end and worker.process.poll() is None, worker.log.read_text()[-3000:]
            await asyncio.sleep(0.2)
        assert "starts anew" in worker.log.read_text()
    finally:
        worker.stop()


async def test_c16_a_silent_worker_is_noticed(bus: Topics, tmp_path: Path) -> None:
    """Its fetcher is stopped, as a lost wake-up does: the process lives, answers, and does nothing."""
    kafka = await urls.open_stream(bus.url)
    site = Site("token", f"http://127.0.0.1:{free_port()}")
    work = asyncio.create_task(Worker(kafka, site, tmp_path, patience_s=8).work())
    try:
        async with asyncio.timeout(60):
            while site.windows is None or not site.windows.ready:
                await asyncio.sleep(0.05)
        assert isinstance(site.windows, Live)
        await bus.send([closed("iris", 1, time.time(), 1)])
        await shown(site.windows, {"iris": 1})
        await site.windows.app._fetcher.stop()
        await bus.send([closed("iris", 2, time.time(), 1)])
        with pytest.raises(Unavailable, match="no progress"):
            await asyncio.wait_for(work, 60)
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def test_c17_topics_are_ours_and_equal(bus: Topics, tmp_path: Path) -> None:
    kafka = await urls.open_stream(bus.url)
    async with here(bus, tmp_path) as found:
        conf = found.app.conf
        assert conf.processing_guarantee.value == "at_least_once" and conf.store.scheme == "memory"
        assert not conf.web_enabled and conf.topic_disable_leader and not conf.topic_allow_declare
        async with kafka.topics.admin("listing") as admin:
            ours = [name for name in await admin.list_topics() if name.startswith(bus.prefix)]
            counts = {t["topic"]: len(t["partitions"]) for t in await admin.describe_topics(ours)}
            assert counts == {f"{bus.prefix}.capture.closed": PARTITIONS, f"{bus.prefix}.telemetry.window": PARTITIONS,
                              changelog(kafka): PARTITIONS}
    async with kafka.topics.admin("altering") as admin:
        await admin.create_partitions({f"{bus.prefix}.telemetry.window": NewPartitions(PARTITIONS + 1)})
    fresh = await urls.open_stream(bus.url)
    with pytest.raises(Invalid, match=f"telemetry.window has {PARTITIONS + 1} partitions"):
        await fresh.prepare(live.TOPICS, changelog(fresh))


async def test_c17_only_its_own_endpoint_is_open_and_asks_for_the_token(bus: Topics, tmp_path: Path) -> None:
    worker = StreamWorker(bus.url, tmp_path / "data").start()
    try:
        await worker.ready()
        listening = _listening(worker.process.pid)
        assert listening == {worker.port}
        import aiohttp

        async with aiohttp.ClientSession() as http, http.get(f"{worker.url}/internal/v1/live/iris") as answer:
            assert answer.status == 403
    finally:
        worker.stop()


def test_c18_what_it_pulls_in_is_what_was_tested() -> None:
    version = importlib.metadata.version
    assert version("venusian") == "3.1.0"
    assert tuple(map(int, version("click").split(".")[:2])) < (8, 4)


async def test_c18_no_message_is_ever_unpickled(bus: Topics, tmp_path: Path) -> None:
    refuse_codecs()
    assert set(codecs.codecs) == {"raw", "json"}
    for name in ("pickle", "pickle_restricted", "pickle_fickling", "yaml", "binary"):
        with pytest.raises(LookupError):
            codecs.get_codec(name)
    async with here(bus, tmp_path) as found:
        canary = tmp_path / "canary"
        hostile = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
        for raw in (hostile, b"", b"{}", closed("iris", 1, 0, 1, cells="nonsense").encode()):
            await bus.producer.send_and_wait(f"{bus.prefix}.capture.closed", raw, key=b"default/iris")
        await bus.send([closed("iris", 2, time.time(), 5)])
        await shown(found, {"iris": 5})
        assert not canary.exists() and not found.broken.done()


async def test_settled_figures_take_the_place_of_provisional_ones(bus: Topics, tmp_path: Path) -> None:
    start = int(time.time()) // 60 * 60 - 120
    async with here(bus, tmp_path) as found:
        await bus.send([closed("iris", 1, start, 5), settled("iris", start, 9)])
        await shown(found, {"iris": 9})
        assert [w["provisional"] for w in found.show("default", "iris")] == [False]
        await bus.send([closed("iris", 2, start, 20)])
        await shown(found, {"iris": 25})
        assert [w["provisional"] for w in found.show("default", "iris")] == [True]


def _listening(pid: int) -> set[int]:
    """TCP ports that a process listens on."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(fd.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") if (table := Path(f"/proc/{pid}/net/{name}")).exists()
            for line in table.read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.fault
async def test_a_broker_that_is_killed_stops_it_only_meanwhile(tmp_path: Path) -> None:
    """C4, C16: nobody restarts the worker by hand, and nothing of what Kafka had is missing."""
    need("kafka")
    with server_class("kafka")(tmp_path / "kafka") as kafka:
        bus = f"{kafka.url}/yard?session_s=6&partitions={PARTITIONS}"
        worker = StreamWorker(bus, tmp_path / "data").start()
        try:
            await worker.ready()
            for count in range(1, 4):
                async with topics(bus) as there:
                    await there.send(closed(name, count, time.time(), 5) for name in NAMES)
                if count > 1:
                    await worker.comes_to(dict.fromkeys(NAMES, 5 * count), 90)
                await asyncio.to_thread(kafka.kill)
                await asyncio.to_thread(kafka.start)
            await worker.comes_to(dict.fromkeys(NAMES, 15), 90)
        finally:
            worker.stop()
