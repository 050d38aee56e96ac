"""How clients of Kafka end here: in bounded time, leaving no task, also when no broker answers.

The driver's own ``stop`` waits for brokers, for ever when they are away; so this file knows the driver's parts by
name. It is pinned to the minor version for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from aiokafka import errors

from .bus_kafka_link import FAILURES

END_S = 4.0


async def abandon(producer: Any) -> None:
    """Ends a producer without waiting for what it holds, and leaves no task. (Its ``stop`` waits for all of it, for
    ever when the broker is away; so its parts are ended one by one.)"""
    producer._message_accumulator.fail_all(errors.KafkaTimeoutError("given up"))
    sending = producer._sender.sender_task
    if sending is not None:
        sending.remove_done_callback(producer._sender._fail_all)  # all has failed, and without transactions it breaks
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                sending.cancel()
                for connection in list(producer.client._conns.values()):
                    connection.close()
                await asyncio.wait({sending})
        while not sending.done():
            sending.cancel()
            await asyncio.wait({sending}, timeout=0.1)
        await asyncio.gather(sending, return_exceptions=True)
    with contextlib.suppress(*FAILURES):
        await producer.stop()


async def leave(consumer: Any) -> None:
    """Leaves the group and ends a consumer. Cancelled, it ends it all the same."""
    stopping = asyncio.ensure_future(consumer.stop())
    try:
        await asyncio.wait({stopping}, timeout=END_S)
    finally:
        parts = [stopping, *_tasks(consumer)]
        for task in parts:
            task.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
        await consumer._client.close()


def _tasks(consumer: Any) -> list[asyncio.Task[Any]]:
    """What a consumer runs in the background and has not ended yet."""
    found: list[Any] = []
    for part, names in ((consumer._coordinator, ("_coordination_task", "_heartbeat_task", "_commit_refresh_task",
                                                 "_reset_committed_task")),
                        (consumer._fetcher, ("_fetch_task",))):
        found += [getattr(part, name, None) for name in names]
    found += getattr(consumer._fetcher, "_pending_tasks", ())
    return [task for task in found if task is not None and not task.done()]
