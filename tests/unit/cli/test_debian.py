"""`images base --debian`: what it asks of the tools, what it makes of a root file system, what it refuses.

The tools are small programs here, which give a root file system of a few files; that the real ones give one that an
engine runs is proved where images run on a Docker engine (tests/integration).
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from modelyard.cli import debian
from modelyard.cli.main import app
from tests.e2e.yard import until

TOOL = f"""#!{sys.executable}
import json, os, shutil, sys
with open(os.environ["ASKED"], "w") as out:
    json.dump({{"argv": sys.argv[1:], "epoch": os.environ["SOURCE_DATE_EPOCH"]}}, out)
print("I: fetching packages...")
print("W: a warning", file=sys.stderr)
if os.environ.get("FAILS"):
    sys.exit("E: no such suite")
target = next(a for a in sys.argv[1:] if a.startswith("/"))
more = "libgomp1" in " ".join(sys.argv) and os.environ.get("ROOT_LIBGOMP1")
shutil.copyfile(more or os.environ["ROOT"], target)
"""
ROOT = {"usr/bin/python3.11": b"elf", "usr/bin/python3": "python3.11", "etc/apt/sources.list": b"deb http://mirror.example/",
        "etc/apt/sources.list.d/more.sources": b"URIs: http://mirror.example/", "usr/share/doc/x/copyright": b"c",
        "var/lib/apt/lists/mirror.example_x": b"x", "etc/hostname": b"here", "etc/os-release": b"ID=debian",
        "dev/null": b""}
LINK = "a hard link to "


def root(path: Path, order: int = 1, mtime: int = 1_900_000_000, files: dict[str, Any] = ROOT) -> Path:
    """A tar as mmdebstrap writes it."""
    with tarfile.open(path, "w") as archive:
        folders = ("usr/lib/old",) if "usr/lib/old/a" in files else ()
        for name in ("", "etc", "etc/apt/sources.list.d", "dev", "var/cache", *folders):
            member = tarfile.TarInfo(f"./{name}")
            member.type, member.mtime = tarfile.DIRTYPE, mtime
            archive.addfile(member)
        for name in sorted(files)[::order]:
            member, content = tarfile.TarInfo(f"./{name}"), files[name]
            member.mtime = mtime
            if isinstance(content, str) and content.startswith(LINK):
                member.type, member.linkname = tarfile.LNKTYPE, f"./{content.removeprefix(LINK)}"
                archive.addfile(member)
            elif isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that is the whole PATH; mmdebstrap is there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "mmdebstrap").write_text(TOOL)
    (folder / "mmdebstrap").chmod(0o755)
    monkeypatch.setattr(debian, "_program", lambda name: str(folder / name) if (folder / name).exists() else None)
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.json"))
    monkeypatch.setenv("ROOT", str(root(tmp_path / "root.tar")))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return folder


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["images", "base", *args])


def told(*args: str) -> str:
    """The error of a command that must fail."""
    done = run("--debian", *args)
    assert (done.exit_code, done.stdout) == (1, ""), done.stderr
    return done.stderr


def layout(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[tarfile.TarInfo]]:
    """(manifest entry of the index, configuration, members of the layers, in a row), every digest checked."""
    def blob(entry: dict[str, Any]) -> bytes:
        data = (path / "blobs" / entry["digest"].replace(":", "/")).read_bytes()
        assert (len(data), "sha256:" + hashlib.sha256(data).hexdigest()) == (entry["size"], entry["digest"])
        return data

    (entry,) = json.loads((path / "index.json").read_bytes())["manifests"]
    manifest = json.loads(blob(entry))
    config, layers = json.loads(blob(manifest["config"])), [gzip.decompress(blob(e)) for e in manifest["layers"]]
    assert config["rootfs"]["diff_ids"] == ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    assert len(config["history"]) == len(layers)
    return entry, config, [m for layer in layers for m in tarfile.open(fileobj=io.BytesIO(layer)).getmembers()]


def test_a_base_is_made(tools: Path, tmp_path: Path) -> None:
    to = tmp_path / "bases" / "debian"
    done = run("--debian", "--to", str(to), "--package", "libgomp1", "--package", "python3")
    assert (done.exit_code, done.stdout) == (0, f"oci-layout://{to}:latest\n"), done.stderr
    assert "making Debian bookworm: fetching packages …" in done.stderr and "Python 3.11" in done.stderr
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked["epoch"] == str(debian.EPOCH) and asked["argv"][-2] == "bookworm"
    assert "--mode=root" in asked["argv"]
    assert "--include=python3,ca-certificates,libstdc++6,libgomp1" in asked["argv"]
    entry, config, members = layout(to)
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "latest"}
    assert config["created"] == "2026-01-01T00:00:00Z"
    assert [m.name for m in members] == ["dev", "etc", "etc/apt/sources.list.d", "etc/os-release", "usr/bin/python3",
                                         "usr/bin/python3.11", "var/cache"]
    assert {m.mtime for m in members} == {debian.EPOCH} and not any(b"mirror.example" in p.read_bytes()
                                                                    for p in to.rglob("*") if p.is_file())
    assert [p.name for p in to.parent.iterdir()] == ["debian"], "nothing else is left"


def test_packages_that_are_asked_for_are_a_layer_of_their_own(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With links that stay inside it, and marks for what they take away; the layer below is that of the plain base."""
    plain = {**ROOT, "usr/bin/perl5": b"perl", "usr/bin/perl": LINK + "usr/bin/perl5", "usr/lib/old/a": b"a",
             "usr/lib/old/b": b"b", "usr/lib/stays": b"s", "var/lib/dpkg/status": b"one"}
    more = {**plain, "usr/lib/libgomp.so.1": b"gomp", "var/lib/dpkg/status": b"two", "usr/bin/perl5": b"PERL"}
    for gone in ("usr/lib/old/a", "usr/lib/old/b", "etc/os-release"):
        del more[gone]
    monkeypatch.setenv("ROOT", str(root(tmp_path / "plain.tar", files=plain)))
    assert run("--debian", "--to", str(tmp_path / "plain")).exit_code == 0
    monkeypatch.setenv("ROOT_LIBGOMP1", str(root(tmp_path / "more.tar", files=more)))
    done = run("--debian", "--to", str(tmp_path / "more"), "--package", "libgomp1", "--package", "python3")
    assert done.exit_code == 0 and "packages: libgomp1" in done.stderr, done.stderr
    _, config, below = layout(tmp_path / "plain")
    _, wider, members = layout(tmp_path / "more")
    assert wider["rootfs"]["diff_ids"][0] == config["rootfs"]["diff_ids"][0]
    assert [h["created_by"] for h in wider["history"]] == [config["history"][0]["created_by"], "packages: libgomp1"]
    assert [m.name for m in members[len(below):]] == [
        "etc", "etc/.wh.os-release", "usr/bin/perl5", "usr/lib/.wh.old", "usr/lib/libgomp.so.1", "var/lib/dpkg/status",
        "usr/bin/perl"]


def test_the_same_bytes_again_and_a_time_of_ones_own(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    run("--debian", "--to", str(tmp_path / "a"))
    monkeypatch.setenv("ROOT", str(root(tmp_path / "other.tar", -1, 1_950_000_000)))
    run("--debian", "--to", str(tmp_path / "b"))
    assert (tmp_path / "a" / "index.json").read_bytes() == (tmp_path / "b" / "index.json").read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    run("--debian", "--to", str(tmp_path / "c"))
    _, config, members = layout(tmp_path / "c")
    assert config["created"] == "2001-09-09T01:46:40Z" and {m.mtime for m in members} == {1_000_000_000}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    assert "a number of seconds" in told("--to", str(tmp_path / "d"))


def test_a_mirror_that_is_given_is_named(tools: Path, tmp_path: Path) -> None:
    to = tmp_path / "here"
    run("--debian", "--to", str(to), "--suite", "trixie", "--mirror", "http://mirror.example/debian")
    assert json.loads((tmp_path / "asked.json").read_text())["argv"][-3::2] == ["trixie", "http://mirror.example/debian"]
    assert "etc/apt/sources.list" in [m.name for m in layout(to)[2]]
    for mirror, word in (("http://u:secret@mirror.example/", "credentials"), ("mirror.example", "a mirror is a URL")):
        error = told("--to", str(tmp_path / "no"), "--mirror", mirror)
        assert word in error and "secret" not in error


def test_without_root_and_without_tools(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "unshare (package util-linux) and newuidmap (package uidmap)" in told("--to", str(tmp_path / "no"))
    for name in ("unshare", "newuidmap"):
        (tools / name).write_text("")
    assert run("--debian", "--to", str(tmp_path / "yes")).exit_code == 0
    assert "--mode=unshare" in json.loads((tmp_path / "asked.json").read_text())["argv"]
    (tools / "mmdebstrap").rename(tools / "debootstrap")
    assert "debootstrap needs root" in told("--to", str(tmp_path / "no"))
    (tools / "debootstrap").unlink()
    assert "apt-get install mmdebstrap" in told("--to", str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_debootstrap_where_only_that_is_there(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tools / "mmdebstrap").unlink()
    (tools / "debootstrap").write_text(TOOL.partition("target =")[0] + """
from pathlib import Path
target = Path(next(a for a in sys.argv[1:] if a.startswith("/")))
for name in ("etc/os-release", "usr/bin/python3.13", "dev/null", "proc/1/x", "etc/apt/sources.list"):
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_text("x")
""")
    (tools / "debootstrap").chmod(0o755)
    (tools / "chroot").write_text('#!/bin/sh\necho "$@" > "$ASKED.chroot"\n')
    (tools / "chroot").chmod(0o755)
    done = run("--debian", "--to", str(tmp_path / "made"), "--suite", "trixie")
    assert done.exit_code == 0 and "Python 3.13" in done.stderr, done.stderr
    argv = json.loads((tmp_path / "asked.json").read_text())["argv"]
    assert argv[:2] == ["--variant=minbase", "--include=python3,ca-certificates,libstdc++6"] and argv[2] == "trixie"
    assert "compileall" in (tmp_path / "asked.json.chroot").read_text()
    names = [m.name for m in layout(tmp_path / "made")[2]]
    assert {"etc/os-release", "dev", "proc"} <= set(names)
    assert not {"dev/null", "proc/1", "etc/apt/sources.list"} & set(names)


def test_what_fails_leaves_nothing(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = tmp_path / "bases" / "x"
    monkeypatch.setenv("FAILS", "1")
    assert "mmdebstrap failed (1)" in (error := told("--to", str(to))) and "E: no such suite" in error
    monkeypatch.delenv("FAILS")
    for python in ("usr/bin/python3.9", "usr/bin/perl"):
        monkeypatch.setenv("ROOT", str(root(tmp_path / "old.tar", files={python: b""})))
        assert "images need 3.11 or newer" in told("--to", str(to), "--suite", "bullseye")
    assert list(to.parent.iterdir()) == []
    to.mkdir()
    assert "is there already" in told("--to", str(to))
    assert "cannot be a base's folder" in told("--to", str(tmp_path / "a:b"))
    both = told("--suite", "-x", "--package", "--oops", "--package", "a b")
    assert "suite of Debian" in both and "'--oops'" in both and "'a b'" in both


def test_what_a_killed_run_left_goes_with_the_next(tools: Path, tmp_path: Path) -> None:
    def folder(name: str, holds: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / holds).write_text("x")
        return tmp_path / name

    left, live = folder(".x-abcd_123", "root.tar"), folder(".x-efgh4567", "root.tar")
    (tmp_path / ".x-linkedto").symlink_to(live)
    kept = {live, tmp_path / ".x-linkedto", folder(".x-settings", "mine"), folder(".x-old-abcd1234", "root.tar"),
            folder(".y-abcd1234", "root.tar")}
    lock = os.open(live, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        done = run("--debian", "--to", str(tmp_path / "x"))
    finally:
        os.close(lock)
    assert done.exit_code == 0 and f"taking away '{left}'" in done.stderr, done.stderr
    assert set(tmp_path.glob(".*")) == kept


HANGS = f"""#!{sys.executable}
import os, subprocess, sys, time
target = next(a for a in sys.argv[1:] if a.startswith("/"))
open(target, "w").write("much")
child = subprocess.Popen(["sleep", "600"])
print(f"I: at {{os.getpid()}} {{child.pid}}", flush=True)
time.sleep(600)
"""


def ended(pid: int) -> bool:
    """Whether it runs no more; nobody may have asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.slow
def test_sigterm_ends_the_tools_and_leaves_nothing(tmp_path: Path) -> None:
    tools, bases = tmp_path / "bin", tmp_path / "bases"
    tools.mkdir()
    for name in ("mmdebstrap", "unshare", "newuidmap"):
        (tools / name).write_text(HANGS)
        (tools / name).chmod(0o755)
    argv = [sys.executable, "-m", "modelyard", "images", "base", "--debian", "--to", str(bases / "x")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                          env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}) as process:
        try:
            line = next(line for line in process.stderr or () if ": at " in line)
            pids = [int(word) for word in line.split() if word.isdigit()]
            assert len(pids) == 2 and [p.name for p in bases.glob(".x-*/*")] == ["root.tar"]
            process.terminate()
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said
    assert list(bases.iterdir()) == []
    until(lambda: all(map(ended, pids)), 30, why="mmdebstrap and its own end")


def test_it_must_be_said_what_of(tools: Path) -> None:
    assert run().exit_code == 2
