"""Builders of the Dockerfiles that users bring: what every one of them promises, tried on a real engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from modelyard.adapters import urls
from modelyard.core.archives import pack
from modelyard.core.errors import BuildFailed, NotFound, Unavailable
from modelyard.ports.builders import Ask, DockerfileBuilder
from tests import contained
from tests.backends import backends, url_of

pytestmark = pytest.mark.slow  # containers are started
TAG = "modelyard-test-base:1"
SLEEP = f"FROM {TAG}\nRUN echo begun && sleep 600\n"


class Bench:
    """A builder and its engine; ``build`` of the text of a Dockerfile, its lines in ``lines``."""

    def __init__(self, url: str, engine: docker.DockerClient, folder: Path) -> None:
        self.url, self.engine, self.folder = url, engine, folder
        self.lines: list[str] = []
        self.heard = asyncio.Event()
        """Set by the line ``begun``."""

    async def open(self, **options: Any) -> DockerfileBuilder:
        more = "".join(f"&{name}={value}" for name, value in options.items())
        builder = await urls.open_builder({"local": "process://", "docker": self.url + more}, self.folder)
        assert builder is not None
        return builder

    async def told(self, line: str) -> None:
        self.lines.append(line)
        if line == "begun":
            self.heard.set()

    async def context(self, text: str, **files: str) -> Ask:
        return await asyncio.to_thread(self._context, text, **files)

    def _context(self, text: str, **files: str) -> Ask:
        place = self.folder / hashlib.sha256(json.dumps([text, files]).encode()).hexdigest()[:12]
        place.mkdir(exist_ok=True)
        for name, content in {"Dockerfile": text, **files}.items():
            (place / name).write_text(content)
        place.with_suffix(".tar").write_bytes(b"".join(pack(place)))
        return Ask(place.with_suffix(".tar"), f"default.{self.folder.name}")

    async def build(self, text: str, /, builder: DockerfileBuilder | None = None, **files: str) -> str:
        with contextlib.ExitStack() as stack:
            if builder is None:
                builder = await self.open()
                stack.callback(lambda opened=builder: asyncio.ensure_future(opened.close()))
            return await builder.build(await self.context(text, **files), self.told)

    def containers(self) -> list[Any]:
        return list(self.engine.containers.list(all=True, filters={"ancestor": TAG}, ignore_removed=True))


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, docker.DockerClient]]:
    """Engines that have Debian as ``TAG``, by URL."""
    clients: dict[str, docker.DockerClient] = {}
    yield clients
    for client in clients.values():
        client.close()


@pytest.fixture(params=backends("builders"))
async def bench(request: pytest.FixtureRequest, tmp_path: Path,
                debian: dict[str, docker.DockerClient]) -> AsyncIterator[Bench]:
    url = url_of(request.param, tmp_path)
    socket = url.partition("?")[0].removeprefix("docker://")

    def ready() -> docker.DockerClient:
        if socket not in debian:
            client = docker.DockerClient(f"unix://{socket}")
            client.images.load(contained.archive(TAG))
            debian[socket] = client
        return debian[socket]

    bench = Bench(url, await asyncio.to_thread(ready), tmp_path)
    yield bench
    for tag in await asyncio.to_thread(lambda: [t for i in bench.engine.images.list() for t in i.tags]):
        if tag.startswith("modelyard-dockerfiles-") and tag.endswith(f":default.{tmp_path.name}"):
            await asyncio.to_thread(bench.engine.images.remove, tag)


async def test_a_dockerfile_becomes_an_image_that_can_be_carried_away(bench: Bench) -> None:
    builder = await bench.open()
    text = f"FROM {TAG}\nCOPY note /etc/note\nENV COLOUR=red\nRUN echo $COLOUR >> /etc/note\n"
    ask = await bench.context(text, note="hello\n")
    first = await builder.build(ask, bench.told)
    assert any("RUN echo $COLOUR" in line for line in bench.lines), bench.lines
    again = await builder.build(ask, bench.told)
    assert again == first, "the builder's own cache of steps"
    await builder.save(first, bench.folder / "image.tar")
    with tarfile.open(bench.folder / "image.tar") as archive:
        (about,) = json.loads(archive.extractfile("manifest.json").read())  # type: ignore[union-attr]
        config = json.loads(archive.extractfile(about["Config"]).read())  # type: ignore[union-attr]
        with tarfile.open(fileobj=archive.extractfile(about["Layers"][-1])) as layer:
            assert layer.extractfile("etc/note").read() == b"hello\nred\n"  # type: ignore[union-attr]
    assert "COLOUR=red" in config["config"]["Env"] and len(config["rootfs"]["diff_ids"]) == len(about["Layers"]) == 3
    assert bench.containers() == []
    with pytest.raises(NotFound):
        await builder.save(f"sha256:{'0' * 64}", bench.folder / "nothing.tar")
    await builder.close()
    await builder.close()


async def test_the_last_image_of_a_name_is_kept_and_the_one_before_is_not(bench: Bench) -> None:
    first = await bench.build(f"FROM {TAG}\nENV A=1\n")
    second = await bench.build(f"FROM {TAG}\nENV A=2\n")
    there = {image.id for image in bench.engine.images.list(all=True)}
    assert second in there and first not in there


async def test_inputs_are_what_decides_beside_the_context(bench: Bench) -> None:
    builder, other = await bench.open(), await bench.open(build_memory_mib=100)
    before = await builder.inputs([TAG])
    assert before and before == await builder.inputs([TAG]) == await other.inputs([TAG])
    assert await builder.inputs([]) != before and await builder.inputs([TAG, "127.0.0.1:1/none:1"]) is None
    bench.engine.api.tag(TAG, "modelyard-test-same", "1")
    try:
        assert await builder.inputs(["modelyard-test-same:1"])
    finally:
        bench.engine.images.remove("modelyard-test-same:1")
    assert await builder.inputs(["modelyard-test-same:1"]) is None


@pytest.mark.parametrize(("text", "told"), [
    (f"FROM {TAG}\nRUN echo begun && exit 3\n", "returned a non-zero code: 3"),
    (f"FROM {TAG}\nCOPY absent /\n", "absent"),
    (f"FROM {TAG}\nFLY away\n", "unknown instruction: FLY"),
    ("FROM 127.0.0.1:1/none:1\n", "127.0.0.1:1"),
])
async def test_what_cannot_be_built_is_told_in_the_builders_words(bench: Bench, text: str, told: str) -> None:
    with pytest.raises(BuildFailed) as caught:
        await bench.build(text)
    assert told in caught.value.message
    assert bench.containers() == []


async def test_a_step_reaches_no_network_and_has_its_share_only(bench: Bench) -> None:
    with pytest.raises(BuildFailed) as caught:
        await bench.build(f"FROM {TAG}\nRUN ls /sys/class/net && cat /proc/1/environ && exit 4\n")
    assert "dockerfiles=none" in caught.value.message, "why a download failed"
    assert "lo" in bench.lines and not any("eth" in line for line in bench.lines)
    small = await bench.open(build_memory_mib=64)
    with pytest.raises(BuildFailed) as caught:
        await bench.build(f"FROM {TAG}\nRUN python3 -c 'print(len(bytearray(200 << 20)))'\n", builder=small)
    assert "64 MiB" in caught.value.message and "build_memory_mib" in caught.value.message
    await small.close()


async def test_a_cancelled_build_leaves_nothing_that_runs(bench: Bench) -> None:
    task = asyncio.create_task(bench.build(SLEEP))
    async with asyncio.timeout(60):
        await bench.heard.wait()
    assert len(bench.containers()) == 1, "its lines come while it runs"
    task.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await task
        while bench.containers():
            await asyncio.sleep(0.1)


async def test_a_build_that_takes_too_long_is_ended(bench: Bench) -> None:
    hasty = await bench.open(build_s=3)
    async with asyncio.timeout(60):
        with pytest.raises(BuildFailed) as caught:
            await bench.build(SLEEP, builder=hasty)
        assert "longer than 3 s" in caught.value.message
        while bench.containers():
            await asyncio.sleep(0.1)
    await hasty.close()


async def test_an_engine_that_is_away(tmp_path: Path) -> None:
    builder = await urls.open_builder({"docker": f"docker://{tmp_path}/no.sock?dockerfiles=none"}, tmp_path)
    assert builder is not None
    for call in (builder.check(), builder.inputs(["x"]), builder.save("x", tmp_path / "x")):
        with pytest.raises(Unavailable) as caught:
            await call
        assert "start it" in caught.value.message
    await builder.close()
