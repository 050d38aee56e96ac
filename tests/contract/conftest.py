"""A replica for each transport that the whole session calls."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from tests.contract.transports import Served, serving

LIMITS = {"max_queue": 4_000}


@pytest.fixture(scope="session", params=["grpc", "h2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Capture on; messages up to 64 MiB, as by default."""
    with serving(tmp_path_factory.mktemp(request.param), request.param, limits=LIMITS) as it:
        yield it


@pytest.fixture
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.address, [("grpc.max_receive_message_length", -1)]) as channel:
        yield channel
