"""The build context of a ready image as one tar: all that another builder needs to make it again.

``Containerfile``, ``requirements.lock``, and ``opt/`` as it is in the image (code, scoring file, models).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator

from ..core.errors import Conflict, NotFound
from ..core.layout import image_key
from ..kernel.service import Context
from .bases import LAYOUT, TITLE
from .config import ENTRYPOINT, USER
from .locks import read_lock
from .model import Image
from .tarring import END, TAR_GZ, Entry, tar
from .wheels import site_packages


async def context(ctx: Context, doc: Image) -> AsyncIterator[bytes]:
    """Streams it. Conflict (``not-ready``) before the image is ready."""
    found = await manifest(ctx, doc)
    lock = b"".join([chunk async for chunk in ctx.blobs.get(image_key(doc.workspace, doc.id, "lock"))])
    texts = [Entry("Containerfile", containerfile(doc, bool(read_lock(lock.decode())[0].pins)).encode()),
             Entry("requirements.lock", lock)]
    for piece in tar(texts, end=b""):
        yield piece
    for layer in json.loads(found[0])["layers"]:
        if not layer["annotations"]["io.modelyard.layer"].startswith(("env: ", TITLE)):
            async for piece in _open_end(_plain(ctx, doc, layer)):
                yield piece
    yield END


async def manifest(ctx: Context, doc: Image) -> tuple[bytes, str]:
    """The manifest and its media type. Conflict (``not-ready``) before the image is ready."""
    found = await ctx.images.get_manifest(doc.repo, doc.tag) if doc.phase == "ready" else None
    if found is None:
        raise Conflict(f"{doc.id} is {doc.phase}; it can be had once it is ready", code="not-ready")
    return found


def containerfile(doc: Image, packages: bool) -> str:
    """What the image is, in the words of other builders."""
    lines = [f"# {doc.id} ({doc.digest}): an equivalent image; only Modelyard's own build gives the same digest",
             *_from(doc)]
    if packages:
        lines += ["COPY requirements.lock /tmp/requirements.lock",
                  "RUN pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes "
                  f"--target /{site_packages(doc.python_version)} -r /tmp/requirements.lock"]
    lines += ["COPY opt/ /opt/", *(f"ENV {name}={json.dumps(value)}" for name, value in sorted(doc.env.items())),
              "ENV ORT_DISABLE_TELEMETRY=1", f"USER {USER}", f"ENTRYPOINT {json.dumps(list(ENTRYPOINT))}",
              'CMD ["serve"]']
    return "\n".join(lines) + "\n"


def _from(doc: Image) -> list[str]:
    """The base, as other builders write it; they know a layout by a name that they are given."""
    if doc.base is None:
        return [f"FROM python:{doc.python}-slim"]
    if doc.base.startswith(LAYOUT):
        return [f"# docker build --build-context base={doc.base} …", "FROM base"]
    return [f"FROM {doc.base.removeprefix('oci://').partition('?')[0]}"]


async def _plain(ctx: Context, doc: Image, layer: dict[str, object]) -> AsyncIterator[bytes]:
    source = ctx.images.get_blob(doc.repo, str(layer["digest"]))
    if layer["mediaType"] != TAR_GZ:
        async for chunk in source:
            yield chunk
        return
    inflate = zlib.decompressobj(31)
    async for chunk in source:
        yield inflate.decompress(chunk)


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
