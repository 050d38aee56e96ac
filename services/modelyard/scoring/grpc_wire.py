"""What gRPC writes around its messages on HTTP/2: frames of five bytes, compression, timeouts, statuses, metadata."""

from __future__ import annotations

import base64
import binascii
import math
import re
import zlib
from collections.abc import Iterable

from ..core.errors import ModelyardError
from .calls import statuses, too_large

OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED = b"0", b"1", b"2", b"3", b"4"
NOT_FOUND, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = b"5", b"8", b"12", b"13", b"14"
CODES = {"OK": OK, "CANCELLED": CANCELLED, "INVALID_ARGUMENT": INVALID_ARGUMENT, "NOT_FOUND": NOT_FOUND,
         "DEADLINE_EXCEEDED": DEADLINE_EXCEEDED, "RESOURCE_EXHAUSTED": RESOURCE_EXHAUSTED, "INTERNAL": INTERNAL,
         "UNAVAILABLE": UNAVAILABLE}
"""The names in ``calls.STATUSES`` → what ``grpc-status`` says."""
MESSAGE_LENGTH, MESSAGE_BYTES, SHORT_LENGTH = 2_000, 4_000, 300
"""Status messages travel in headers, which clients cap at 8 KiB; percent-encoding makes up to twelve bytes of one."""
ENCODINGS = b"identity, deflate, gzip"
WINDOWS = {b"gzip": 31, b"deflate": 15}
"""What we inflate → zlib's window bits."""
DETAILS = "grpc-status-details-bin"
TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
ODD = re.compile(rb"[^ -$&-~]")

Header = tuple[bytes, bytes]
STATUS_OK: Header = (b"grpc-status", OK)
Pairs = Iterable[tuple[str, str | bytes]]


class Refused(Exception):
    """The call ends with this status; a mistake of the caller's in gRPC itself, not in what was asked."""

    def __init__(self, status: bytes, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def timeout_s(value: bytes) -> float:
    """The seconds of a ``grpc-timeout``. Raises Refused."""
    found = TIMEOUT.fullmatch(value)
    if found is None:
        raise Refused(INTERNAL, "malformed grpc-timeout")
    return int(found[1]) * UNITS[found[2]]


def short(message: str) -> str:
    """As much of a status message as fits into headers."""
    for length in (MESSAGE_LENGTH, SHORT_LENGTH):
        cut = message[:length]
        if len(_percent(cut)) <= MESSAGE_BYTES:
            break
    return cut


def percent(message: str) -> bytes:
    """``grpc-message``: UTF-8, everything but printable ASCII (and ``%``) as ``%XX``."""
    return _percent(short(message))


def _percent(text: str) -> bytes:
    return ODD.sub(lambda odd: b"%%%02X" % odd[0][0], text.encode(errors="replace"))


def metadata(pairs: Pairs) -> list[Header]:
    """Our metadata as headers; values of ``-bin`` keys in base64 without padding."""
    return [(key.encode(), base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode())
            for key, value in pairs]


def binary(value: bytes) -> bytes:
    """The bytes of a ``-bin`` header, padded or not; b"" when it is none."""
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        return b""


def frame(message: bytes) -> bytes:
    """A message as it travels, not compressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def failure(error: ModelyardError) -> tuple[bytes, str]:
    """(``grpc-status``, message) of an error."""
    return CODES[statuses(error)[0]], error.message


def refusal(status: bytes, message: str = "") -> list[Header]:
    """A status and what it means, as headers."""
    return [(b"grpc-status", status), (b"grpc-message", percent(message))] if message else [(b"grpc-status", status)]


def failed(error: ModelyardError, beside: Iterable[Header] = ()) -> list[Header]:
    """An error of ours as headers: status, message and details."""
    return [*refusal(*failure(error)), *beside, *metadata([(DETAILS, details(error))])]


def details(error: ModelyardError) -> bytes:
    """A google.rpc.Status with an ErrorInfo (our code as its reason), and a RetryInfo when we say when to come again.

    Written by hand: three messages of the wire format are no reason for another dependency.
    """
    code, message = failure(error)
    info = _field(1, error.code.encode()) + _field(2, b"modelyard")
    parts = [_any(b"google.rpc.ErrorInfo", info)]
    seconds = error.detail.get("retry_after")
    if isinstance(seconds, int | float) and seconds >= 0:
        parts.append(_any(b"google.rpc.RetryInfo", _field(1, b"\x08" + _varint(math.ceil(seconds)))))
    return (b"\x08" + _varint(int(code)) + _field(2, message[:SHORT_LENGTH].encode(errors="replace"))
            + b"".join(_field(3, part) for part in parts))


def _any(name: bytes, value: bytes) -> bytes:
    return _field(1, b"type.googleapis.com/" + name) + _field(2, value)


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


class Packed(bytes):
    """A compressed message."""


def inflate(message: bytes, window: int, limit: int) -> bytes:
    """The message inside. Stops at the limit, so that a small message cannot fill the memory. Raises Refused,
    TooLarge."""
    machine = zlib.decompressobj(window)
    try:
        out = machine.decompress(message, limit + 1)
    except zlib.error as exc:
        raise Refused(INTERNAL, f"the message cannot be decompressed: {exc}") from exc
    if len(out) > limit:
        raise too_large(limit)
    if not machine.eof:
        raise Refused(INTERNAL, "the message cannot be decompressed: it ends too early")
    return out


class Frames:
    """Cuts what arrives into messages. A message over the limit is refused by its prefix, before it is read."""

    __slots__ = ("_compressed", "_held", "_limit", "_packed", "_size", "_want")

    def __init__(self, limit: int, compressed: bool) -> None:
        self._limit, self._compressed = limit, compressed
        self._held: list[bytes] = []  # of one message, or of one prefix while _want is -1
        self._size = 0
        self._want = -1
        self._packed = False

    @property
    def partial(self) -> bool:
        """A message has begun and is not whole."""
        return self._want >= 0 or self._size > 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The messages that are whole now (Packed: still compressed). Raises Refused, TooLarge."""
        found: list[bytes] = []
        at = 0
        while True:
            if self._want < 0:
                at = self._prefix(chunk, at)
                if self._want < 0:
                    return found
            missing = self._want - self._size
            part = chunk[at:at + missing]
            if len(part) < missing:
                if part:
                    self._held.append(part)
                    self._size += len(part)
                return found
            at += missing
            message = part if not self._held else b"".join((*self._held, part))
            found.append(Packed(message) if self._packed else message)
            self._held, self._size, self._want = [], 0, -1
            if at == len(chunk):
                return found

    def _prefix(self, chunk: bytes, at: int) -> int:
        """Reads the five bytes before a message, as far as they are there; gives back where it stopped."""
        head = chunk[at:at + 5 - self._size]
        at += len(head)
        if self._size + len(head) < 5:
            if head:
                self._held.append(head)
                self._size += len(head)
            return at
        if self._held:
            head = b"".join((*self._held, head))
            self._held, self._size = [], 0
        size = int.from_bytes(head[1:], "big")
        if head[0] > 1:
            raise Refused(INTERNAL, f"a message begins with {head[0]}: neither plain (0) nor compressed (1)")
        if head[0] and not self._compressed:
            raise Refused(INTERNAL, "a message is compressed, but grpc-encoding does not say how")
        if size > self._limit:
            raise too_large(self._limit, size)
        self._packed, self._want = head[0] == 1, size
        return at
