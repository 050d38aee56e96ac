"""What an image costs beside what was aimed at: against a Dockerfile, in bytes, in memory, again and again.

    python tests/benchmarks/bench_images_goals.py [ROUNDS] [ROW …]
    rows: versions dockerfile size digests bill memory; none: all

``versions`` counts in a proxy before a registry what is sent. The peer of ``dockerfile`` is a Docker Engine's classic
builder at its best: everything but the model is an image of its own already (the same files, out of our exported
context), so that only the model is sent, copied and pushed. Both push to one registry on this machine, new weights each
time, in turns: the ratio says something on a busy machine as well. Memory is that of the processes of the image builder
and of the registry of models, beyond what they had before.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from infra.stack import debian
from infra.stack.docker import Docker
from infra.stack.registry import Registry
from modelyard import Client
from modelyard.core.version import __version__
from modelyard.image_builder import keys, provenance, sbom
from modelyard.image_builder.config import encode
from modelyard.image_builder.model import Image
from modelyard.image_builder.tarring import Layer
from tests import contained
from tests.benchmarks.bench_images import settled
from tests.e2e.yard import Yard
from tests.proxy import Proxy

SCORE = "def run(data):\n    return data\n"
NEEDS = ["scikit-learn", "onnxruntime"]
MODEL = 91_000_000
HUGE = 2 << 30
REBUILDS = 20
AT = "opt/modelyard/models/weights/1/weights.bin"


def row(what: str, found: str, goal: str) -> None:
    print(f"{what:58} {found:>22}   goal {goal}", flush=True)


@contextlib.contextmanager
def running(folder: Path, profile: str = "all-in-one", **env: str) -> Iterator[tuple[Yard, Client]]:
    folder.mkdir()
    (folder / "score.py").write_text(SCORE)
    known = {"XDG_CACHE_HOME": str(folder / "cache"),
             "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR") or str(Path.home() / ".cache" / "uv")}
    yard = Yard.start(profile, folder / "data", **known, **env)
    try:
        with Client(yard.url()) as client:
            yield yard, client
    finally:
        yard.stop()


def build(client: Client, folder: Path, size: int, **how: Any) -> tuple[float, float, Any]:
    """Seconds for the image, seconds for the model's registration before it, the image."""
    weights = folder / "weights.bin"
    weights.write_bytes(os.urandom(size))
    began = time.perf_counter()
    model = client.models.register("weights", weights, framework="custom")
    registered = time.perf_counter()
    image = client.images.build("bench", models=[model], score=folder / "score.py", requirements=NEEDS, **how).wait()
    return time.perf_counter() - registered, registered - began, image


# -- against a Dockerfile ---------------------------------------------------------------------------------------------


def _context(path: Path, weights: bytes) -> None:
    """The model alone, as `docker build` sends it."""
    with tarfile.open(path, "w") as archive:
        for name, data in (("Dockerfile", f"FROM environment:1\nCOPY weights.bin /{AT}\n".encode()),
                           ("weights.bin", weights)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _docker(api: Any, path: Path, name: str) -> float:
    began = time.perf_counter()
    with path.open("rb") as context:
        for line in api.build(fileobj=context, custom_context=True, tag=name, rm=True, decode=True):
            if "error" in line:
                raise RuntimeError(line["error"])
    for line in api.push(name, stream=True, decode=True):
        if "error" in line:
            raise RuntimeError(line["error"])
    return time.perf_counter() - began


def against_a_dockerfile(folder: Path, rounds: int) -> None:
    import docker

    if reason := Docker.missing() or Registry.missing() or debian.missing():
        print(f"against a Dockerfile: not here: {reason}")
        return
    with Registry(folder / "registry") as registry, Docker(folder / "engine") as engine, \
            running(folder / "yard", MODELYARD_IMAGES=f"oci://127.0.0.1:{registry.port}/ours") as (_, client):
        api = docker.APIClient(engine.docker_host, timeout=300)
        api.load_image(contained.archive("base:latest"))
        base = f"oci-layout://{debian.base()}:latest"
        _, _, first = build(client, folder / "yard", 1000, base=base)
        client.images.export(first, folder / "environment.tar")
        with (folder / "environment.tar").open("rb") as context:
            for line in api.build(fileobj=context, custom_context=True, tag="environment:1", rm=True, decode=True):
                if "error" in line:
                    raise RuntimeError(line["error"])
        target = f"127.0.0.1:{registry.port}/theirs/bench"
        ours, registering, theirs = [], [], []
        for n in range(rounds + 1):  # the first pushes what stays, on either side
            image_s, model_s, _ = build(client, folder / "yard", MODEL, base=base)
            _context(folder / "context.tar", os.urandom(MODEL))
            docker_s = _docker(api, folder / "context.tar", f"{target}:{n}")
            if n:
                ours, registering, theirs = [*ours, image_s], [*registering, model_s], [*theirs, docker_s]
        api.close()
    mine, his = statistics.median(ours), statistics.median(theirs)
    both = statistics.median([a + b for a, b in zip(ours, registering, strict=True)])
    row("new version of 91 MB: Docker's build and push", f"{his:.2f} s", "-")
    row("the same, ours, of a registered model", f"{mine:.2f} s", "-")
    row("times faster", f"{his / mine:.1f} x", ">= 4 x")
    row("times faster, registering the model counted in", f"{his / both:.1f} x", "-")


# -- a first image, and new versions of its model ----------------------------------------------------------------------


def versions(folder: Path, rounds: int) -> None:
    """Seconds until the image is ready, and the bytes sent for it, also of what is said of it."""
    if reason := Registry.missing():
        print(f"new versions: not here: {reason}")
        return
    with Registry(folder / "registry") as registry, Proxy(registry.port) as wire, \
            running(folder / "yard", MODELYARD_IMAGES=f"oci://127.0.0.1:{wire.port}/bench") as (_, client):
        first_s, _, _ = build(client, folder / "yard", 1000)
        row(f"first build and push, {' + '.join(NEEDS)} + grpcio", f"{first_s:.2f} s", "<= 7 s")
        for size_, seconds in ((1_000_000, 0.3), (MODEL, 1.0)):
            build(client, folder / "yard", size_)
            before = settled(lambda: wire.sent)
            took = [build(client, folder / "yard", size_)[0] for _ in range(rounds)]
            beside = (settled(lambda: wire.sent) - before) / rounds - size_
            row(f"new version of {size_ / 1e6:.0f} MB, built and pushed", f"{statistics.median(took):.2f} s",
                f"<= {seconds} s")
            row("the same, sent", f"model + {beside / 1e3:.1f} kB", "<= model + 40 kB")


# -- the other rows ---------------------------------------------------------------------------------------------------


def size(folder: Path, rounds: int) -> None:
    with running(folder / "yard") as (_, client):
        _, _, image = build(client, folder / "yard", 1000)
        lean = client.images.build("lean", models=["weights:1"], score=folder / "yard" / "score.py").wait()
    row(f"without model and base, {' + '.join(NEEDS)}", f"{(image.document['size'] - 1000) / 1e6:.1f} MB", "<= 100 MB")
    row("without model and base, nothing asked for", f"{(lean.document['size'] - 1000) / 1e6:.1f} MB", "<= 100 MB")


def digests(folder: Path, rounds: int) -> None:
    """Each from nothing but uv's cache: what the builder remembers is taken away before."""
    with running(folder / "yard") as (yard, client):
        model = build(client, folder / "yard", 1_000_000)[2].document["models"][0]
        seen = set()
        for _ in range(REBUILDS):
            shutil.rmtree(yard.data / "image-builder" / "memo", ignore_errors=True)
            shutil.rmtree(folder / "yard" / "cache", ignore_errors=True)
            seen.add(client.images.build("bench", models=[model], score=folder / "yard" / "score.py",
                                         requirements=NEEDS).wait().digest)
    row(f"different digests over {REBUILDS} rebuilds", str(len(seen)), "1")


def bill(folder: Path, rounds: int) -> None:
    """The two documents of a real image, written and signed again here."""
    with running(folder / "yard") as (yard, client):
        _, _, image = build(client, folder / "yard", 1000)
        said = json.loads(client.images.kept(image, "sbom"))
        lock = client.images.kept(image, "lock").decode()
        key = asyncio.run(keys.signer(yard.data))
    doc = Image.model_validate({**image.document, "inputs": []}, extra="ignore")
    found = [{"name": part["name"], "version": part["version"],
              "sha256": part.get("hashes", [{}])[0].get("content", "")}
             for part in said["components"] if part["type"] == "library"]
    pins = {line.partition("==")[0].strip() for line in lock.splitlines() if "==" in line and line[0] not in " #"}
    server, now = Layer("", doc.digest or "", "", 0, ""), datetime.now(UTC)
    holds = sbom.Contents(found, server, doc.lock_digest or "")
    times = []
    for _ in range(REBUILDS):
        began = time.perf_counter()
        text = sbom.sbom(doc, doc.digest or "", holds)
        encode(key.sign(provenance.statement(doc, provenance.Origin(doc.digest or "", holds, text, now, now))))
        times.append(time.perf_counter() - began)
    row(f"bill of materials and provenance, {len(found)} of {len(pins)} packages", f"{statistics.median(times):.4f} s",
        "<= 0.5 s, all")


def memory(folder: Path, rounds: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 5 * HUGE:
        print(f"memory: not here: it needs {5 * HUGE >> 30} GiB on the disk, and {free >> 30} are free")
        return
    with running(folder / "yard", "apart") as (yard, client):
        build(client, folder / "yard", 1_000_000)
        weights = folder / "yard" / "huge.bin"
        with weights.open("wb") as file:
            file.truncate(HUGE)
        pids = {name: yard.processes[name].pid for name in ("image-builder", "registry")}
        before = {name: _reset(pid) for name, pid in pids.items()}
        model = client.models.register("huge", weights, framework="custom")
        client.images.build("huge", models=[model], score=folder / "yard" / "score.py", requirements=NEEDS).wait()
        for name, pid in pids.items():
            grown = (_status(pid, "VmHWM") - before[name]) / 1024
            row(f"memory of the {name} with a 2 GiB model, growth", f"{grown:.0f} MiB",
                "<= 150 MiB" if name == "image-builder" else "-")
            if name == "image-builder":
                row("the same, all that it has", f"{_status(pid, 'VmHWM') / 1024:.0f} MiB", "-")


def _reset(pid: int) -> int:
    """Peak memory counts anew; what it is now, in KiB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _status(pid, "VmRSS")


def _status(pid: int, word: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{word}:"))


ROWS: dict[str, Callable[[Path, int], None]] = {
    "versions": versions, "dockerfile": against_a_dockerfile, "size": size, "digests": digests, "bill": bill,
    "memory": memory}


def main(args: Sequence[str]) -> None:
    rounds = int(args[0]) if args and args[0].isdecimal() else 5
    print(f"Modelyard {__version__}")
    for name in [arg for arg in args if not arg.isdecimal()] or ROWS:
        with tempfile.TemporaryDirectory(prefix="bench-goals-") as place:
            ROWS[name](Path(place), rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
