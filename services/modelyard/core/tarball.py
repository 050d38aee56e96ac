"""Tar blocks: headers and extended headers as they come from a stranger. ``archives`` says what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from .errors import Invalid

BLOCK = 512
CHUNK = 1 << 20
HEADER_TEXT = 64 * 1024
ALL_HEADER_TEXT = 16 << 20
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip",
              b"\x04\x22\x4d\x18": "lz4"}


def bad(reason: str) -> Invalid:
    """The one refusal of an archive."""
    return Invalid(f"the archive is refused: {reason}", code="bad-archive")


@dataclass
class Header:
    name: str
    size: int
    mode: int
    kind: str


def next_header(reader: Reader) -> Header | None:
    """The next entry with what its extended headers say; None at the end mark."""
    longname: str | None = None
    extra: dict[str, str] = {}
    for _ in range(8):
        block = reader.block()
        if not block.strip(b"\0"):
            if reader.block().strip(b"\0"):
                raise bad(f"it is damaged at byte {reader.at - BLOCK}")
            return None
        header = _parse(block, reader.at - BLOCK)
        if header.kind == "x":
            extra |= _records(reader.text(header))
        elif header.kind == "g":
            if _records(reader.text(header)).keys() & {"path", "size", "linkpath"}:
                raise bad("a global header gives names or sizes")
        elif header.kind == "L":
            longname = _text(reader.text(header).removesuffix(b"\0"))
        elif header.kind == "K":
            raise bad("it has links; only regular files are taken")
        else:
            return _extended(header, longname, extra)
    raise bad("too many extended headers for one file")


def _extended(header: Header, longname: str | None, extra: dict[str, str]) -> Header:
    if any(key.startswith("GNU.sparse") for key in extra):
        raise bad("it has sparse files")
    size = extra.get("size", str(header.size))
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise bad(f"'{size[:40]}' is not a size")
    return Header(extra.get("path", longname or header.name), int(size), header.mode, header.kind)


def _parse(block: bytes, at: int) -> Header:
    given = _number(block[148:156])
    if given != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        for magic, kind in COMPRESSED.items():
            if at == 0 and block.startswith(magic):
                raise bad(f"it is compressed ({kind}); send the tar itself")
        raise bad("it is not a tar archive" if at == 0 else f"it is damaged at byte {at}")
    name, prefix = _field(block[:100]), b""
    if block[257:263] == b"ustar\0":
        prefix = _field(block[345:500])
    return Header(_text(prefix + b"/" + name if prefix else name), _number(block[124:136]),
                   _number(block[100:108]), chr(block[156]))


def _field(raw: bytes) -> bytes:
    text, _, rest = raw.partition(b"\0")
    if rest.strip(b"\0"):
        raise bad(f"the name {text!a} goes on behind a NUL")
    return text


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise bad(f"the name {raw[:80]!a} is not UTF-8") from None


def _number(raw: bytes) -> int:
    """Octal text, or the binary form that begins with 0x80."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    digits = raw.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        return 0 if len(raw) == 8 else _refuse_number(raw)   # a mode that is none
    return int(digits or b"0", 8)


def _refuse_number(raw: bytes) -> int:
    raise bad(f"{raw[:40]!a} is not a size")


def _records(raw: bytes) -> dict[str, str]:
    """PAX records: ``<length> <key>=<value>\\n``, the length being that of the whole record."""
    out: dict[str, str] = {}
    at, raw = 0, raw.rstrip(b"\0")
    while at < len(raw):
        found = re.match(rb"([0-9]{1,6}) ([^=\n\0]+)=", raw[at:at + 1024])
        end = at + int(found[1]) if found else 0
        if found is None or not at + found.end() < end <= len(raw) or raw[end - 1:end] != b"\n":
            raise bad("an extended header is damaged")
        out[_text(found[2])] = _text(raw[at + found.end():end - 1])
        at = end
    return out


class Reader:
    """Reads a source from wherever it is, counts, and turns a short read into a refusal."""

    def __init__(self, source: BinaryIO) -> None:
        self.source = source
        self.at = self.texts = 0
        self.origin = source.tell() if source.seekable() else None

    def read(self, size: int) -> bytes:
        data = self.source.read(size)
        while len(data) < size and (more := self.source.read(size - len(data))):
            data += more
        self.at += len(data)
        if len(data) < size:
            raise bad("it is not a tar archive" if self.at < BLOCK else f"it is cut off at byte {self.at}")
        return data

    def block(self) -> bytes:
        return self.read(BLOCK)

    def text(self, header: Header) -> bytes:
        self.texts += header.size
        if header.size > HEADER_TEXT or self.texts > ALL_HEADER_TEXT:
            raise bad(f"its extended headers are too long: {HEADER_TEXT} bytes each are read, {ALL_HEADER_TEXT} in all")
        raw = self.read(header.size + -header.size % BLOCK)
        return raw[:header.size]

    def content(self, size: int) -> Iterator[bytes]:
        end = self.at + size
        while self.at < end:
            yield self.read(min(CHUNK, end - self.at))

    def skip_to(self, end: int) -> None:
        if self.origin is not None and end - self.at > CHUNK:
            self.source.seek(self.origin + end - 1)   # the last byte is read: it must be there
            self.at = end - 1
        while self.at < end:
            self.read(min(CHUNK, end - self.at))
