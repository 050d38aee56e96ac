"""For all tests: a blocking call of ours in the event loop fails the unit and contract tests; a house to stand in;
and a user's cache that is not the user's."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from modelyard.adapters import urls
from modelyard.adapters.blobs_dir import DirBlobs, DirGrants
from modelyard.adapters.images_layout import LayoutImages
from modelyard.kernel.forward import Peers
from modelyard.kernel.service import Context
from modelyard.kernel.wakes import Wakes
from modelyard.ports.bus import EventBus
from modelyard.ports.store import DocumentStore
from tests import backends, containers
from tests.corners import clear_kafka

HERE = Path(__file__).parent
GUARDED = (HERE / "unit", HERE / "contract")
UV_CACHE = os.environ.get("UV_CACHE_DIR") or f"{os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'}/uv"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker shares the containers of whoever started it
        containers.open_session()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        containers.close_session()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The support matrix: where each real server is, or why there is none."""
    for name, told in backends.support().items():
        terminalreporter.write_line(f"{name:9} {told}")


@pytest.fixture(autouse=True)
def never_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocking calls made by our code, or by what it calls, raise BlockingError in the event loop."""
    if not any(request.path.is_relative_to(folder) for folder in GUARDED):
        yield
        return
    with blockbuster_ctx("modelyard"):
        yield


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def not_the_users_cache(request: pytest.FixtureRequest, session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests make does not go to the user's own cache, nor come from it; end to end it does, as with wheels."""
    if not request.path.is_relative_to(HERE / "e2e"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache))
        monkeypatch.setenv("UV_CACHE_DIR", UV_CACHE)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Servers set up the logging of their whole process: a test that runs one in here leaves nothing of it behind."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)


@dataclass(frozen=True)
class House:
    """One service's context on the embedded adapters, with the bus and the wakes that the kernel works with."""

    ctx: Context
    store: DocumentStore
    bus: EventBus
    wakes: Wakes


OpenHouse = Callable[..., AbstractAsyncContextManager[House]]


@pytest.fixture
def house(tmp_path: Path) -> OpenHouse:
    """``async with house() as h``: opened on the test's folder; again (or beside it), the same data."""

    @asynccontextmanager
    async def open_house(service: str = "registry") -> AsyncIterator[House]:
        async with AsyncExitStack() as stack:
            store = await urls.open_store(f"sqlite://{tmp_path}/yard.db", service)
            stack.push_async_callback(store.close)
            bus = await urls.open_bus(f"sqlite://{tmp_path}/yard.db")
            stack.push_async_callback(bus.close)
            peers = Peers({}, "between-services")
            stack.push_async_callback(peers.close)
            wakes = Wakes()
            ctx = Context(service=service, store=store, blobs=DirBlobs(tmp_path / "blobs"),
                          images=LayoutImages(tmp_path / "images"), grants=DirGrants(tmp_path / "blobs"), targets={},
                          peers=peers, data=tmp_path, wake=wakes.wake)
            yield House(ctx, store, bus, wakes)

    return open_house


def pytest_sessionfinish() -> None:
    """What this session made in a shared server goes with it, as far as the server is still there."""
    clear_kafka()
