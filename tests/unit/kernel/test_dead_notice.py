"""A dead letter is told of on the bus: the topic ``dead.<service>``, without the record itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

from modelyard.adapters.urls import open_bus
from modelyard.core.errors import Invalid
from modelyard.core.events import Envelope
from modelyard.kernel.consume import dead_letters
from modelyard.kernel.service import Context, Service
from tests.contract.bus_worker import event
from tests.integration.hosting import hosted


async def refuse(ctx: Context, envelope: Envelope) -> None:
    raise Invalid("not for us")


async def test_a_dead_letter_is_told_of_once(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/bus.db"
    service = Service("image-builder", (), (), lambda ctx: (), {"model.registered": refuse})
    bus = await open_bus(url)
    async with hosted(service, tmp_path / "builder", bus=url) as ctx:
        refused = event(1)
        for _ in range(2):
            await bus.publish(refused)
        told, place = await bus.read(["dead.image-builder"], "beginning", wait=10)
        (letter,) = await dead_letters(ctx.store)
        notice = told[0][1]
        assert (notice.type, notice.subject, notice.source) == (
            "dead.image-builder.v1", letter.id, "/modelyard/image-builder")
        assert (notice.data["message"], notice.data["event"]) == ("Invalid: not for us", None)
        assert notice.data["event_id"] == refused.id
        await bus.publish(event(2))
        async with asyncio.timeout(10):
            while len(await dead_letters(ctx.store)) < 2:
                await asyncio.sleep(0.02)
        more, _ = await bus.read(["dead.image-builder"], place, wait=10)
        assert [e.data["topic"] for _, e in more] == ["model.registered"], "the repeat made no second one"
    await bus.close()
