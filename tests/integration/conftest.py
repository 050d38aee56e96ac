"""Servers that the tests of one file have for themselves."""

from collections.abc import Iterator

import pytest

from infra.stack.kafka import Kafka
from tests.backends import need


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A broker of the file's own: it may be frozen and killed."""
    need("kafka")
    with Kafka(tmp_path_factory.mktemp("kafka")) as server:
        yield server
