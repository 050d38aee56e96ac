"""The simulator's parts keep the promises of their ports: the same suites, over the same doors.

Left out is what starts other processes, which cannot see into this one's memory, and what is said of files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import pytest

from modelyard.ports.blobs import BlobStore
from modelyard.ports.bus import EventBus
from modelyard.ports.store import DocumentStore
from tests.backends import Backend
from tests.contract import test_blobs as blob_suite
from tests.contract import test_bus as bus_suite
from tests.contract import test_images as image_suite
from tests.contract import test_store as store_suite
from tests.simulator.bus import Log, MemoryBus
from tests.simulator.store import MemoryStore, Shelf
from tests.simulator.things import MemoryBlobs, MemoryImages, Shed

FOREIGN = ("killed", "another_process", "a_sweep", "after_reopening", "lose_no_tag", "a_writer_killed", "neighbours")


def _take(suite: Any) -> None:
    """The suite's tests become tests of this module, and meet this module's fixtures."""
    for name, test in vars(suite).items():
        if name.startswith("test_") and not any(word in name for word in FOREIGN):
            globals()[f"{name}__{suite.__name__.rpartition('_')[2]}"] = test


for one in (store_suite, bus_suite, blob_suite, image_suite):
    _take(one)
garden = store_suite.garden


@pytest.fixture
def backend() -> Backend:
    return Backend("memory", lambda folder: "memory://")


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> str:
    """What is opened by one URL in one test is one thing."""
    shelves: dict[str, Shelf] = defaultdict(Shelf)
    log = Log()

    async def open_store(url: str, service: str) -> MemoryStore:
        return MemoryStore(shelves[service])

    async def open_bus(url: str) -> MemoryBus:
        return MemoryBus(log)

    monkeypatch.setattr(store_suite, "open_store", open_store)
    monkeypatch.setattr(bus_suite, "open_bus", open_bus)
    return "memory://"


@pytest.fixture
async def store(url: str) -> DocumentStore:
    return await store_suite.open_store(url, "registry")


@pytest.fixture
async def bus(url: str) -> AsyncIterator[EventBus]:
    opened = await bus_suite.open_bus(url)
    yield opened
    await opened.close()


@pytest.fixture
def blobs() -> BlobStore:
    return MemoryBlobs({})


@pytest.fixture
def images() -> MemoryImages:
    return MemoryImages(Shed())
