"""The user's cache: whole entries or none, silence where it cannot be used, and an end to everything in it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelyard.kernel.cache import CAP, DAY_S, UNUSED_S, Cache, user_folder


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def put(cache: Cache, name: str, size: int = 10, kind: str = "things") -> bool:
    return cache.keep(kind, name, lambda beside: bool(beside.write_bytes(b"x" * size)) and None)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("*/*")}


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_folder() == tmp_path / "xdg/modelyard"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_folder() == tmp_path / "home/.cache/modelyard"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_folder() == tmp_path / "home/.cache/modelyard"
    assert put(Cache(), "one")
    assert (tmp_path / "home/.cache/modelyard").stat().st_mode & 0o777 == 0o700


def test_an_entry_is_whole_or_not_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")

    def half(beside: Path) -> None:
        beside.mkdir()
        (beside / "first").write_text("there")
        raise OSError(28, "No space left on device")

    assert cache.find("things", "one") is None and not cache.keep("things", "one", half)
    assert cache.find("things", "one") is None and names(tmp_path / "cache") == set()
    assert put(cache, "one")
    found = cache.find("things", "one")
    assert found is not None and found.read_bytes() == b"x" * 10
    cache.drop("things", "one")
    assert cache.find("things", "one") is None and names(tmp_path / "cache") == set()


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "/etc/passwd", "a\0b"])
def test_a_name_that_leads_elsewhere_is_no_entry(tmp_path: Path, name: str) -> None:
    cache = Cache(tmp_path / "cache")
    (tmp_path / "cache/things").mkdir(parents=True, mode=0o700)
    assert not put(cache, name) and cache.find("things", name) is None
    cache.drop("things", name)
    assert (tmp_path / "cache/things").is_dir()


def test_it_does_without_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file/below", Path("/proc/modelyard")):
        cache = Cache(folder)
        assert not put(cache, "one") and cache.find("things", "one") is None
        cache.drop("things", "one")
        cache.prune()
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert put(cache, "one")
    (tmp_path / "cache").chmod(0o777)
    assert cache.find("things", "one") is None and not put(cache, "two")
    (tmp_path / "cache").chmod(0o700)
    assert cache.find("things", "one") is not None
    if os.geteuid() == 0:
        os.chown(tmp_path / "cache", 12345, 12345)
        assert cache.find("things", "one") is None and not put(cache, "two")


def test_what_nobody_uses_goes_after_a_month(tmp_path: Path) -> None:
    clock = Clock()
    cache = Cache(tmp_path / "cache", clock=clock)
    assert put(cache, "used") and put(cache, "unused")
    clock.now += UNUSED_S - 10
    assert cache.find("things", "used") is not None
    cache.prune()
    assert names(tmp_path / "cache") == {"used", "unused"}
    clock.now += 20
    cache.prune(every_s=DAY_S)
    assert names(tmp_path / "cache") == {"used", "unused"}, "it was done a moment ago"
    cache.prune()
    assert names(tmp_path / "cache") == {"used"}


def test_what_is_over_the_cap_goes_oldest_first(tmp_path: Path) -> None:
    clock = Clock()
    cache = Cache(tmp_path / "cache", clock=clock, cap=2500)
    for name in ("a", "b", "c"):
        assert put(cache, name, 1000)
        clock.now += 1
    assert cache.find("things", "a") is not None
    cache.prune()
    assert names(tmp_path / "cache") == {"a", "c"}
    clock.now += 1
    assert cache.keep("trees", "tree", lambda beside: _tree(beside, 2000))
    cache.prune()
    assert names(tmp_path / "cache") == {"tree"}, "a folder counts with all its files"
    assert CAP == 10 * 2**30


def _tree(beside: Path, size: int) -> None:
    (beside / "deep").mkdir(parents=True)
    (beside / "deep" / "file").write_bytes(b"x" * size)


def test_what_a_dead_process_left_goes_after_a_day(tmp_path: Path) -> None:
    clock = Clock()
    cache = Cache(tmp_path / "cache", clock=clock)
    assert put(cache, "one")
    left = tmp_path / "cache/things/.left"
    _tree(left, 10)
    os.utime(left, (clock.now, clock.now))
    cache.prune()
    assert left.exists(), "somebody may still be at it"
    clock.now += DAY_S + 1
    cache.prune()
    assert not left.exists() and names(tmp_path / "cache") == {"one"}


MANY = """
import os, pathlib, sys
from modelyard.kernel.cache import Cache
cache = Cache(pathlib.Path(sys.argv[1]))
def make(beside):
    beside.mkdir()
    for n in range(30):
        (beside / str(n)).write_text("whole")
print("up", flush=True); sys.stdin.readline()
for round in range(60):
    cache.keep("trees", "one", make)
    found = cache.find("trees", "one")
    if found is not None:
        try:
            held = os.open(found, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        if round % 7 == int(sys.argv[2]):
            cache.drop("trees", "one")
        os.close(held)
print(len(os.listdir(cache.find("trees", "one"))) if cache.keep("trees", "one", make) else "gone")
"""


def test_many_processes_add_and_take_away_the_same_entry(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    started = [subprocess.Popen([sys.executable, "-c", MANY, str(cache), str(n)], text=True, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for n in (3, 99)]
    for one in started:
        assert one.stdout is not None and one.stdout.readline() == "up\n"
    said = list(ThreadPoolExecutor().map(lambda one: one.communicate("go\n", timeout=60), started))
    assert [err for _, err in said] == ["", ""] and "30\n" in [out for out, _ in said]
    assert names(cache) == {"one"} and len([*(cache / "trees/one").iterdir()]) == 30


def test_a_link_is_no_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert put(cache, "one")
    outside = tmp_path / "outside"
    _tree(outside, 10)
    before = outside.stat().st_mtime_ns
    (tmp_path / "cache/things/link").symlink_to(outside)
    assert cache.find("things", "link") is None and outside.stat().st_mtime_ns == before
    cache.drop("things", "link")
    assert (outside / "deep/file").is_file() and names(tmp_path / "cache") == {"one"}
