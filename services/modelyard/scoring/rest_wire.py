"""Plain HTTP/1.1: the request heads that we read ourselves, and the heads of answers.

A head that is not plainly right, or asks for more than a body of a stated length, is not ours to judge: ``read`` gives
None, and a whole HTTP server takes the connection.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from .rest import SERVER, Found, Reply, Site

HEAD_BYTES = 8_000
HEAD_LINES = 100
"""Both within what the other server takes."""
FIRST = (rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (/[\w.~:@!$&'()*+,;=/-]*)(?:\?([\w.~:@!$&'()*+,;=/?-]*))?"
         rb" HTTP/1\.1\r\n")
LINE = rb"[\w!#$%&'*+.^`|~-]+:[\t -~]*\r\n"
PLAIN = re.compile(FIRST + rb"((?:" + LINE + rb")+)\r\n")
BEGUN = re.compile(FIRST + rb"(?:" + LINE + rb")*[\t -~]*\r?")
OTHERS = frozenset(("transfer-encoding", "content-encoding", "expect", "upgrade"))


@dataclass(frozen=True, slots=True)
class Head:
    """One request's. ``length``: of its body."""

    found: Found
    headers: dict[str, str]
    query: str
    length: int
    bare: bool
    """Only the answer's head is wanted."""
    last: bool
    """The caller closes after the answer."""


def read(site: Site, data: bytes, limit: int) -> Head | None:
    """A request's head, up to and with its empty line. None: it is not plain."""
    match = PLAIN.fullmatch(data)
    if match is None or len(data) > HEAD_BYTES:
        return None
    lines = match[4].decode("ascii").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines[:-1]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip(" \t")
    if not len(headers) == len(lines) - 1 <= HEAD_LINES or "host" not in headers or not OTHERS.isdisjoint(headers):
        return None
    length, connection = headers.get("content-length", "0"), headers.get("connection", "keep-alive").lower()
    if not length.isdigit() or len(length) > 15 or int(length) > limit or connection not in ("keep-alive", "close"):
        return None
    method, path = match[1].decode(), match[2].decode("ascii")
    return Head(site.find(method, path), headers, (match[3] or b"").decode("ascii"), int(length), method == "HEAD",
                connection == "close")


def begun(data: bytes) -> bool:
    """Whether this may become a plain head: its first line is there, and right."""
    return len(data) < HEAD_BYTES and BEGUN.fullmatch(data) is not None


def head(reply: Reply, last: bool) -> bytes:
    """What stands before a response's body. ``last``: the connection ends with it."""
    common = _common(int(time.time()), last)
    return f"{_status(reply.status)}{reply.head}Content-Length: {len(reply.body)}\r\n{common}".encode()


@lru_cache(64)
def _status(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"


@lru_cache(4)
def _common(second: int, last: bool) -> str:
    """The lines that every answer of this second ends with."""
    ends = "Connection: close\r\n" if last else ""
    return f"Date: {formatdate(second, usegmt=True)}\r\nServer: {SERVER}\r\n{ends}\r\n"
