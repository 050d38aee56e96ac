"""Why our servers refused a call: the reason in its ``grpc-status-details-bin``, else what its text begins with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

DETAILS = "grpc-status-details-bin"
INFO = b"type.googleapis.com/google.rpc.ErrorInfo"
TOO_LARGE = re.compile(r"(\d+ bytes are|the message is) more than the limit of \d|"
                       r"((CLIENT|SERVER): )?(Received|Sent) message larger than max\b")
"""What a message over the limit is told of, by our servers and by the gRPC library itself. A stream's messages have no
more than this text. Only its beginning is looked at: further on there are names, which are the owner's words."""


def reason_in(metadata: Iterable[tuple[str, Any]] | None) -> str:
    """``too-large``, ``queue-full``, … of a call's trailing metadata; "" where nothing there tells."""
    for key, value in metadata or ():
        if key == DETAILS and isinstance(value, bytes):
            try:
                return next(filter(None, map(_reason, _fields(value, 3))), "")
            except (IndexError, UnicodeDecodeError):
                return ""  # not ours, or cut short
    return ""


def is_too_large(reason: str, text: str) -> bool:
    """Whether a refusal is for good, as the message is over a limit; else trying again later may help."""
    return reason == "too-large" if reason else TOO_LARGE.match(text) is not None


def _reason(packed: bytes) -> str:
    """Of an Any: the reason, where it holds an ErrorInfo."""
    if next(_fields(packed, 1), b"") != INFO:
        return ""
    return next(_fields(next(_fields(packed, 2), b""), 1), b"").decode()


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """The values of a message's field that has a length. Raises IndexError for what is no message.

    Read by hand, as it is written: three messages of the wire format are no reason for another dependency.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise IndexError
            if tag >> 3 == wanted:
                yield message[at : at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise IndexError


def _varint(message: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
