"""What a new version of a model costs: seconds until its image is ready, and bytes sent to the registry.

    python tests/benchmarks/bench_images.py [VERSIONS]

A real yard, its images in a real registry behind a proxy that counts; then the same into a layout folder. The packages
are scikit-learn, onnxruntime and the scoring server's own, from uv's cache; Modelyard's cache is empty. Asked for and
waited for by the SDK. The bill of materials and the provenance are in the bytes.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from infra.stack.registry import Registry
from modelyard import Client
from tests.e2e.yard import Yard
from tests.proxy import Proxy

SCORE = "def run(data):\n    return data\n"
NEEDS = ["scikit-learn", "onnxruntime"]
SIZES = {"20 kB": 20_000, "1 MB": 1_000_000, "91 MB": 91_000_000}


@contextlib.contextmanager
def stores(folder: Path) -> Iterator[dict[str, tuple[str | None, Callable[[], int]]]]:
    """Where images go: name → its URL (None: the default), and how many bytes were sent there so far."""
    found: dict[str, tuple[str | None, Callable[[], int]]] = {"layout": (None, lambda: 0)}
    with contextlib.ExitStack() as stack:
        if reason := Registry.missing():
            print(f"no registry here: {reason}")
        else:
            registry = stack.enter_context(Registry(folder / "server"))
            wire = stack.enter_context(Proxy(registry.port))
            found["registry"] = f"oci://127.0.0.1:{wire.port}/bench", lambda: wire.sent
        yield found


def build(client: Client, folder: Path, name: str, size: int) -> float:
    """Registers new weights, then measures the image: seconds until it is ready."""
    weights = folder / "weights.bin"
    weights.write_bytes(os.urandom(size))
    model = client.models.register(name, weights, framework="custom")
    began = time.perf_counter()
    client.images.build(name, models=[model], score=folder / "score.py", requirements=NEEDS).wait()
    return time.perf_counter() - began


def settled(sent: Callable[[], int]) -> int:
    """Once nothing has been sent for a second: what is said of an image goes up behind it."""
    last = -1
    while last != (now := sent()):
        last = now
        time.sleep(1.0)
    return last


def measure(client: Client, folder: Path, store: str, sent: Callable[[], int], versions: int) -> None:
    def row(what: str, size: int, times: list[float], wire: int) -> None:
        beside = f"   sent {wire / 1e6:8.3f} MB = model + {(wire - size) / 1e3:9.1f} kB" if wire else ""
        print(f"{store:8}  {what:28} {statistics.median(times):6.3f} s{beside}", flush=True)

    before = settled(sent)
    took = build(client, folder, "small", SIZES["20 kB"])
    row("first build", SIZES["20 kB"], [took], settled(sent) - before)
    for name, size in SIZES.items():
        repo = f"of-{size}"
        build(client, folder, repo, size)
        before = settled(sent)
        times = [build(client, folder, repo, size) for _ in range(versions)]
        row(f"new version of {name}", size, times, (settled(sent) - before) // versions)


def main() -> None:
    versions = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory(prefix="bench-images-") as place:
        folder = Path(place)
        (folder / "score.py").write_text(SCORE)
        with stores(folder) as found:
            for store, (url, sent) in found.items():
                env = {"XDG_CACHE_HOME": str(folder / f"cache-{store}"),
                       "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR") or str(Path.home() / ".cache" / "uv")}
                env |= {"MODELYARD_IMAGES": url} if url else {}
                yard = Yard.start("all-in-one", folder / f"yard-{store}", **env)
                try:
                    with Client(yard.url()) as client:
                        measure(client, folder, store, sent, versions)
                finally:
                    yard.stop()


if __name__ == "__main__":
    main()
