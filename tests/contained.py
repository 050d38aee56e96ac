"""Images that a container engine can run: Debian, the scoring server with what it needs, and a scoring file."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata as metadata
import io
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.stack import debian
from modelyard.ports.images import ImageStore
from tests import handmade
from tests.backends import required

NEEDS = handmade.SERVICES / "modelyard/scoring/requirements.txt"
LEFT_OUT = re.compile(r"/tests?/|\.pyi$|^modelyard/(cli|registry|deployer|image_builder|telemetry)/|^\.\./")


def distributions(needs: list[str]) -> dict[str, metadata.Distribution]:
    """These and all that they need, as this Python has them."""
    found: dict[str, metadata.Distribution] = {}
    while needs:
        need = Requirement(needs.pop())
        name = canonicalize_name(need.name)
        if name not in found and (need.marker is None or need.marker.evaluate({"extra": ""})):
            found[name] = metadata.distribution(name)
            needs += found[name].requires or ()
    return found


@functools.cache
def environment() -> bytes:
    """The layer of dependencies and of our own package, with what Python compiled of them."""
    python = f"opt/env/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    files: dict[str, Path] = {}
    for one in distributions(NEEDS.read_text().splitlines()).values():
        files |= {f"{python}/{path}": Path(str(path.locate())) for path in one.files or ()
                  if not LEFT_OUT.search(str(path))}
    ours = handmade.SERVICES / "modelyard"
    files |= {f"opt/modelyard/lib/modelyard/{path.relative_to(ours)}": path for path in ours.rglob("*")
              if "__pycache__" not in path.parts and not LEFT_OUT.search(f"modelyard/{path.relative_to(ours)}")}
    files["opt/modelyard/launch.py"] = ours / "scoring/launch.py"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, path in sorted(files.items()):
            if path.is_file():
                member = tarfile.TarInfo(name)
                about = path.stat()
                member.size, member.mtime = about.st_size, int(about.st_mtime)
                member.mode = 0o755 if about.st_mode & 0o100 else 0o644
                with path.open("rb") as file:
                    archive.addfile(member, file)
    return out.getvalue()


@functools.cache
def base() -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """(layer, its descriptor, the image's config). Skips the test where Debian cannot be put together, or fails it."""
    if reason := debian.missing():
        (pytest.fail if "docker" in required() else pytest.skip)(f"there is no base image here: {reason}")
    layers, config = _layout(debian.base())
    assert len(layers) == 1
    return *layers[0], config


def _layout(folder: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], dict[str, Any]]:
    """([(layer, its descriptor)], the image's config) of an OCI layout of one image."""
    def blob(entry: dict[str, Any]) -> bytes:
        return (folder / "blobs" / entry["digest"].replace(":", "/")).read_bytes()

    manifest = json.loads(blob(json.loads((folder / "index.json").read_bytes())["manifests"][0]))
    return [(blob(entry), entry) for entry in manifest["layers"]], json.loads(blob(manifest["config"]))


def archive(tag: str, folder: Path | None = None) -> bytes:
    """An OCI layout, Debian if none is given, as `docker load` reads it, put together by hand."""
    layers, config = _layout(folder) if folder else ([base()[:2]], base()[2])
    parts = {"config.json": json.dumps(config).encode(), **{f"{n}.tar": layer for n, (layer, _) in enumerate(layers)}}
    listed = {"Config": "config.json", "RepoTags": [tag], "Layers": [name for name in parts if name.endswith(".tar")]}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        for name, data in {**parts, "manifest.json": json.dumps([listed]).encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return out.getvalue()


async def image(images: ImageStore, repo: str, tag: str, score: str = handmade.ECHO, system: bool = True) -> str:
    """An image that answers with ``score``; the digest of its manifest. Without the ``system`` it holds no Python."""
    first, descriptor, about = base()
    await images.put_blob(repo, descriptor["digest"], handmade.chunks(first))

    async def blob(data: bytes, kind: str) -> dict[str, Any]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        await images.put_blob(repo, digest, handmade.chunks(data))
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest, "size": len(data)}

    below = [descriptor] if system else []
    layers = [await blob(data, "layer.v1.tar") for data in (environment(), handmade.tar(handmade.scorer(score)))]
    settings = {"User": "10001", "Entrypoint": ["python3", "-I", "-S", "/opt/modelyard/launch.py"], "Cmd": ["serve"],
                "Env": [*about["config"]["Env"], f"FROM_IMAGE={tag}"]}
    diff_ids = [*about["rootfs"]["diff_ids"][:len(below)], *(layer["digest"] for layer in layers)]
    config = {"architecture": about["architecture"], "os": about["os"], "config": settings,
              "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {"schemaVersion": 2, "mediaType": handmade.MANIFEST, "layers": [*below, *layers],
                "config": await blob(json.dumps(config).encode(), "config.v1+json")}
    return await images.put_manifest(repo, tag, json.dumps(manifest).encode(), handmade.MANIFEST)
