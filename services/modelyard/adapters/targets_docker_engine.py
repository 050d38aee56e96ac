"""A Docker Engine, as far as we need one: containers, their output, and images. Blocking: call from a thread.

Errors are ours at this door: Unavailable (with what to do) when the engine does not answer or refuses us, NotFound for
what it has not, Invalid for what it will never do.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import docker
import requests
from docker.errors import APIError, DockerException
from docker.types import LogConfig, Mount

from ..core.errors import Invalid, ModelyardError, NotFound, Unavailable

SOCKET = "/var/run/docker.sock"
LABEL = "dev.modelyard."
TIMEOUT_S, LOAD_S = 30, 600
"""How long the engine may be silent; unpacking what it was sent takes as long as that takes."""
PIDS = 1024
TMP = "rw,nosuid,nodev,mode=1777,size=256m"
LOG = {"max-size": "4m", "max-file": "2"}
SOMETHING_IN_IT = 1 << 20
"""Bytes of one file that is read out of an image."""


@dataclass(frozen=True)
class Plan:
    """A container to start. ``folders``: path inside → path on this machine, writable."""

    name: str
    image: str
    entry: Sequence[str]
    command: Sequence[str]
    env: Mapping[str, str]
    labels: Mapping[str, str]
    folders: Mapping[str, str]
    user: str
    network: str = "bridge"
    cpu: float | None = None
    memory: int | None = None
    gpu: int = 0


@dataclass(frozen=True)
class State:
    """``code`` is that of the end, when it is not ``running``. ``leaving``: somebody removes it."""

    running: bool
    pid: int | None = None
    code: int = 0
    out_of_memory: bool = False
    leaving: bool = False


class Engine:
    """The engine at ``docker://`` (``DOCKER_HOST``, else the usual socket), ``docker:///PATH/docker.sock`` or
    ``docker://127.0.0.1:PORT``. Invalid for one on another machine: containers share folders with us."""

    def __init__(self, url: str) -> None:
        self.host = host_of(url)
        self._clients: dict[int, docker.APIClient] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Unavailable, naming what to do, when it does not answer; Invalid when it is none for us."""
        with self._door("the engine cannot be asked"):
            about = self._api.info()
        if about.get("OSType") != "linux":
            raise Invalid(f"the engine at {self.host} runs {about.get('OSType')} containers, and ours are for Linux")
        if any("rootless" in option for option in about.get("SecurityOptions") or ()):
            raise Invalid(f"the engine at {self.host} is rootless: its containers cannot share files with this user; "
                          "use an engine of the system, or the local target")

    def start(self, plan: Plan) -> str:
        """The id of a container that runs: nothing of the machine but its folders, no rights, no way to get any.
        Repeating is fine: what an earlier try left under this name goes."""
        with self._door(f"the container {plan.name} cannot be started"):
            try:
                made = self._create(plan)
            except APIError as exc:
                if exc.status_code != 409:
                    raise
                self.remove(plan.name)
                made = self._create(plan)
            try:
                self._api.start(made["Id"])
            except BaseException:
                self.remove(made["Id"])
                raise
            return str(made["Id"])

    def _create(self, plan: Plan) -> dict[str, Any]:
        made: dict[str, Any] = self._api.create_container(
            plan.image, list(plan.command), name=plan.name, environment=dict(plan.env), entrypoint=list(plan.entry),
            user=plan.user, host_config=self._limits(plan),
            labels={f"{LABEL}{name}": value for name, value in plan.labels.items()})
        return made

    def _limits(self, plan: Plan) -> Any:
        gpus = [docker.types.DeviceRequest(count=plan.gpu, capabilities=[["gpu"]])] if plan.gpu else None
        return self._api.create_host_config(
            read_only=True, tmpfs={"/tmp": TMP}, cap_drop=["ALL"], security_opt=["no-new-privileges:true"],
            mounts=[Mount(inside, here, "bind") for inside, here in plan.folders.items()], network_mode=plan.network,
            nano_cpus=int(plan.cpu * 1e9) if plan.cpu else None, mem_limit=plan.memory, memswap_limit=plan.memory,
            pids_limit=PIDS, userns_mode="host", device_requests=gpus, restart_policy={"Name": "no"},
            log_config=LogConfig(type="json-file", config=LOG))

    def state(self, container: str) -> State | None:
        """None when there is no such container any more."""
        try:
            with self._door("a container cannot be looked at"):
                found = self._api.inspect_container(container)
        except NotFound:
            return None
        now = found["State"]
        return State(now["Running"], now["Pid"] or None, now["ExitCode"], now["OOMKilled"],
                     now["Status"] in ("removing", "dead"))

    def follow(self, container: str, since: int = 0) -> Iterator[bytes]:
        """Its output until it ends or the engine does; errors end it quietly, for ``state`` tells more."""
        with contextlib.suppress(ModelyardError), self._door("a container's output cannot be read"):
            yield from self._api.logs(container, stream=True, follow=True, since=since or None)

    def signal(self, container: str, name: str) -> None:
        """One that has ended already is no error."""
        with contextlib.suppress(NotFound, Invalid), self._door("a container cannot be told to end"):
            self._api.kill(container, name)

    def remove(self, container: str) -> None:
        """At once, running or not; one that is gone already is no error."""
        with contextlib.suppress(NotFound), self._door("a container cannot be removed"):
            try:
                self._api.remove_container(container, force=True, v=True)
            except APIError as exc:
                if exc.status_code != 409:  # somebody else is removing it
                    raise

    def containers(self, labels: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
        """(id, labels) of all that carry these labels, running or not."""
        wanted = [f"{LABEL}{name}={value}" for name, value in labels.items()]
        with self._door("containers cannot be listed"):
            found = self._api.containers(all=True, filters={"label": wanted})
        return [(one["Id"], one["Labels"]) for one in found]

    # -- images ------------------------------------------------------------------------------------------------------

    def image(self, reference: str) -> dict[str, Any] | None:
        """What the engine knows of an image, by id or name; None when it has it not."""
        try:
            with self._door("an image cannot be looked at"):
                found: dict[str, Any] = self._api.inspect_image(reference)
        except NotFound:
            return None
        return found

    def layers(self) -> Iterator[list[str]]:
        """Of every image that is here, the digests of its layers, unpacked."""
        with self._door("images cannot be listed"):
            ids = [image["Id"] for image in self._api.images()]
        for id_ in ids:
            yield (self.image(id_) or {}).get("RootFS", {}).get("Layers") or []

    def pull(self, reference: str) -> None:
        """``HOST/REPO@sha256:…`` out of a registry, with the credentials of Docker's own configuration."""
        with self._door(f"{reference} cannot be pulled"):
            for line in self._api.pull(reference, stream=True, decode=True):
                if "error" in line:
                    raise Unavailable(f"{reference} cannot be pulled: {line['error']}")

    def load(self, archive: Iterable[bytes]) -> None:
        """Images out of a docker-archive, as its bytes come."""
        with self._door("the image cannot be loaded"):
            for line in self._patient(LOAD_S).load_image(archive, quiet=True):
                if "error" in line:
                    raise Invalid(f"the engine does not take the image: {line['error']}")

    def tag(self, image: str, repository: str, tag: str) -> None:
        with self._door("an image cannot be named"):
            self._api.tag(image, repository, tag)

    def tags(self, repository: str) -> list[str]:
        """What is tagged there, as ``repository:tag``."""
        with self._door("images cannot be listed"):
            found = self._api.images(repository)
        return [tag for image in found for tag in image["RepoTags"] or () if tag.startswith(f"{repository}:")]

    def untag(self, name: str) -> None:
        """The image goes when nothing else names or runs it."""
        with contextlib.suppress(NotFound, Invalid), self._door("an image cannot be removed"):
            self._api.remove_image(name)

    def read(self, image: str, path: str) -> bytes | None:
        """A small file out of an image; None when it holds no such file."""
        with contextlib.suppress(NotFound), self._door(f"{path} cannot be read out of the image"):
            made = self._api.create_container(image, ["-"])["Id"]
            try:
                stream, _ = self._api.get_archive(made, path)
                packed = io.BytesIO(b"".join(stream))
            finally:
                self.remove(made)
            with tarfile.open(fileobj=packed) as archive:
                member = archive.next()
                file = archive.extractfile(member) if member is not None and member.isreg() else None
                return None if file is None else file.read(SOMETHING_IN_IT)
        return None

    # -- the way to it -----------------------------------------------------------------------------------------------

    @property
    def _api(self) -> docker.APIClient:
        return self._patient(TIMEOUT_S)

    def _patient(self, seconds: int) -> docker.APIClient:
        with self._lock:
            if seconds not in self._clients:  # making one asks the engine for its version: not before it is needed
                self._clients[seconds] = docker.APIClient(self.host, version="auto", timeout=seconds, num_pools=64)
            return self._clients[seconds]

    @contextlib.contextmanager
    def _door(self, what: str) -> Iterator[None]:
        try:
            yield
        except APIError as exc:
            raise _ours(exc, what) from exc
        except (DockerException, requests.RequestException, OSError) as exc:
            raise Unavailable(self._fix(str(exc))) from exc

    def _fix(self, why: str) -> str:
        """What a person does about an engine that does not answer."""
        place = self.host.removeprefix("unix://")
        if "Permission denied" in why:
            return (f"the Docker Engine at {place} refuses this user; add the user to the group that owns the socket "
                    "(usermod -aG docker USER, then log in again), or run as root")
        if re.search(r"No such file|refused|FileNotFound|Not supported URL|Connection aborted|timed out", why):
            return (f"no Docker Engine answers at {place}; start it (systemctl start docker), or name another one's "
                    "socket in the target's URL: docker:///PATH/docker.sock")
        return f"the Docker Engine at {place} cannot be used: {why[-300:]}"


def _ours(exc: APIError, what: str) -> ModelyardError:
    said = str(exc.explanation or exc)[:500]
    if exc.status_code == 404:
        return NotFound(f"{what}: {said}")
    if 400 <= (exc.status_code or 500) < 500:
        return Invalid(f"{what}: {said}")
    return Unavailable(f"{what}: {said}")


def host_of(url: str) -> str:
    """``docker:///run/x.sock`` → ``unix:///run/x.sock``."""
    parts = urlsplit(url)
    if parts.path not in ("", "/") and not parts.netloc:
        return f"unix://{parts.path}"
    host = f"tcp://{parts.netloc}" if parts.netloc else os.environ.get("DOCKER_HOST") or f"unix://{SOCKET}"
    if not host.startswith("unix://") and urlsplit(host).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise Invalid(f"the engine at {host} is on another machine, and containers share folders with this one; name a "
                      "socket of this machine: docker:///PATH/docker.sock")
    return host
