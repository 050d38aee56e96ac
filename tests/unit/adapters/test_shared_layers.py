"""Unpacked layers in the user's cache: what another data folder gets from it, and what it never does."""

from __future__ import annotations

import errno
import os
import py_compile
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelyard.adapters.images_layout import LayoutImages
from modelyard.adapters.targets_process_roots import Roots
from modelyard.adapters.targets_process_trees import KIND, SharedLayers
from modelyard.core.errors import Invalid
from modelyard.kernel.cache import Cache
from tests import handmade

SITE = f"opt/env/lib/python3.{sys.version_info[1]}/site-packages"
LIB = f"{SITE}/lib.py"
COMPILED = f"{SITE}/__pycache__/lib.{sys.implementation.cache_tag}.pyc"
ENV = handmade.tar({**handmade.environment(), LIB: b"VALUE = 1\n"})
SCORE = handmade.tar(handmade.scorer(handmade.ECHO))


class Machine:
    """One user's data folders, with one image in an image store that they share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = LayoutImages(folder / "images")
        self.cache = folder / "cache"

    def roots(self, data: str, shared: SharedLayers | None = None) -> Roots:
        return Roots(self.folder / data, self.images, shared or SharedLayers(Cache(self.cache)))

    async def prepared(self, data: str, layers: tuple[bytes, ...] = (ENV, SCORE), roots: Roots | None = None) -> Path:
        digest = await handmade.put(self.images, "scorer", "1", list(layers), {})
        return (await (roots or self.roots(data)).prepare("scorer", digest)).path

    def trees(self) -> list[Path]:
        return [*self.cache.glob(f"{KIND}/[0-9a-f]*/tree")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def compiled(root: Path) -> Path:
    """As a replica would leave it behind."""
    return Path(py_compile.compile(str(root / LIB), doraise=True))


async def test_another_data_folder_gets_the_same_files(machine: Machine) -> None:
    one = await machine.prepared("one")
    shutil.rmtree(machine.folder / "one")
    two = await machine.prepared("two")
    (tree,) = machine.trees()
    assert (two / LIB).samefile(tree / LIB) and (two / LIB).read_bytes() == b"VALUE = 1\n"
    assert (two / "opt/modelyard/score/score.py").is_file() and not one.exists()


async def test_what_is_the_users_own_is_not_kept(machine: Machine) -> None:
    model = handmade.tar({"opt/modelyard/models/iris/1/model.bin": b"private"})
    await machine.prepared("one", (ENV, SCORE, model))
    assert len(machine.trees()) == 1 and not [*machine.cache.rglob("score.py")] and not [*machine.cache.rglob("*.bin")]


async def test_compiled_code_comes_along(machine: Machine) -> None:
    roots = machine.roots("one")
    root = await machine.prepared("one", roots=roots)
    compiled(root)
    await roots.collect([])
    assert not root.exists()
    two = await machine.prepared("two")
    assert (two / COMPILED).is_file() and (two / LIB).stat().st_mtime == 0


async def test_only_compiled_code_of_the_very_same_file_is_taken(machine: Machine) -> None:
    roots = machine.roots("one")
    root = await machine.prepared("one", roots=roots)
    (tree,) = machine.trees()
    for wrong in (b"noise", b"", compiled(root).read_bytes()[:12]):
        (root / COMPILED).write_bytes(wrong)
        await roots.harvest()
        assert not (tree / COMPILED).exists()
    (root / COMPILED).unlink()
    elsewhere = machine.folder / "elsewhere"
    shutil.copytree(root / SITE, elsewhere)
    py_compile.compile(str(elsewhere / "lib.py"), doraise=True)
    (root / COMPILED).parent.rmdir()
    (root / COMPILED).parent.symlink_to(elsewhere / "__pycache__")
    await roots.harvest()
    assert not (tree / COMPILED).exists(), "a link is not followed"
    (root / COMPILED).parent.unlink()
    compiled(root)
    await roots.harvest()
    assert (tree / COMPILED).samefile(root / COMPILED)


async def test_a_later_layer_s_file_is_not_run_from_an_earlier_one_s_compiled_code(machine: Machine) -> None:
    roots = machine.roots("one")
    compiled(await machine.prepared("one", roots=roots))
    await roots.harvest()
    over = handmade.tar({LIB: b"VALUE = 2\n"})
    two = await machine.prepared("two", (ENV, SCORE, over))
    assert (two / LIB).read_bytes() == b"VALUE = 2\n" and not (two / COMPILED).exists(), "same size, same time"


async def test_a_damaged_tree_is_made_anew(machine: Machine) -> None:
    await machine.prepared("zero")

    def cut(tree: Path) -> None:
        (tree / LIB).chmod(0o600)
        os.truncate(tree / LIB, 3)

    for number, damage in enumerate((
        cut, lambda tree: (tree / LIB).unlink(), lambda tree: (tree.parent / "extent.json").write_text("{"),
        lambda tree: (tree.parent / "extent.json").unlink(), shutil.rmtree,
    )):
        shutil.rmtree(machine.folder / "zero", ignore_errors=True)
        damage(machine.trees()[0])
        root = await machine.prepared(f"data{number}")
        assert (root / LIB).read_bytes() == b"VALUE = 1\n"
        (tree,) = machine.trees()
        assert (tree / LIB).samefile(root / LIB), "the cache is mended"


async def test_another_file_system_does_without(machine: Machine) -> None:
    def cross_device(source: str, target: str) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", source, None, target)

    await machine.prepared("one")
    (tree,) = machine.trees()
    two = await machine.prepared("two", roots=machine.roots("two", SharedLayers(Cache(machine.cache), cross_device)))
    assert (two / LIB).read_bytes() == b"VALUE = 1\n" and not (two / LIB).samefile(tree / LIB)
    assert machine.trees() == [tree], "what is fine for others stays"
    empty = SharedLayers(Cache(machine.folder / "empty"), cross_device)
    assert (await machine.prepared("three", roots=machine.roots("three", empty)) / LIB).is_file()
    assert not [*(machine.folder / "empty").glob("*/*")]


async def test_a_cache_that_cannot_be_written_does_no_harm(machine: Machine) -> None:
    roots = machine.roots("one", SharedLayers(Cache(Path("/proc/modelyard"))))
    root = await machine.prepared("one", roots=roots)
    compiled(root)
    await roots.harvest()
    await roots.collect([])
    assert not root.exists()


async def test_deleting_the_cache_meanwhile_costs_nothing_but_time(machine: Machine) -> None:
    gone = False

    def linked(source: str, target: str) -> None:
        nonlocal gone
        os.link(source, target)
        if not gone and str(machine.cache) in source:
            gone = True
            shutil.rmtree(machine.cache)

    await machine.prepared("one")
    two = await machine.prepared("two", roots=machine.roots("two", SharedLayers(Cache(machine.cache), linked)))
    assert gone and (two / LIB).is_file() and (two / "opt/modelyard/launch.py").is_file()


FILL = """
import pathlib, sys
from modelyard.adapters.targets_process_trees import SharedLayers
from modelyard.kernel.cache import Cache
shared, folder = SharedLayers(Cache(pathlib.Path(sys.argv[1]))), pathlib.Path(sys.argv[2])
print("up", flush=True); sys.stdin.readline()
for n in range(20):
    shared.keep(f"layer-{n}", folder / "made")
    assert shared.fetch(f"layer-{n}", folder / f"got-{n}"), n
    assert len([p for p in (folder / f"got-{n}").rglob("*") if p.is_file()]) == 40, n
"""


def test_two_processes_fill_at_once(tmp_path: Path) -> None:
    started = []
    for who in "ab":
        made = tmp_path / who / "made" / SITE
        made.mkdir(parents=True)
        for n in range(40):
            (made / f"{n}.py").write_text("x" * n)
        started.append(subprocess.Popen(
            [sys.executable, "-c", FILL, str(tmp_path / "cache"), str(tmp_path / who)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for one in started:
        assert one.stdout is not None and one.stdout.readline() == "up\n"
    said = list(ThreadPoolExecutor().map(lambda one: one.communicate("go\n", 60), started))
    assert [err for _, err in said] == ["", ""]
    assert sorted(p.name for p in (tmp_path / "cache" / KIND).iterdir()) == sorted(f"layer-{n}" for n in range(20))


async def test_an_image_without_packages_is_refused_in_words(machine: Machine) -> None:
    bare = handmade.tar({name: data for name, data in handmade.environment().items() if "site-packages" not in name})
    with pytest.raises(Invalid, match="has no packages, as its lock is empty"):
        await machine.prepared("one", (bare, SCORE))
