"""The third choice of real servers, in an engine of this file's own: with native ones hidden, contract suites run
in containers that testcontainers starts, of images that stand in for public ones; and nothing is left afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from infra.stack import standins
from infra.stack.docker import Docker
from infra.stack.server import ROOT
from tests.backends import need, required
from tests.containers import PREFIX
from tests.containers_servers import IMAGES

pytestmark = pytest.mark.slow

PART = {  # the suite, the adapter, and what of it is run: nothing that a busy machine could be too slow for
    "store": ("mongo", ["test_a_stale_revision_is_a_conflict_and_changes_nothing", "test_one_of_many_creations_wins",
                        "test_a_cause_is_applied_once", "test_everything_is_there_after_opening_again",
                        "test_commits_from_several_stores_are_all_kept"]),
    "bus": ("kafka", ["test_order_holds_for_each_topic_and_key", "test_two_members_share_the_work",
                      "test_what_was_not_acknowledged_comes_again_in_order_after_reopening",
                      "test_a_killed_publisher_has_published_what_it_says", "test_read_walks_the_log_by_cursors"]),
    "blobs": ("azure", ["test_put_replaces_or_leaves_alone", "test_one_of_many_writers_makes_it",
                        "test_lists_are_sorted_as_text_and_resumable", "test_a_killed_writer_leaves_nothing"]),
    "images": ("registry", ["test_a_manifest_by_tag_and_by_digest", "test_remove_takes_what_nobody_else_needs",
                            "test_it_is_still_there_after_reopening", "test_many_at_once_lose_no_tag"]),
}
OPENED = "from tests import containers as c; c.open_session(); "


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    need("docker")
    if reason := standins.missing(tuple(IMAGES.values())):
        (pytest.fail if "docker" in required() else pytest.skip)(f"no images can be made here: {reason}")
    with Docker(tmp_path_factory.mktemp("engine") / "docker") as engine:
        standins.build(engine, tuple(IMAGES.values()), print)
        yield engine


@pytest.fixture
def env(engine: Docker, tmp_path: Path) -> dict[str, str]:
    """Of a child that knows no other server: neither a given one nor a native one."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MODELYARD_", "PYTEST_"))}
    (tmp_path / "tmp").mkdir()
    return plain | {"MODELYARD_TEST_RUN": str(tmp_path / "none"), "DOCKER_HOST": engine.docker_host,
                    "TMPDIR": str(tmp_path / "tmp"), "ORT_DISABLE_TELEMETRY": "1"}


@pytest.fixture(autouse=True)
def nothing_left(engine: Docker, tmp_path: Path) -> Iterator[None]:
    yield
    assert left(engine) == ([], [])
    assert list((tmp_path / "tmp").glob(f"{PREFIX}*")) == []


def left(engine: Docker) -> tuple[list[str], list[str]]:
    """(containers, volumes), asked past testcontainers."""
    client = docker.DockerClient(engine.docker_host)
    try:
        return ([f"{one.name} {one.status}" for one in client.containers.list(all=True, ignore_removed=True)],
                [one.name for one in client.volumes.list()])
    finally:
        client.close()


def python(env: dict[str, str], *argv: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)


def outcomes(report: Path) -> dict[str, set[str]]:
    """Of a run's report: the adapter → its tests that passed; a test that did otherwise is under what it did."""
    found: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        test, _, adapter = case.attrib["name"].rstrip("]").partition("[")
        found.setdefault(case[0].tag if len(case) else adapter, set()).add(test)
    return found


def test_contract_suites_run_in_containers_that_workers_share(env: dict[str, str], tmp_path: Path) -> None:
    tests = [f"tests/contract/test_{suite}.py::{test}[{adapter}]" for suite, (adapter, chosen) in PART.items()
             for test in chosen]
    done = python({**env, "MODELYARD_REQUIRE": "mongo,kafka,azure,registry"}, "-m", "pytest", "-n", "2",
                  f"--junitxml={tmp_path}/report.xml", *tests)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(tmp_path / "report.xml") == {adapter: set(chosen) for adapter, chosen in PART.values()}
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if "testcontainers" in line)
    assert {name: IMAGES[name] in line and "s to start" in line for name, line in told.items() if name in IMAGES} \
        == dict.fromkeys(IMAGES, True)
    assert env["DOCKER_HOST"].removeprefix("unix://") in told["docker"]


def test_a_session_that_fails_leaves_nothing(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(textwrap.dedent("""
        from tests.backends import server

        def test_one():
            assert server("registry") is None

        def test_two():
            assert server("registry").startswith("oci://127.0.0.1:")
            raise KeyboardInterrupt
        """))
    done = python(env, "-m", "pytest", "-p", "tests.conftest", "--rootdir", str(ROOT), str(tmp_path / "test_it.py"))
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout + done.stderr
    assert "1 failed" in done.stdout


def test_what_a_killed_session_left_the_next_clears_away_and_another_that_lives_keeps_its_own(
        env: dict[str, str], engine: Docker) -> None:
    killed = python(env, "-c", OPENED + "import os; print(c.url('registry'), flush=True); os.kill(os.getpid(), 9)")
    assert killed.stdout.startswith("oci://")
    assert len(left(engine)[0]) == 1
    lives = subprocess.Popen([sys.executable, "-c", OPENED + "print(c.url('mongo'), flush=True); input(); "
                              "c.close_session()"], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
    with lives:
        assert lives.stdout and lives.stdout.readline().startswith("mongodb://")
        assert len(left(engine)[0]) == 1, "the killed one's is gone"
        other = python(env, "-c", OPENED + "print(c.url('registry')); c.close_session()")
        assert other.stdout.startswith("oci://")
        assert len(left(engine)[0]) == 1, "the living one's is not"
        lives.communicate("\n", timeout=60)


@pytest.mark.parametrize(("change", "first", "said"), [
    ({"MODELYARD_TEST_CONTAINERS": "0"}, "", ""),
    ({}, "c.IMAGES['registry'] = '127.0.0.1:1/none:1'; ", "127.0.0.1:1/none:1 could not be had"),
    ({"MODELYARD_TEST_CONTAINERS": "1", "DOCKER_HOST": "unix:///nowhere.sock"}, "", "no Docker engine answers"),
    ({"MODELYARD_TEST_CONTAINERS": "1", "DOCKER_HOST": "tcp://127.0.0.1:1"}, "", "no Docker engine answers"),
], ids=["off", "no-image", "no-engine", "no-engine-at-a-port"])
def test_without_one_it_says_why(env: dict[str, str], change: dict[str, Any], first: str, said: str) -> None:
    done = python(env | change, "-c", OPENED + first + "print(c.url('registry')); print(c.told('registry')); "
                  "c.close_session()")
    url, told = done.stdout.splitlines()
    assert url == "None"
    assert said in told if said else told == ""
