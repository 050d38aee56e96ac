"""Folder artifacts: equal folders are equal bytes, and forty hostile archives come to nothing."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import struct
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelyard.core.archives import Limits, entries, inspect, pack, unpack
from modelyard.core.errors import Conflict, Invalid, Unavailable
from tests.lanes import slow_but


def header(name: bytes | str = "file", size: int | bytes = 0, kind: bytes = b"0", *, mode: bytes = b"0000644\0",
           link: bytes = b"", magic: bytes = b"ustar\x0000", prefix: bytes = b"",
           checksum: bytes | None = None) -> bytes:
    raw_size = size if isinstance(size, bytes) else b"%011o\0" % size
    name = name.encode() if isinstance(name, str) else name
    block = (name.ljust(100, b"\0") + mode + b"0000000\0" * 2 + raw_size + b"00000000000\0" + b" " * 8 + kind
             + link.ljust(100, b"\0") + magic + bytes(64) + bytes(16) + prefix.ljust(155, b"\0") + bytes(12))
    assert len(block) == 512, len(block)
    return block[:148] + (checksum or b"%06o\0 " % sum(block)) + block[156:]


def file(name: bytes | str = "file", data: bytes = b"data", **more: Any) -> bytes:
    return header(name, len(data), **more) + data + bytes(-len(data) % 512)


def extended(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records:
        total = len(key) + len(value) + 3
        total += len(str(total + len(str(total))))
        body += b"%d %s=%s\n" % (total, key, value)
    return file(b"PaxHeader", body, kind=kind)


END = bytes(1024)
OUT = b"/tmp/modelyard-outside"


def big_endian(size: int) -> bytes:
    return b"\x80" + size.to_bytes(11, "big")


def symlink_then_through() -> bytes:
    """CVE-2025-4517's shape: a chain of links so long that the resolved path cannot be computed."""
    out, path = b"", ""
    for letter in "abcdefghijklmnop":
        folder = letter * 240
        out += extended((b"path", f"{path}{folder}".encode())) + header("d", 0, b"5")
        out += extended((b"path", f"{path}{letter}".encode()), (b"linkpath", folder.encode())) + header("l", 0, b"2")
        path += f"{letter}/"
    out += extended((b"path", f"{path}{'l' * 254}".encode()), (b"linkpath", b"../" * 16)) + header("l", 0, b"2")
    return out + extended((b"path", f"{path}{'l' * 254}/escape".encode())) + file("f", b"out")


def bomb(compress: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    return lambda: compress(file("zeros", bytes(20_000_000)) + END)


HOSTILE: dict[str, bytes | Callable[[], bytes]] = {
    "parent": file("../outside"),
    "parent inside": file("a/../../outside"),
    "parent at the end": file("a/.."),
    "parent by prefix": file("outside", prefix=b".."),
    "parent by pax": extended((b"path", b"../outside")) + file("inside"),
    "parent by a global header": extended((b"path", b"../outside"), kind=b"g") + file("inside"),
    "parent by a long name": file("././@LongLink", b"../" * 60 + b"outside\0", kind=b"L", magic=b"ustar  \0") + file(),
    "absolute": file("/tmp/modelyard-outside"),
    "absolute by pax": extended((b"path", OUT)) + file(),
    "absolute with slashes": file("//tmp/modelyard-outside"),
    "symbolic link": header("link", 0, b"2", link=b"/etc"),
    "symbolic link by pax": extended((b"linkpath", b"/etc")) + header("link", 0, b"2"),
    "link, then a file through it": header("link", 0, b"2", link=b"/tmp") + file("link/modelyard-outside"),
    "hard link": header("link", 0, b"1", link=b"/etc/passwd"),
    "hard link inside": file("a") + header("b", 0, b"1", link=b"a"),
    "link chain": symlink_then_through(),
    "long link name": file("././@LongLink", b"/etc\0", kind=b"K") + header("link", 0, b"2"),
    "character device": header("null", 0, b"3"),
    "block device": header("sda", 0, b"4"),
    "named pipe": header("pipe", 0, b"6"),
    "sparse": header("sparse", 0, b"S"),
    "sparse by pax": extended((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9" * 15)) + file(),
    "unknown kind": header("odd", 0, b"Z"),
    "same name twice": file("a") + file("a"),
    "same name written otherwise": file("a/b") + file("./a//b"),
    "a file that is a folder": file("a") + file("a/b"),
    "a folder that is a file": file("a/b") + file("a"),
    "no name": file(b""),
    "only a dot": file("."),
    "a file with a slash behind": file("a/"),
    "NUL in a pax name": extended((b"path", b"good\0../outside")) + file(),
    "NUL in a name": file(b"good\0../outside"),
    "newline in a name": file("a\nb"),
    "not UTF-8": file(b"\xff\xfe"),
    "name too long": extended((b"path", b"a" * 300)) + file(),
    "too deep": extended((b"path", b"a/" * 200 + b"b")) + file(),
    "huge size": header("a", big_endian(1 << 60)) + bytes(512),
    "huge size by pax": extended((b"size", b"9" * 18)) + header("a", 0),
    "negative size": header("a", b"\xff" * 12),
    "size that is no number": header("a", b"12z45678901\0"),
    "size beyond the end": header("a", 5_000_000) + bytes(100_000),
    "bytes of many files, 11 GiB": b"".join(header(f"f{n}", 0) for n in range(3)) + header("g", big_endian(11 << 30)),
    "damaged header": file("a") + header("b", checksum=b"000000\0 "),
    "damaged pax record": file("x", b"99 path=a\n", kind=b"x") + file(),
    "huge pax header": header("x", 1 << 30, b"x") + bytes(1 << 16),
    "pax headers without an end": extended((b"comment", b"x")) * 50 + file(),
    "cut in a header": file("a")[:100],
    "no end": file("a"),
    "gzip bomb": bomb(gzip.compress),
    "bzip2 bomb": bomb(bz2.compress),
    "xz bomb": bomb(lzma.compress),
    "zlib bomb": lambda: zlib.compress(bytes(20_000_000)),
    "zip": b"PK\x03\x04" + bytes(600),
    "too many entries": lambda: b"".join(header(f"f{n}") for n in range(10_001)),
    "too many folders": lambda: b"".join(header(f"f{n}/", kind=b"5") for n in range(10_001)),
    "no tar": b"hello " * 200,
    "empty": b"",
}
"""What takes long to make is made where it is read: every worker reads this file."""


def hostile(name: str) -> bytes:
    raw = HOSTILE[name]
    return raw if isinstance(raw, bytes) else raw()


@pytest.mark.parametrize("name", slow_but({*HOSTILE} - {"too many entries", "too many folders", "xz bomb"}, HOSTILE))
def test_hostile_archives_are_refused_and_write_nothing_outside(name: str, tmp_path: Path) -> None:
    raw = hostile(name)
    if name not in ("no end", "cut in a header", "empty", "no tar", "size beyond the end",
                    "bytes of many files, 11 GiB", "huge size"):
        raw += END
    home = tmp_path / "home"
    home.mkdir()
    for read in (inspect, lambda source: unpack(source, home / "dest")):   # type: ignore[list-item]
        began = time.thread_time()   # of this thread alone: the machine may be busy with other tests
        with pytest.raises(Invalid) as refused:
            read(io.BytesIO(raw))
        assert time.thread_time() - began <= 2
        assert refused.value.code == "bad-archive" and str(refused.value).startswith("the archive is refused: ")
    tracemalloc.start()
    with pytest.raises(Invalid):
        inspect(io.BytesIO(raw))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20, peak
    assert [*tmp_path.iterdir()] == [home] and [*home.iterdir()] == []
    assert not os.path.lexists(OUT)


def test_there_are_forty_of_them_and_the_tool_that_made_them_can_make_good_ones(tmp_path: Path) -> None:
    assert len(HOSTILE) >= 40
    good = (header("folder/", kind=b"5") + file("./folder/a", b"1") + file("b", b"2" * 513, mode=b"0000755\0")
            + extended((b"path", "ü".encode() * 100)) + file("short", b"3") + END)
    unpack(io.BytesIO(good), tmp_path / "dest")
    found = {str(p.relative_to(tmp_path / "dest")): p for p in (tmp_path / "dest").rglob("*") if p.is_file()}
    assert {name: p.read_bytes() for name, p in found.items()} == {"folder/a": b"1", "b": b"2" * 513, "ü" * 100: b"3"}
    assert (found["b"].stat().st_mode & 0o777, found["folder/a"].stat().st_mode & 0o777) == (0o755, 0o644)


class Endless:
    """A source that makes a million entries as they are read, and cannot seek."""

    def __init__(self) -> None:
        self.made, self.rest = 0, b""

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        while len(self.rest) < size and self.made < 1_000_000:
            self.made += 1
            self.rest += header(f"f{self.made}")
        out, self.rest = self.rest[:size], self.rest[size:]
        return out


def test_a_million_entries_are_not_read() -> None:
    source = Endless()
    began = time.thread_time()
    with pytest.raises(Invalid, match="more than 10000 entries"):
        inspect(source)  # type: ignore[arg-type]
    assert time.thread_time() - began < 2 and source.made < 10_010


def test_limits_can_be_narrowed() -> None:
    raw = file("a", b"x" * 1000) + file("b", b"x" * 1000) + END
    with pytest.raises(Invalid, match="more than 1 entries"):
        inspect(io.BytesIO(raw), Limits(entries=1))
    with pytest.raises(Invalid, match="more than 1999 bytes"):
        inspect(io.BytesIO(raw), Limits(size=1999))
    assert len(inspect(io.BytesIO(raw), Limits(entries=2, size=2000))) == 2


# -- good archives ----------------------------------------------------------------------------------------------------


def plant(root: Path, reverse: bool = False) -> Path:
    files = {"score.py": b"def run(data): ...", "data/weights.bin": b"w" * 2_500_000,
             "data/" + "long-name-" * 15 + ".txt": b"x", "größe.txt": b"", "a.b": b"1", "a/b": b"2", "run.sh": b"#!"}
    for name in sorted(files, reverse=reverse):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(files[name])
    (root / "run.sh").chmod(0o775)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "score.cpython-311.pyc").write_bytes(os.urandom(10))
    (root / "empty").mkdir()
    return root


def test_equal_folders_are_equal_bytes(tmp_path: Path) -> None:
    one, two = plant(tmp_path / "one"), plant(tmp_path / "two", reverse=True)
    (two / "score.py").chmod(0o600)
    os.utime(two / "score.py", (1, 1))
    packed = [b"".join(pack(folder)) for folder in (one, two)]
    assert packed[0] == packed[1]
    (two / "score.py").write_bytes(b"other")
    assert b"".join(pack(two)) != packed[0]
    with tarfile.open(fileobj=io.BytesIO(packed[0])) as tar:
        infos = tar.getmembers()
    assert [i.name for i in infos] == sorted(i.name for i in infos) and len(infos) == 7
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.isreg()) for i in infos} == {(0, 0, 0, "", "", True)}
    assert {i.mode for i in infos} == {0o644, 0o755} and [i.name for i in infos if i.mode == 0o755] == ["run.sh"]


def test_the_digest_of_a_folder_is_fixed_for_good(tmp_path: Path) -> None:
    """Artifacts are found by digest for years: these bytes may never change."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "score.py").write_bytes(b"def run(data):\n    return data\n")
    (tmp_path / "m" / "ü.txt").write_bytes(b"hello")
    raw = b"".join(pack(tmp_path / "m"))
    assert hashlib.sha256(raw).hexdigest() == "4e67443aea1ecae58fcfe36abf15f421bd3654489c16997f3be29bdade541cfe"


def test_what_was_packed_comes_out_again(tmp_path: Path) -> None:
    source = plant(tmp_path / "source")
    raw = b"".join(pack(source))
    listed = inspect(io.BytesIO(raw))
    assert unpack(io.BytesIO(raw), tmp_path / "dest") == listed
    for entry in listed:
        assert (tmp_path / "dest" / entry.name).read_bytes() == (source / entry.name).read_bytes()
        assert raw[entry.offset:entry.offset + entry.size] == (source / entry.name).read_bytes()
    assert b"".join(pack(tmp_path / "dest")) == raw


def test_entries_can_be_read_or_passed_over(tmp_path: Path) -> None:
    raw = b"".join(pack(plant(tmp_path / "source")))

    class Stream(io.RawIOBase):
        """A pipe: short reads and no seeking."""

        left = io.BytesIO(raw)

        def read(self, size: int = -1) -> bytes:
            return self.left.read(min(size, 1000))

    for source in (io.BytesIO(raw), Stream()):
        seen = {}
        for entry, content in entries(source):  # type: ignore[arg-type]
            if entry.name.endswith(".py"):
                seen[entry.name] = b"".join(content)
            elif entry.name.startswith("data/w"):
                next(content)
        assert seen == {"score.py": b"def run(data): ..."}


def add(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def added(root: Path) -> None:
        make(root / "odd")

    return added


@pytest.mark.parametrize("make", [
    add(lambda p: p.symlink_to("/etc/passwd")), add(lambda p: p.symlink_to(p.parent)), add(os.mkfifo),
    add(lambda p: (p.parent / "a\nb").write_text("")), add(lambda p: Path(os.fsdecode(bytes(p) + b"\xff")).touch()),
])
def test_what_is_no_plain_file_is_not_packed(make: Callable[[Path], None], tmp_path: Path) -> None:
    root = plant(tmp_path / "root")
    make(root)
    with pytest.raises(Invalid):
        b"".join(pack(root))


def test_an_empty_folder_and_a_changing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Invalid, match="no file"):
        b"".join(pack(tmp_path / "empty"))
    root = tmp_path / "root"
    root.mkdir()
    (root / "log").write_bytes(b"x" * 3_000_000)
    with pytest.raises(Invalid, match="changed"):
        for _ in pack(root):
            os.truncate(root / "log", 10)


def test_unpacking_is_all_or_nothing(tmp_path: Path) -> None:
    raw = file("a", b"1") + file("b", b"2") + header("c", 0, b"2") + END
    with pytest.raises(Invalid):
        unpack(io.BytesIO(raw), tmp_path / "dest")
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "mine").write_text("keep")
    with pytest.raises(Conflict):
        unpack(io.BytesIO(file("a") + END), tmp_path / "dest")
    assert [p.name for p in tmp_path.iterdir()] == ["dest"] and (tmp_path / "dest" / "mine").read_text() == "keep"
    (tmp_path / "file").write_text("")
    with pytest.raises((Conflict, Unavailable)):
        unpack(io.BytesIO(file("a") + END), tmp_path / "file" / "dest")


def test_struct_of_the_headers_made_here_is_what_tarfile_reads() -> None:
    assert struct.calcsize("512s") == len(header())
    with tarfile.open(fileobj=io.BytesIO(file("a", b"xyz") + END)) as tar:
        assert tar.getnames() == ["a"]
