"""Topics on Kafka are declared by us: made with our partition count and retention, or found with them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.protocol.metadata import MetadataRequest

from ..core.errors import Invalid
from .bus_kafka_link import CONNECT_S, DENIED, FAILURES, Attempt, Link

log = logging.getLogger(__name__)
RECORD_BYTES = 8 * 1024 * 1024
READY_S = 10.0
BROKERS_CHOICE = -1
NO_TOPIC = (errors.UnknownTopicOrPartitionError.errno, errors.LeaderNotAvailableError.errno)


@dataclass
class Topics:
    """Declares what it is asked for, once; remembers what was right. ``replication`` 0: the brokers' default."""

    link: Link
    partitions: int
    replication: int
    retention_days: float
    _right: set[str] = field(default_factory=set)
    _attempt: Attempt = field(default_factory=Attempt)

    async def declare(self, plain: Sequence[str]) -> None:
        """Every topic is there when it returns. Raises Unavailable, or Invalid for one that is there and wrong."""
        if all(name in self._right for name in plain):
            return
        async with self._attempt.alone():
            missing = [name for name in plain if name not in self._right]
            if missing:
                async with self.admin("declaring topics") as admin:
                    await self._make(admin, [self.link.name(name) for name in missing])
                self._right.update(missing)

    def forget(self) -> None:
        """Something is not as it was: everything is looked at again when it is next used."""
        self._right.clear()

    async def check(self, plain: Iterable[str], groups: Iterable[str] = ()) -> None:
        """Whether a broker answers, those of the topics that are there are right, the others could be made by us, and
        the groups are open to us; makes nothing."""
        async with self.admin("asking Kafka") as admin:
            names = [self.link.name(p) for p in plain]
            there = await self._described(admin, names)
            self._verify(there, await self._configured(admin, list(there)))
            if missing := [name for name in names if name not in there]:
                await self._create(admin, missing, only_ask=True)
            for group in groups:
                await self._open_to_us(admin, self.link.name(group))

    async def _open_to_us(self, admin: AIOKafkaAdminClient, group: str) -> None:
        try:
            await admin.find_coordinator(group)
        except DENIED:
            raise
        except errors.KafkaError:  # brokers that begin need a moment to find one
            return

    async def _make(self, admin: AIOKafkaAdminClient, names: Sequence[str]) -> None:
        """What is there is looked at before anything is made: a wrong setting must not leave wrong topics behind."""
        there = await self._described(admin, names)
        self._verify(there, await self._configured(admin, list(there)))
        missing = [name for name in names if name not in there]
        if not missing:
            return
        await self._create(admin, missing)
        async with asyncio.timeout(READY_S):
            while len(made := await self._described(admin, missing)) < len(missing):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        self._verify(made, {})

    async def _create(self, admin: AIOKafkaAdminClient, names: Sequence[str], only_ask: bool = False) -> None:
        """Raises Unavailable for what the brokers do not make, saying who may."""
        wanted = [NewTopic(name, self.partitions, max(self.replication, 1), topic_configs=self._configs)
                  for name in names]
        for topic in wanted:  # the class refuses -1, brokers have taken it for long
            topic.replication_factor = self.replication or BROKERS_CHOICE
        answer = await admin.create_topics(wanted, timeout_ms=int(READY_S * 1000), validate_only=only_ask)
        refused = {name: (errors.for_code(code), message) for name, code, message in answer.topic_errors
                   if errors.for_code(code) not in (errors.NoError, errors.TopicAlreadyExistsError)}
        for error, message in refused.values():
            if error in DENIED:
                raise self.link.no_topics([name for name in names if name in refused], self.partitions)
            raise error(f"{', '.join(refused)}: {message}")

    async def _described(self, admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, int]:
        """Partition counts of those that are there with all their leaders. (Asking by ``describe_topics`` would make
        topics on a cluster that makes them by itself.)"""
        there: dict[str, int] = {}
        answer = await admin._send_request(MetadataRequest(list(names), allow_auto_topic_creation=False))
        for topic in answer.to_object()["topics"]:
            if topic["error_code"] not in (0, *NO_TOPIC):
                raise errors.for_code(topic["error_code"])(topic["topic"])
            if topic["error_code"] == 0 and all(p["leader"] >= 0 for p in topic["partitions"]):
                there[topic["topic"]] = len(topic["partitions"])
        return there

    async def _configured(self, admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, dict[str, str]]:
        """Settings of topics that we did not make; without those we may not see."""
        if not names:
            return {}
        asked = [ConfigResource(ConfigResourceType.TOPIC, n, dict.fromkeys(("retention.ms", "cleanup.policy")))
                 for n in names]
        found: dict[str, dict[str, str]] = {}
        for answer in await admin.describe_configs(asked):
            for resource in answer.to_object()["resources"]:
                found[resource["resource_name"]] = {
                    entry["config_names"]: entry["config_value"] for entry in resource["config_entries"]}
        return found

    def _verify(self, there: dict[str, int], configs: dict[str, dict[str, str]]) -> None:
        for name, count in there.items():
            if count != self.partitions:
                raise Invalid(f"the topic {name} has {count} partitions where {self.partitions} are set, so a key's "
                              f"order would be lost; set ?partitions={count} in bus= for every service (or remove the "
                              "topic, it is made anew)", code="partitions", topic=name)
        for name, config in configs.items():
            if "compact" in config.get("cleanup.policy", ""):
                raise Invalid(f"the topic {name} is compacted, which drops events; set its cleanup.policy to delete",
                              code="compacted", topic=name)
            kept = int(config.get("retention.ms", -1))
            if 0 <= kept < self._retention_ms:
                log.warning("the topic %s keeps events %.1f days where %.1f are set; alter its retention.ms to %d",
                            name, kept / 86_400_000, self.retention_days, self._retention_ms)

    @property
    def _retention_ms(self) -> int:
        return int(self.retention_days * 86_400_000)

    @property
    def _configs(self) -> dict[str, str]:
        return {"cleanup.policy": "delete", "retention.ms": str(self._retention_ms),
                "max.message.bytes": str(RECORD_BYTES + 64 * 1024)}

    @contextlib.asynccontextmanager
    async def admin(self, doing: str) -> AsyncIterator[AIOKafkaAdminClient]:
        """A client for this once. Raises Unavailable for what goes wrong in it."""
        admin: Any = AIOKafkaAdminClient(**self.link.client(READY_S))
        try:
            async with asyncio.timeout(CONNECT_S):
                await admin.start()
            yield admin
        except FAILURES as exc:
            raise await self.link.why(exc, doing) from exc
        finally:
            await admin.close()
