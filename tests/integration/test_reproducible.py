"""The same inputs are the same image: whoever builds it, wherever, in whatever surroundings, time after time."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from infra.stack.registry import Registry
from tests.backends import need
from tests.unit.image_builder.conftest import SCORE, running
from tests.wheelhouse import house, wheel

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PLAIN = {"LC_ALL": "C", "TZ": "UTC", "PYTHONHASHSEED": "0"}
ODD = {"LC_ALL": "C.UTF-8", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "4711", "SOURCE_DATE_EPOCH": "1700000000"}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that anybody may look into, with wheels in it."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        house(folder / "wheels")
        wheel(folder / "wheels", "tiny")
        wheel(folder / "wheels", "nested", files={f"nested/m{n}.py": b"N = %d\n" % n for n in range(200)})
        yield folder


def build(folder: Path, wheels: Path, around: Mapping[str, str], umask: int, store: str = "", *,
          python: str = sys.executable, **who: Any) -> str:
    """The digest of an image that another process built in ``folder``."""
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), **around,
           "UV_CACHE_DIR": str(folder / "cache/uv"), "UV_FIND_LINKS": str(wheels), "UV_NO_INDEX": "1",
           "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "services", sysconfig.get_path("purelib"))))}
    work = Path(tempfile.mkdtemp(dir=folder))
    if who:
        shutil.chown(work, **who)
    done = subprocess.run(
        [python, "-m", "tests.integration.build_worker", "here", *([store] if store else [])], cwd=work, env=env,
        umask=umask, capture_output=True, text=True, timeout=120, **who)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def digest(place: Path) -> str:
    """Of the image as it is made in plain surroundings, with nothing in the caches."""
    return build(place, place / "wheels", PLAIN, 0o022)


def test_in_any_surroundings(place: Path, digest: str) -> None:
    """With warm caches in another folder, umask, language, time zone and order of hashes."""
    assert build(place, place / "wheels", ODD, 0o077) == digest


def test_in_a_registry(place: Path, digest: str, tmp_path: Path) -> None:
    """With cold caches."""
    need("registry")
    with Registry(tmp_path / "registry") as found:
        assert build(tmp_path, place / "wheels", ODD, 0o077, f"{found.url}/yard") == digest


def other_python() -> str | None:
    """One that somebody else may run, of our minor version."""
    code = f"import sys; assert sys.version_info[:2] == {sys.version_info[:2]}; open({str(ROOT / 'pyproject.toml')!r})"
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info[1]}"):
        with suppress(OSError):
            if subprocess.run([python, "-c", code], user="nobody", cwd="/", stderr=subprocess.DEVNULL, timeout=30,
                              check=False).returncode == 0:
                return python
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_by_another_user(place: Path, digest: str) -> None:
    if (python := other_python()) is None:
        pytest.skip("no Python here that nobody may run")
    folder = place / "of nobody"
    folder.mkdir()
    shutil.chown(folder, "nobody", "nogroup")
    assert build(folder, place / "wheels", ODD, 0o077, python=python, user="nobody", group="nogroup") == digest


async def test_twenty_times(tmp_path: Path) -> None:
    """Twenty versions, one digest; two at a time."""
    async with running(tmp_path / "data") as yard:
        await yard.register("iris", b"weights")
        spec = {"models": ["iris"], "score": await yard.upload(SCORE), "lock": await yard.upload(b"")}
        digests = []
        for _ in range(10):
            asked = await asyncio.gather(yard.post(name="one", **spec), yard.post(name="two", **spec))
            digests += [(await yard.over(one["id"]))["digest"] for one in asked]
    assert len(digests) == 20 and len(set(digests)) == 1 and digests[0]
