"""A full queue is not taken for a message over the limit, whatever the model is called."""

import grpc
import pytest

from modelyard.client.inputs import streamed_error
from modelyard.client.oip import error_of
from modelyard.core.errors import ModelyardError, TooLarge, Unavailable
from modelyard.scoring import grpc_wire
from modelyard.scoring.calls import QueueFull, SpoolFull
from modelyard.scoring.dataplane import too_large

FULL = QueueFull("512 calls wait for 'bert-large:1' already; try again soon", retry_after=1)
BYTES = QueueFull("7 calls wait for 'more than the limit of 5 bytes' already, about 1.0 s; try again soon")
SPOOL = SpoolFull("the capture spool is full, and calls must not go unrecorded (capture.on_pressure)")
CASES = [(FULL, Unavailable), (BYTES, Unavailable), (SPOOL, Unavailable), (too_large(9), TooLarge),
         (too_large(9, 10), TooLarge)]


class Failed(grpc.RpcError):
    """What the library raises for a call that was refused."""

    def __init__(self, details: str, packed: bytes | None) -> None:
        self._details, self._packed = details, packed

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.RESOURCE_EXHAUSTED

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return (("x-request-id", "r"), *(() if self._packed is None else ((grpc_wire.DETAILS, self._packed),)))


@pytest.mark.parametrize(("error", "expected"), CASES)
def test_by_the_reason(error: ModelyardError, expected: type[ModelyardError]) -> None:
    found = error_of(Failed("in other words: large bytes", grpc_wire.details(error)), "here")
    assert type(found) is expected and found.detail["status"] == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize(("error", "expected"), CASES)
def test_by_the_words_where_there_is_no_reason(error: ModelyardError, expected: type[ModelyardError]) -> None:
    whole = grpc_wire.details(error)
    for packed in (None, b"", whole[:-3], b"\xff" * 40, b"\x1a\x02ab"):
        assert type(error_of(Failed(error.message, packed), "here")) is expected
    assert type(streamed_error(f"RESOURCE_EXHAUSTED: {error.message}", "here")) is expected


def test_the_library_s_own_words() -> None:
    for words in ("SERVER: Received message larger than max (9 vs. 8)", "Sent message larger than max (9 vs. 8)"):
        assert type(error_of(Failed(words, None), "here")) is TooLarge
    assert type(error_of(Failed("", None), "here")) is Unavailable
