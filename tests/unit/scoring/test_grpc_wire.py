"""gRPC's five bytes and its headers, by themselves: any cut of a stream gives the same messages."""

from __future__ import annotations

import gzip
import zlib
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.core.errors import Invalid, NotFound, TooLarge
from modelyard.scoring import grpc_wire as wire
from modelyard.scoring.calls import STATUSES, QueueFull
from modelyard.scoring.grpc_wire import Frames, Packed, Refused


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=300)), max_size=12), st.lists(st.integers(1, 40)))
def test_messages_come_out_whole_however_they_are_cut(sent: list[tuple[bool, bytes]], cuts: list[int]) -> None:
    data = b"".join(bytes([packed]) + len(m).to_bytes(4, "big") + m for packed, m in sent)
    frames, found, at = Frames(1000, True), [], 0
    for size in [*cuts, len(data) + 1]:
        found += frames.feed(data[at:at + size])
        at += size
    assert found == [m for _, m in sent] and not frames.partial
    assert [type(m) is Packed for m in found] == [packed for packed, _ in sent]


@given(st.binary(max_size=60), st.integers(0, 59))
def test_garbage_is_refused_or_waited_for_and_never_more(data: bytes, cut: int) -> None:
    frames = Frames(20, False)
    try:
        found = frames.feed(data[:cut]) + frames.feed(data[cut:])
    except (Refused, TooLarge):
        return
    assert all(len(m) <= 20 for m in found)


def test_a_message_over_the_limit_is_refused_by_its_prefix() -> None:
    with pytest.raises(TooLarge, match=r"1001 bytes are more than the limit of 1000 bytes"):
        Frames(1000, False).feed(b"\0" + (1001).to_bytes(4, "big"))
    frames = Frames(1000, False)
    assert frames.feed(b"\0\0\0") == [] and frames.partial
    with pytest.raises(TooLarge):
        frames.feed(b"\x03\xe9")


@pytest.mark.parametrize("value, seconds", [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", .004), (b"5u", 5e-6),
                                            (b"6n", 6e-9), (b"99999999H", 99999999 * 3600), (b"0n", 0)])
def test_timeouts(value: bytes, seconds: float) -> None:
    assert wire.timeout_s(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [b"", b"1", b"S", b"123456789S", b"1s", b"-1S", b"1.5S", b" 1S", "١S".encode()])
def test_what_is_no_timeout_is_refused(value: bytes) -> None:
    with pytest.raises(Refused):
        wire.timeout_s(value)


@given(st.text(max_size=400))
def test_messages_are_percent_encoded_and_fit(text: str) -> None:
    encoded = wire.percent(text)
    assert len(encoded) <= wire.MESSAGE_BYTES and all(32 <= byte < 127 for byte in encoded)
    assert unquote(encoded.decode()) == wire.short(text)


@given(st.binary(max_size=100))
def test_binary_metadata_goes_and_comes_back(value: bytes) -> None:
    [(key, header)] = wire.metadata([("some-bin", value)])
    assert key == b"some-bin" and wire.binary(header) == wire.binary(header + b"=" * (-len(header) % 4)) == value


@pytest.mark.parametrize("value", [b"!", b"a", b"\xff\xff", b"====", b"AA A="])
def test_what_is_not_binary_is_nothing(value: bytes) -> None:
    assert wire.binary(value) == b""


def test_inflating_stops_at_the_limit() -> None:
    for window, packed in ((31, gzip.compress(bytes(10_000))), (15, zlib.compress(bytes(10_000)))):
        assert wire.inflate(packed, window, 10_000) == bytes(10_000)
        with pytest.raises(TooLarge):
            wire.inflate(packed, window, 9_999)
        for broken in (packed[:-9], b"", packed[1:]):
            with pytest.raises(Refused):
                wire.inflate(broken, window, 10_000)


def test_every_status_has_its_number() -> None:
    assert {name for _, name, _ in STATUSES} <= wire.CODES.keys()
    assert wire.failure(NotFound("no")) == (b"5", "no") and wire.failure(Invalid("bad")) == (b"3", "bad")


def test_details_are_a_google_rpc_status() -> None:
    """Read by protobuf itself, from descriptors written down here."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.any_pb2 import Any
    from google.protobuf.duration_pb2 import Duration

    file = descriptor_pb2.FileDescriptorProto(
        name="rpc.proto", package="google.rpc", syntax="proto3",
        dependency=["google/protobuf/any.proto", "google/protobuf/duration.proto"])
    texts = descriptor_pb2.FieldDescriptorProto
    for name, fields in (
            ("Status", [("code", 1, texts.TYPE_INT32, 1, ""), ("message", 2, texts.TYPE_STRING, 1, ""),
                        ("details", 3, texts.TYPE_MESSAGE, 3, ".google.protobuf.Any")]),
            ("ErrorInfo", [("reason", 1, texts.TYPE_STRING, 1, ""), ("domain", 2, texts.TYPE_STRING, 1, "")]),
            ("RetryInfo", [("retry_delay", 1, texts.TYPE_MESSAGE, 1, ".google.protobuf.Duration")])):
        made = file.message_type.add(name=name)
        for field, number, kind, label, of in fields:
            made.field.add(name=field, number=number, type=kind, label=label, **({"type_name": of} if of else {}))
    pool = descriptor_pool.DescriptorPool()
    for known in (Any, Duration):
        pool.AddSerializedFile(known.DESCRIPTOR.file.serialized_pb)
    pool.Add(file)
    classes = {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"google.rpc.{name}"))
               for name in ("Status", "ErrorInfo", "RetryInfo")}
    status = classes["Status"].FromString(wire.details(QueueFull("größer", retry_after=300)))
    assert (status.code, status.message) == (8, "größer")
    info, retry = status.details
    assert info.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    found = classes["ErrorInfo"].FromString(info.value)
    assert (found.reason, found.domain) == ("queue-full", "modelyard")
    assert retry.type_url == "type.googleapis.com/google.rpc.RetryInfo"
    assert classes["RetryInfo"].FromString(retry.value).retry_delay.seconds == 300
