"""What a docker target says when there is no engine, or not one for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.adapters import urls
from modelyard.adapters.targets_docker_engine import Engine, host_of
from modelyard.adapters.targets_docker_images import _member
from modelyard.core.errors import Invalid, Unavailable


@pytest.mark.parametrize(("url", "host"), [
    ("docker:///run/x/docker.sock", "unix:///run/x/docker.sock"), ("docker://127.0.0.1:2375", "tcp://127.0.0.1:2375"),
    ("docker://", "unix:///var/run/docker.sock"), ("docker:///", "unix:///var/run/docker.sock")])
def test_a_url_names_an_engine(url: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    assert host_of(url) == host


def test_no_place_means_the_one_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/user/1000/docker.sock")
    assert host_of("docker://") == "unix:///run/user/1000/docker.sock"
    assert host_of("docker:///run/x.sock") == "unix:///run/x.sock", "what is named goes first"


@pytest.mark.parametrize("url", ["docker://engine.example:2376", "docker://10.0.0.7:2375", "docker://"])
def test_an_engine_of_another_machine_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://engine.example:2376")
    with pytest.raises(Invalid, match=r"another machine.*docker:///PATH/docker\.sock"):
        host_of(url)


async def test_no_engine_is_said_with_the_fix(tmp_path: Path) -> None:
    images = await urls.open_images(f"oci-layout://{tmp_path}/images")
    target = await urls.open_target("docker", f"docker://{tmp_path}/no.sock", images=images, data=tmp_path / "data")
    with pytest.raises(Unavailable, match=r"no Docker Engine answers at .*/no\.sock; start it"):
        await target.check()
    assert (await target.observe("default", "iris")).state == "absent"
    await target.close()


async def test_what_happens_at_exit_is_one_of_two(tmp_path: Path) -> None:
    images = await urls.open_images(f"oci-layout://{tmp_path}/images")
    with pytest.raises(Invalid, match=r"targets\.boxes: at_exit is keep or end, not 'leave'"):
        await urls.open_target("boxes", "docker://?at_exit=leave", images=images, data=tmp_path)


def test_a_port_where_nobody_listens_is_said_with_the_fix() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="no Docker Engine answers"):
            Engine(f"docker://127.0.0.1:{free.getsockname()[1]}").check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not use a socket")
def test_an_engine_that_refuses_us_is_said_with_the_fix(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/tmp/{tmp_path.name}.sock")
        try:
            os.chmod(server.getsockname(), 0o600)
            server.listen()
            code = ("import os; from modelyard.adapters.targets_docker_engine import Engine\n"
                    "import docker, requests\n"
                    f"engine = Engine('docker://{server.getsockname()}'); os.seteuid(65534)\n"
                    "try: engine.check()\n"
                    "except Exception as exc: print(type(exc).__name__, exc)\n")
            said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
        finally:
            os.unlink(server.getsockname())
    assert "Unavailable" in said and "refuses this user; add the user to the group" in said


def test_a_member_is_as_long_as_it_was_said_to_be() -> None:
    whole = b"".join(_member("layer.tar", 5, iter([b"he", b"llo"])))
    assert len(whole) == 1024 and whole[512:] == b"hello" + bytes(507)
    with pytest.raises(Invalid, match="has 2 bytes where the manifest says 5"):
        list(_member("layer.tar", 5, iter([b"he"])))
