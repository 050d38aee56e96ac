"""DockerfileBuilder ``docker://…?dockerfiles=NETWORK``: the classic builder of a Docker Engine.

BuildKit is not asked: it needs a session that answers it, and its containers are not limited by what a request says.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import docker.auth
import requests
from docker.errors import create_api_error_from_http_exception
from docker.types import CancellableStream

from ..core.errors import BuildFailed, Invalid, ModelyardError, NotFound, Unavailable
from ..ports.builders import Ask, DockerfileBuilder, Told
from .folder import in_thread
from .targets_docker_engine import LABEL, TIMEOUT_S, Engine

PIECE = 1 << 20
PARALLEL = 8
PERIOD_US = 100_000
KILLED = re.compile(r"returned a non-zero code: 137\b")
NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}\Z")


@dataclass(frozen=True)
class Limits:
    """What a step may have: which of the engine's networks (``none``: it reaches nobody), memory, processors; and how
    long all of them may take."""

    network: str
    memory_mib: float
    cpus: float
    seconds: float


class DockerBuilder(DockerfileBuilder):
    """``yard`` tells this folder's builds from those of other yards in the same engine."""

    def __init__(self, engine: BuildEngine, limits: Limits, yard: str) -> None:
        self._engine, self._limits, self._yard = engine, limits, yard
        self._threads = ThreadPoolExecutor(PARALLEL, "dockerfile")

    @classmethod
    async def open(cls, url: str, data: Path, dockerfiles: str, build_memory_mib: float = 4096, build_cpus: float = 2,
                   build_s: float = 1800) -> Self:
        """``dockerfiles``: the network of steps."""
        if not NETWORK.match(dockerfiles):
            raise Invalid(f"dockerfiles is none, or the name of one of the engine's networks, not '{dockerfiles[:40]}'",
                          field="targets")
        yard = hashlib.sha256(os.fsencode(data)).hexdigest()[:12]
        engine = await in_thread(BuildEngine, url)
        return cls(engine, Limits(dockerfiles, build_memory_mib, build_cpus, build_s), yard)

    async def check(self) -> None:
        await in_thread(self._engine.check)

    async def close(self) -> None:
        self._threads.shutdown(wait=False)

    async def inputs(self, images: Sequence[str]) -> str | None:
        found = await asyncio.gather(*(in_thread(self._engine.image, name) for name in images))
        if not all(found):
            return None
        ids = {name: about["Id"] for name, about in zip(images, found, strict=True) if about}
        return json.dumps({"network": self._limits.network, "images": ids}, sort_keys=True)

    async def build(self, ask: Ask, told: Told) -> str:
        lines: asyncio.Queue[str | None] = asyncio.Queue()
        loop, stop = asyncio.get_running_loop(), Stop()

        def run() -> str:
            try:
                return self._engine.build(ask.context, self._params(ask), self._limits.seconds, stop,
                                          lambda line: loop.call_soon_threadsafe(lines.put_nowait, line))
            finally:
                loop.call_soon_threadsafe(lines.put_nowait, None)

        work = loop.run_in_executor(self._threads, run)
        try:
            async with asyncio.timeout(self._limits.seconds):
                while (line := await lines.get()) is not None:
                    await told(line)
        except TimeoutError as exc:
            raise BuildFailed(f"the Dockerfile's build took longer than {self._limits.seconds:g} s, which is what it "
                              "may take (build_s in the URL of the docker target)") from exc
        finally:
            await in_thread(stop.now)
            await _over(work)
        return await self._kept(ask, self._result(work))

    def _params(self, ask: Ask) -> dict[str, Any]:
        memory = int(self._limits.memory_mib * 2**20)
        labels = {f"{LABEL}yard": self._yard, f"{LABEL}dockerfile-of": ask.name}
        return {"rm": True, "forcerm": True, "networkmode": self._limits.network, "labels": json.dumps(labels),
                "memory": memory, "memswap": memory, "cpuperiod": PERIOD_US,
                "cpuquota": int(self._limits.cpus * PERIOD_US)}

    def _result(self, work: asyncio.Future[str]) -> str:
        try:
            return work.result()
        except Invalid as exc:
            raise BuildFailed(exc.message) from exc
        except BuildFailed as exc:
            hint = ""
            if KILLED.search(exc.message):
                hint = f"; a step may use {self._limits.memory_mib:g} MiB (build_memory_mib in the docker target's URL)"
            elif self._limits.network == "none" and "non-zero code" in exc.message:
                hint = "; steps reach no network here (dockerfiles=none in the docker target's URL)"
            raise BuildFailed(exc.message + hint) from exc

    async def _kept(self, ask: Ask, image: str) -> str:
        """Named, so that its steps are found again; what had the name before goes."""
        repository = f"modelyard-dockerfiles-{self._yard}"
        tag = re.sub(r"[^A-Za-z0-9_.\-]", "-", ask.name)[-128:].lstrip(".-")
        before = await in_thread(self._engine.image, f"{repository}:{tag}")
        await in_thread(self._engine.tag, image, repository, tag)
        if before and before["Id"] != image:
            with contextlib.suppress(ModelyardError):
                await in_thread(self._engine.untag, before["Id"])
        return image

    async def save(self, image: str, to: Path) -> None:
        await in_thread(self._engine.save, image, to)


async def _over(work: asyncio.Future[str]) -> None:
    """Returns when the thread has ended, however often we are cancelled meanwhile."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({work})
    if not work.cancelled():
        work.exception()


class Stop:
    """Ends a build from outside its thread: the engine kills the step that runs when nobody listens any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._answer: requests.Response | None = None

    @property
    def stopped(self) -> bool:
        return self._stopped

    def listen(self, answer: requests.Response) -> None:
        with self._lock:
            self._answer = answer
        if self._stopped:
            self.now()

    def now(self) -> None:
        with self._lock:
            self._stopped, answer, self._answer = True, self._answer, None
        if answer is not None:
            with contextlib.suppress(OSError, AttributeError):  # it had come to its end
                CancellableStream(None, answer).close()


class BuildEngine(Engine):
    """An engine's builder. Blocking."""

    def build(self, context: Path, params: dict[str, Any], seconds: float, stop: Stop,
              told: Callable[[str], Any]) -> str:
        """The id of the image. ``seconds``: how long the engine may be silent."""
        with self._door("the Dockerfile cannot be built"), context.open("rb") as file:
            api = self._patient(TIMEOUT_S)
            headers = {"Content-Type": "application/x-tar"}
            if known := docker.auth.load_config().get_all_credentials():  # for FROM; no step sees them
                headers["X-Registry-Config"] = docker.auth.encode_header(known)
            answer = api.post(f"{api.base_url}/v{api.api_version}/build", params=params, data=_pieces(file, stop),
                              headers=headers, stream=True, timeout=(TIMEOUT_S, seconds))
            try:
                answer.raise_for_status()
                stop.listen(answer)
                return _followed(answer, told)
            except requests.HTTPError as exc:
                create_api_error_from_http_exception(exc)
                raise
            finally:
                answer.close()

    def save(self, image: str, to: Path) -> None:
        if self.image(image) is None:
            raise NotFound(f"the engine has no image {image}")
        with self._door("an image cannot be read out"), to.open("xb") as out:
            for chunk in self._api.get_image(image, chunk_size=PIECE):
                out.write(chunk)


def _pieces(file: Any, stop: Stop) -> Iterator[bytes]:
    while not stop.stopped and (piece := file.read(PIECE)):
        yield piece


def _followed(answer: requests.Response, told: Callable[[str], Any]) -> str:
    """Tells the lines of a build, and returns what it made. BuildFailed with what the engine says went wrong."""
    image, held = "", ""
    for raw in answer.iter_lines(PIECE):
        said = json.loads(raw) if raw.strip() else {}
        if "error" in said:
            raise _failed(str(said["error"]))
        if "stream" in said:
            *whole, held = (held + said["stream"]).split("\n")
            for line in whole:
                told(line)
        elif "status" in said and not said.get("progressDetail"):
            told(" ".join(str(said[word]) for word in ("id", "status") if word in said))
        image = str((said.get("aux") or {}).get("ID") or image)
    if not image:
        raise Unavailable("the engine's build ended without an image and without a reason")
    return image


def _failed(why: str) -> ModelyardError:
    if "no space left on device" in why:
        return Unavailable(f"the engine's disk is full: {why[:500]}; docker image prune frees what nothing needs")
    return BuildFailed(f"the Dockerfile cannot be built: {why[:2000]}")
