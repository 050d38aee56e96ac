"""The build context of a ready image as one tar: all that another builder needs to make it again.

``Dockerfile`` and ``opt/`` as it is in the image (packages, code, scoring file, models): when it is built nothing is
resolved, run or downloaded but the base. ``requirements.lock`` lies beside, for whoever wants to install anew.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ..core.errors import Conflict, NotFound
from ..core.layout import artifact_key, image_key
from ..kernel.service import Context
from .bases import LAYOUT, TITLE
from .model import Image
from .tarring import END, TAR_GZ, Entry, header, padding, tar

OWN_DOCKERFILE = "dockerfile.tar"
"""The folder with the Dockerfile that a user brought, as it was brought."""
BASE_DIGEST = "org.opencontainers.image.base.digest"


async def context(ctx: Context, doc: Image) -> AsyncIterator[bytes]:
    """Streams it. Conflict (``not-ready``) before the image is ready."""
    parsed = json.loads((await manifest(ctx, doc))[0])
    lock = b"".join([chunk async for chunk in ctx.blobs.get(image_key(doc.workspace, doc.id, "lock"))])
    config = b"".join([chunk async for chunk in ctx.images.get_blob(doc.repo, parsed["config"]["digest"])])
    text = dockerfile(doc, json.loads(config)["config"], (parsed.get("annotations") or {}).get(BASE_DIGEST))
    for piece in tar([Entry("Dockerfile", text.encode()), Entry("requirements.lock", lock)], end=b""):
        yield piece
    if doc.dockerfile is not None:
        async for piece in _beside(ctx, artifact_key(doc.workspace, doc.dockerfile)):
            yield piece
    for layer in parsed["layers"]:
        if not layer["annotations"]["io.modelyard.layer"].startswith(TITLE):
            async for piece in _open_end(_plain(ctx, doc, layer)):
                yield piece
    yield END


async def manifest(ctx: Context, doc: Image) -> tuple[bytes, str]:
    """The manifest and its media type. Conflict (``not-ready``) before the image is ready."""
    found = await ctx.images.get_manifest(doc.repo, doc.tag) if doc.phase == "ready" else None
    if found is None:
        raise Conflict(f"{doc.id} is {doc.phase}; it can be had once it is ready", code="not-ready")
    return found


async def _beside(ctx: Context, blob: str) -> AsyncIterator[bytes]:
    """The user's own context as one more file. NotFound when it is gone."""
    known = await ctx.blobs.stat(blob)
    if known is None:
        raise NotFound("the folder of the Dockerfile that the image stands on is gone")
    yield header(OWN_DOCKERFILE, known.size)
    async for chunk in ctx.blobs.get(blob):
        yield chunk
    yield padding(known.size)


def dockerfile(doc: Image, config: Mapping[str, Any], base_digest: str | None) -> str:
    """What the image is, in the words of other builders. ``config`` is the image's own, so nothing is said twice."""
    lines = [f"# {doc.id} ({doc.digest}): the same files and settings; the digest is Modelyard's own build's",
             *_from(doc, base_digest), "COPY opt/ /opt/"]
    for word, pairs in (("LABEL", config.get("Labels") or {}),
                        ("ENV", dict(pair.partition("=")[::2] for pair in config["Env"]))):
        for name, value in sorted(pairs.items()):
            lines.append(f"{word} {name}={_quoted(value)}" if "\n" not in value else
                         f"# {name} has more than one line, which a Dockerfile cannot write: give it to docker run")
    ports = sorted(port.partition("/")[0] for port in config.get("ExposedPorts") or {})
    lines += [f"EXPOSE {' '.join(ports)}"] if ports else []
    return "\n".join([
        *lines, f"WORKDIR {config['WorkingDir']}", f"USER {config['User']}",
        f"ENTRYPOINT {json.dumps(config['Entrypoint'])}", f"CMD {json.dumps(config['Cmd'])}"]) + "\n"


def _quoted(value: str) -> str:
    """A Dockerfile reads ``$NAME`` even between quotes."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'


def _from(doc: Image, digest: str | None) -> list[str]:
    """The base, as other builders write it; they know a layout by a name that they are given."""
    if doc.dockerfile is not None:
        return [f"# the base is built of {OWN_DOCKERFILE}: docker build --tag base - < {OWN_DOCKERFILE}", "FROM base"]
    if doc.base is None:
        return [f"# A GUESS: the image has no base; any other with Python {doc.python}, glibc and libstdc++6 will do",
                f"FROM python:{doc.python}-slim"]
    if doc.base.startswith(LAYOUT):
        return [f"# the base is a layout: docker tag it base, or docker build --build-context base={doc.base} …",
                "FROM base"]
    name = doc.base.removeprefix("oci://").partition("?")[0]
    return [f"FROM {name}@{digest}" if digest and "@" not in name else f"FROM {name}"]


async def _plain(ctx: Context, doc: Image, layer: dict[str, object]) -> AsyncIterator[bytes]:
    source = ctx.images.get_blob(doc.repo, str(layer["digest"]))
    if layer["mediaType"] != TAR_GZ:
        async for chunk in source:
            yield chunk
        return
    inflate = zlib.decompressobj(31)
    async for chunk in source:
        while chunk:
            if inflate.eof:  # a layer may be several gzip members
                inflate = zlib.decompressobj(31)
            yield inflate.decompress(chunk)
            chunk = inflate.unused_data


async def _open_end(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A layer without the two empty blocks at its end, so that another can follow."""
    held = b""
    async for chunk in chunks:
        held += chunk
        if len(held) > len(END):
            yield held[:-len(END)]
            held = held[-len(END):]


async def kept(ctx: Context, doc: Image, what: str) -> AsyncIterator[bytes]:
    """What a build leaves beside the image: ``lock``, ``sbom``, ``provenance``. NotFound before the image is ready, and
    for an image of an older version that had none."""
    if doc.phase != "ready":
        raise NotFound(f"{doc.id} is {doc.phase}; its {what} is there once it is ready")
    async for chunk in ctx.blobs.get(image_key(doc.workspace, doc.id, what)):
        yield chunk
