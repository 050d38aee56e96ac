"""A real yard for the SDK's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from modelyard import Client
from tests.e2e.yard import Yard


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    yard = Yard.start("all-in-one", tmp_path_factory.mktemp("sdk") / "data")
    try:
        yield yard
    finally:
        assert yard.stop() == []


@pytest.fixture
def client(live: Yard) -> Iterator[Client]:
    with Client(live.url()) as client:
        yield client


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.json"
    path.write_text("[1, 1, 1]")
    return path
