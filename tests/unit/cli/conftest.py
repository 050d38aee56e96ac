"""A real yard for the command line's tests."""

from collections.abc import Iterator

import pytest

from tests.e2e.yard import Yard


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    yard = Yard.start("all-in-one", tmp_path_factory.mktemp("cli") / "data")
    try:
        yield yard
    finally:
        assert yard.stop() == []
