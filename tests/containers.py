"""The third choice for a test's real servers, after given ones and native ones: containers of public images, started by
testcontainers in the Docker engine that answers.

``MODELYARD_TEST_CONTAINERS``: ``auto`` (or not set) takes them where there is no other server; ``1`` takes them before
native ones; ``0`` never. A server is started when a test asks for it first, is shared by all workers of the session,
and goes with the session. One that died without that is cleared away after by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.stack.server import ROOT, began
from tests.containers_servers import IMAGES, NotServing, start

SWITCH = "MODELYARD_TEST_CONTAINERS"
SESSION = "MODELYARD_TEST_CONTAINERS_SESSION"
"""Where this session notes what it started: workers have it from who started them."""
LABEL = "dev.modelyard.test-session"
PREFIX = "modelyard-containers-"
PROMPT_S = 5
SLOW_S = 120


def mode() -> str:
    """``auto``, ``1`` or ``0``."""
    said = os.environ.get(SWITCH) or "auto"
    if said not in ("auto", "1", "0"):
        raise ValueError(f"{SWITCH} is auto, 1 or 0, not '{said}'")
    return said


# -- the session ------------------------------------------------------------------------------------------------------


def open_session() -> None:
    """In the process that the user started, not in its workers. Starts nothing."""
    mode()
    os.environ[SESSION] = tempfile.mkdtemp(prefix=PREFIX)
    (Path(os.environ[SESSION]) / "owner").write_text(f"{os.getpid()} {began(os.getpid())}")


def close_session() -> None:
    """Removes every container of this session, with its volumes; repeating is fine."""
    folder = os.environ.pop(SESSION, "")
    if folder and (Path(folder) / "used").exists():
        with _client(SLOW_S) as client:
            _remove(client, lambda whose: whose == folder)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(client: Any) -> None:
    """What sessions of this machine left that ended without a word: containers first, then their notes."""
    _remove(client, lambda whose: not _lives(Path(whose)))
    for owner in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/owner"):
        if not _lives(owner.parent):
            shutil.rmtree(owner.parent, ignore_errors=True)


def _lives(session: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        pid, beginning = (session / "owner").read_text().split()
        return began(int(pid)) == beginning
    return False


def _remove(client: Any, mine: Callable[[str], bool]) -> None:
    import docker.errors

    for container in client.containers.list(all=True, filters={"label": LABEL}):
        host, _, whose = container.labels[LABEL].partition(":")
        if host == socket.gethostname() and mine(whose):
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(v=True, force=True)


# -- what a test asks -------------------------------------------------------------------------------------------------


@functools.cache
def missing() -> str:
    """Why no engine can be used; "" when one answers, here."""
    if mode() == "0":
        return f"{SWITCH}=0"
    try:
        import docker.errors

        with _client(PROMPT_S) as client:
            client.ping()
            host = client.api.base_url
    except ImportError as exc:
        return f"{exc.name} is not installed"
    except (docker.errors.DockerException, OSError) as exc:
        return f"no Docker engine answers: {exc}"[:200]
    if not address():
        return f"the engine at {host} is not this machine's: ports of its containers are not here"
    return ""


def address() -> str:
    """How Modelyard names the engine: ``docker://…``; "" when it is another machine's."""
    with _unchanged():
        from testcontainers.core.docker_client import get_docker_host

        at = urlsplit(get_docker_host() or "unix:///var/run/docker.sock")
    if at.scheme in ("unix", "http+unix"):
        return f"docker://{at.path}"
    return f"docker://{at.netloc}" if at.hostname in ("127.0.0.1", "localhost", "::1") else ""


def url(name: str) -> str | None:
    """Of a server in a container of this session, started now if it is not; None when there can be none."""
    if name not in (*IMAGES, "docker") or os.environ.get(SESSION) is None or missing():
        return None
    found = address() if name == "docker" else _note(name).get("url")
    return found or None


def told(name: str) -> str:
    """What became of a server, for the summary; "" when containers are no choice here."""
    if name not in (*IMAGES, "docker"):
        return ""
    if os.environ.get(SESSION) is None or missing():
        return f"no testcontainers: {missing()}" if mode() == "1" else ""
    if name == "docker":
        return f"testcontainers: the engine that answers, {address()}"
    with contextlib.suppress(OSError):
        note = json.loads(_path(name).read_text())
        return f"testcontainers, {IMAGES[name]} " + (f"({note['seconds']} s to start)" if note.get("url")
                                                     else f"could not be had: {note['reason']}")
    return f"testcontainers, {IMAGES[name]}: no test asked for it"


def _path(name: str) -> Path:
    return Path(os.environ[SESSION]) / f"{name}.json"


@functools.cache
def _note(name: str) -> dict[str, str]:
    """Where it is, or why it is not; whoever is first starts it while the others wait."""
    path = _path(name)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _write(path, _started(name))
        note: dict[str, str] = json.loads(path.read_text())
        return note


def _started(name: str) -> dict[str, str]:
    import docker.errors

    folder, since = Path(os.environ[SESSION]), time.monotonic()
    (folder / "used").touch()
    try:
        with _client(SLOW_S) as client:
            _sweep(client)
            _have(client, IMAGES[name])
        with _unchanged():
            found = start(name, {LABEL: f"{socket.gethostname()}:{folder}"})
    except (docker.errors.DockerException, NotServing, OSError) as exc:
        return {"reason": " ".join(str(exc).split())[-300:]}
    return {"url": found, "seconds": f"{time.monotonic() - since:.1f}"}


def _write(path: Path, note: dict[str, str]) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(note))
    draft.replace(path)


def _have(client: Any, image: str) -> None:
    """The engine has it, pulls it, or makes the one that is this project's own."""
    import docker.errors

    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        if image == IMAGES["azure"]:
            client.images.build(path=str(ROOT / "infra/compose/azurite"), tag=image, rm=True)
        else:
            client.images.pull(image)


@contextlib.contextmanager
def _client(seconds: int) -> Iterator[Any]:
    """docker-py's, for the engine that testcontainers works with."""
    with _unchanged():
        from testcontainers.core.docker_client import DockerClient

        client = DockerClient(timeout=seconds).client
    with contextlib.closing(client):
        yield client


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    """testcontainers sets DOCKER_HOST for the whole process: tests say themselves which engine they mean. Its reaper is
    a container more, whose image not everyone can pull; what it does is done here."""
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    before = os.environ.get("DOCKER_HOST")
    try:
        yield
    finally:
        os.environ.pop("DOCKER_HOST", None)
        if before is not None:
            os.environ["DOCKER_HOST"] = before
