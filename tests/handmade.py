"""Images made by hand: the layout that the local target runs, with the real scoring server, and no wheels to unpack."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import site
import sys
import tarfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from modelyard.ports.images import ImageStore

SERVICES = Path(__file__).parents[1] / "services"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ECHO = "def run(data):\n    return data\n"
BROKEN = "def init():\n    raise RuntimeError('the weights are not here')\n\ndef run(data):\n    return data\n"
SLOW = "import time\n\ndef run(data):\n    time.sleep(0.005)\n    return {'answer': %d}\n"


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def tar(files: Mapping[str, bytes], squeeze: bool = False) -> bytes:
    """A layer of these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            archive.addfile(member, io.BytesIO(data))
    return gzip.compress(out.getvalue(), mtime=0) if squeeze else out.getvalue()


def environment() -> dict[str, bytes]:
    """Dependencies and our package by reference to where this test runs from: what a built image holds as files."""
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    here = "\n".join([*site.getsitepackages(), str(SERVICES)])
    return {
        f"opt/env/lib/{python}/site-packages/here.pth": here.encode(),
        "opt/modelyard/launch.py": (SERVICES / "modelyard/scoring/launch.py").read_bytes(),
    }


def scorer(score: str) -> dict[str, bytes]:
    """A scoring file and what says that it is there."""
    about = {"format": 1, "python": f"3.{sys.version_info[1]}", "score": "score/score.py", "models": []}
    return {"opt/modelyard/score/score.py": score.encode(), "opt/modelyard/image.json": json.dumps(about).encode()}


async def put(images: ImageStore, repo: str, tag: str, layers: list[bytes], env: Mapping[str, str]) -> str:
    """Stores an image of these layers; the digest of its manifest."""

    async def blob(data: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        await images.put_blob(repo, digest, chunks(data))
        return {"mediaType": "application/octet-stream", "digest": digest, "size": len(data)}

    stored = [await blob(layer) for layer in layers]
    config = await blob(json.dumps({"config": {"Env": [f"{k}={v}" for k, v in env.items()]}}).encode())
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": stored}
    return await images.put_manifest(repo, tag, json.dumps(manifest).encode(), MANIFEST)


async def image(images: ImageStore, repo: str, tag: str, score: str = ECHO) -> str:
    """An image that answers with ``score``; the digest of its manifest."""
    return await put(images, repo, tag, [tar(environment(), squeeze=True), tar(scorer(score))], {"FROM_IMAGE": tag})
