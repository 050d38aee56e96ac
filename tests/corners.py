"""Clearing away what a session's tests left in the shared Kafka: thousands of partitions would wear it out."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import urlsplit

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from tests.backends import CORNERS, server

BATCH = 200


def clear_kafka() -> None:
    """Removes the topics of this session's corners; those of others stay."""
    words = CORNERS.pop("kafka", set())
    if words and (url := server("kafka")):
        with contextlib.suppress(KafkaError, OSError):  # it is a kindness to the next session, nothing depends on it
            asyncio.run(_clear(urlsplit(url).netloc.rpartition("@")[2], tuple(f"t{word}." for word in words)))


async def _clear(hosts: str, prefixes: tuple[str, ...]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=hosts)
    await admin.start()
    mine = [name for name in await admin.list_topics() if name.startswith(prefixes)]
    for start in range(0, len(mine), BATCH):
        await admin.delete_topics(mine[start:start + BATCH])
    await admin.close()
