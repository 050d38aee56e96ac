"""What no well-behaved client sends, on both transports, as frames of HTTP/2; and clients that leave in the middle."""

from __future__ import annotations

import gzip
import uuid
from urllib.parse import unquote

import numpy as np
import pytest

from tests.contract.transports import INFER, SERVICE, STREAM, Served, ask, outcome, streamed, wait_for
from tests.raw_h2 import RawClient, framed, unframed

MIB = 1 << 20
LIVE = f"/{SERVICE}/ServerLive"
OK, CANCELLED, DEADLINE, EXHAUSTED, UNIMPLEMENTED, INTERNAL = "0", "1", "4", "8", "12", "13"


def works(served: Served, client: RawClient | None = None) -> bool:
    """The server still answers; h2 on the same connection, which grpcio may have cut."""
    with RawClient(served.address) as another:
        if client is None or served.transport == "grpc":
            client = another
        stream = client.call(INFER)
        client.send(stream, framed(ask()), end=True)
        heard = client.answer(stream)
        return heard.status == OK and outcome(unframed(heard.body)[0]).tolist() == [0]


def refused(served: Served, client: RawClient, stream: int, status: str) -> bool:
    """A call that breaks gRPC's rules ends with ``status``; grpcio may leave it open until its caller goes."""
    return served.transport == "grpc" or client.answer(stream).status == status


def test_an_answer_is_headers_a_message_and_trailers(served: Served) -> None:
    with RawClient(served.address) as client:
        stream = client.call(INFER, ("x-request-id", "mine"))
        client.send(stream, framed(ask()), end=True)
        heard = client.answer(stream)
        assert heard.headers[":status"] == "200" and heard.headers["content-type"].startswith("application/grpc")
        assert len(unframed(heard.body)) == 1 and heard.ended
        assert heard.trailers["grpc-status"] == OK and heard.trailers["x-request-id"] == "mine"


def test_an_error_is_headers_only(served: Served) -> None:
    with RawClient(served.address) as client:
        stream = client.call(f"/{SERVICE}/No")
        client.send(stream, framed(b""), end=True)
        heard = client.answer(stream)
        assert heard.headers[":status"] == "200" and heard.headers["grpc-status"] == UNIMPLEMENTED
        assert heard.body == b"" and heard.trailers == {}


def large(client: RawClient, given: np.ndarray) -> int:
    """A call with more than fits into the server's windows at once."""
    stream, whole, sent = client.call(INFER), framed(ask(given)), 0
    while sent < len(whole):
        took = client.send(stream, whole[sent:], end=True)
        sent += took
        if not took:
            client.read(0.05)
    return stream


def test_answers_wait_for_a_caller_that_reads_slowly(served: Served) -> None:
    """Together they are larger than what the server keeps for a connection, so most are not handed over at once."""
    with RawClient(served.address, credit=False) as client:
        given = [np.arange(2_000.0) + n for n in range(200)]
        streams = [large(client, one) for one in given]
        gone = streams.pop(100)
        client.reset(gone)
        del given[100]
        assert works(served) and not client.heard[streams[-1]].ended
        client.credit = True
        client.give_credit(streams[-1], 64 * MIB)
        for stream, one in zip(streams, given, strict=True):
            heard = client.answer(stream, 30)
            assert heard.status == OK and (outcome(unframed(heard.body)[0]) == one).all()
    wait_for(lambda: served.in_flight() == 0)


def test_a_caller_that_leaves_instead_of_reading_its_answer(served: Served) -> None:
    with RawClient(served.address, credit=False) as client:
        stream = large(client, np.zeros(MIB))
        client.until(lambda: bool(client.heard[stream].headers), 30)
        client.reset(stream)
        assert works(served)
    wait_for(lambda: served.in_flight() == 0)


def test_a_message_in_pieces_is_put_together(served: Served) -> None:
    with RawClient(served.address) as client:
        stream = client.call(INFER)
        whole = framed(ask())
        for at in range(len(whole)):
            client.send(stream, whole[at:at + 1], end=at == len(whole) - 1)
        assert client.answer(stream).status == OK


def test_a_limit_is_held_before_the_message_is_read(served: Served) -> None:
    with RawClient(served.address) as client:
        for path in (INFER, STREAM):
            stream = client.call(path)
            client.send(stream, b"\0" + (1 << 30).to_bytes(4, "big") + b"only the beginning")
            heard = client.answer(stream)
            assert heard.status == EXHAUSTED and str(1 << 30) in heard.message
        assert works(served, client)


@pytest.mark.parametrize("prefix", [2, 128, 255])
def test_a_prefix_that_is_none_is_refused(served: Served, prefix: int) -> None:
    with RawClient(served.address) as client:
        stream = client.call(INFER)
        client.send(stream, framed(ask(), flag=prefix), end=True)
        assert refused(served, client, stream, INTERNAL)
        assert works(served, client)


GZIP, SNAPPY, PLAIN = ("grpc-encoding", "gzip"), ("grpc-encoding", "snappy"), ("grpc-encoding", "identity")


@pytest.mark.parametrize("headers, status", [((), INTERNAL), ((GZIP,), INTERNAL), ((SNAPPY,), UNIMPLEMENTED)])
def test_a_compressed_message_needs_an_encoding_that_is_known(served: Served, headers: tuple[tuple[str, str], ...],
                                                              status: str) -> None:
    with RawClient(served.address) as client:
        stream = client.call(INFER, *headers)
        client.send(stream, framed(b"is not compressed", flag=1), end=True)
        assert refused(served, client, stream, status)
        heard = client.heard[stream]
        if heard.status == UNIMPLEMENTED:
            assert "gzip" in heard.headers.get("grpc-accept-encoding", "") and "snappy" in heard.message
        assert works(served, client)


@pytest.mark.parametrize("header, flag, body", [(GZIP, 1, gzip.compress(ask())), (GZIP, 0, ask()), (PLAIN, 0, ask())],
                         ids=["compressed", "not this one", "none"])  # bytes of gzip hold the time: no name for a test
def test_each_message_says_whether_it_is_compressed(served: Served, header: tuple[str, str], flag: int,
                                                    body: bytes) -> None:
    with RawClient(served.address) as client:
        stream = client.call(INFER, header)
        client.send(stream, framed(body, flag=flag), end=True)
        heard = client.answer(stream)
        assert heard.status == OK, heard.message


@pytest.mark.parametrize("path", [INFER, STREAM])
@pytest.mark.parametrize("cut", [3, 20])
def test_a_call_that_ends_in_the_middle_of_a_message_is_refused(served: Served, path: str, cut: int) -> None:
    with RawClient(served.address) as client:
        stream = client.call(path)
        client.send(stream, framed(ask())[:cut], end=True)
        assert refused(served, client, stream, INTERNAL)
        assert works(served, client)


def test_a_unary_call_without_a_message_is_refused(served: Served) -> None:
    with RawClient(served.address) as client:
        assert refused(served, client, client.call(INFER, end=True), INTERNAL)
        assert works(served, client)


def test_a_stream_without_a_message_is_fine(served: Served) -> None:
    with RawClient(served.address) as client:
        heard = client.answer(client.call(STREAM, end=True))
        assert heard.status == OK and heard.body == b""


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/grpcx", None])
def test_another_content_type_is_not_taken(served: Served, kind: str | None) -> None:
    with RawClient(served.address) as client:
        stream = client.call(LIVE, kind=kind, end=True)
        if served.transport == "h2":
            assert client.answer(stream).headers[":status"] == "415"
        assert works(served, client)


@pytest.mark.parametrize("kind", ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"])
def test_content_types_of_grpc_are_taken(served: Served, kind: str) -> None:
    with RawClient(served.address) as client:
        stream = client.call(LIVE, kind=kind)
        client.send(stream, framed(b""), end=True)
        assert client.answer(stream).status == OK


def test_another_http_method_is_not_taken(served: Served) -> None:
    with RawClient(served.address) as client:
        heard = client.answer(client.call(LIVE, method="GET", end=True))
        if served.transport == "h2":
            assert (heard.headers[":status"], heard.headers["allow"]) == ("405", "POST")
        else:
            assert heard.refused
        assert works(served, client)


@pytest.mark.parametrize("value", ["0n", "0S"])  # grpcio makes a millisecond of anything above
def test_a_call_that_has_expired_never_runs(served: Served, value: str) -> None:
    mark = uuid.uuid4().hex
    with RawClient(served.address) as client:
        stream = client.call(INFER, ("grpc-timeout", value))
        client.send(stream, framed(ask(mark=mark)), end=True)
        heard = client.answer(stream)
        assert heard.status == DEADLINE or heard.reset == 8
        assert works(served, client) and mark not in served.ran()


@pytest.mark.parametrize("value", ["soon", "5", "5s", "123456789S", "-1S"])
def test_a_malformed_timeout_does_no_harm(served: Served, value: str) -> None:
    with RawClient(served.address) as client:
        stream = client.call(LIVE, ("grpc-timeout", value))
        client.send(stream, framed(b""), end=True)
        heard = client.answer(stream)
        if served.transport == "h2":
            assert heard.status == INTERNAL and "grpc-timeout" in heard.message
        assert works(served, client)


def test_a_status_message_is_percent_encoded(served: Served) -> None:
    with RawClient(served.address) as client:
        stream = client.call(INFER)
        client.send(stream, framed(ask(model="größe 100%\n")), end=True)
        heard = client.answer(stream)
        assert heard.message.isascii() and "100%25%0A" in heard.message and "größe 100%\n" in unquote(heard.message)


def test_binary_metadata_that_is_none_does_no_harm(served: Served) -> None:
    with RawClient(served.address) as client:
        stream = client.call(INFER, ("grpc-trace-bin", "!!"), ("other-bin", "=== ="))
        client.send(stream, framed(ask()), end=True)
        heard = client.answer(stream)
        assert heard.status == OK or served.transport == "grpc"
        assert works(served, client)


def test_pings_are_answered(served: Served) -> None:
    with RawClient(served.address) as client:
        client.ping(b"12345678")
        client.until(lambda: b"12345678" in client.pings)


def test_a_reset_stream_is_cancelled_and_never_runs(served: Served) -> None:
    mark = uuid.uuid4().hex
    with RawClient(served.address) as client:
        ahead = client.call(INFER)
        client.send(ahead, framed(ask(mark=mark + "-ahead", sleep=0.6)), end=True)
        wait_for(lambda: mark + "-ahead" in served.ran())
        queued = client.call(INFER, ("x-request-id", mark))
        client.send(queued, framed(ask(mark=mark + "-reset")), end=True)
        wait_for(lambda: served.in_flight() >= 2)
        client.reset(queued)
        [record] = wait_for(lambda: served.captured(mark))
        assert record["status"] == "CANCELLED"
        assert client.answer(ahead).status == OK and works(served, client)
        assert mark + "-reset" not in served.ran()


@pytest.mark.parametrize("path", [INFER, STREAM])
def test_a_client_that_vanishes_leaves_nothing_behind(served: Served, path: str) -> None:
    for sent in (b"", framed(ask())[:20], framed(ask(sleep=0.2))):
        client = RawClient(served.address)
        client.send(client.call(path), sent)
        client.socket.close()
    wait_for(lambda: served.in_flight() == 0, what="the end of what nobody waits for")
    with RawClient(served.address) as client:
        assert works(served, client)


def test_a_stream_that_is_half_closed_is_answered_to_its_end(served: Served) -> None:
    with RawClient(served.address) as client:
        stream = client.call(STREAM)
        client.send(stream, framed(*(ask(id=str(n), sleep=0.01) for n in range(20))), end=True)
        heard = client.answer(stream)
        assert heard.status == OK
        assert [streamed(m).infer_response.id for m in unframed(heard.body)] == [str(n) for n in range(20)]


def test_a_bad_message_ends_a_stream_after_the_answers_before_it(served: Served) -> None:
    with RawClient(served.address) as client:
        stream = client.call(STREAM)
        client.send(stream, framed(ask(id="0")) + framed(ask(), flag=7))
        assert refused(served, client, stream, INTERNAL)
        if served.transport == "h2":
            assert [streamed(m).infer_response.id for m in unframed(client.heard[stream].body)] in (["0"], [])
        assert works(served, client)


def test_garbage_for_a_connection_harms_nobody_else(served: Served) -> None:
    with RawClient(served.address) as client:
        broken = RawClient(served.address)
        broken.socket.sendall(b"\xff" * 1000)
        wait_for(lambda: broken.read(0.1) or broken.closed, what="the end of the broken connection")
        broken.socket.close()
        assert works(served, client)
