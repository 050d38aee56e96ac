"""A ready image as one tar, to carry anywhere: nothing of ours is needed to read it.

- ``oci``: an OCI image layout (``oci-layout``, ``index.json``, ``blobs/sha256``), its only image named by its version.
  The digest is the image's own.
- ``docker``: the same, and the ``manifest.json`` that ``docker load`` of any age reads: ``docker load --input FILE``
  gives ``NAME:VERSION``.

Blobs are streamed from the store as they are; what is damaged there cuts the stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ..core.errors import Invalid
from ..ports.images import ImageStore
from .config import digest_of, encode
from .model import Image
from .referrers import INDEX
from .tarring import END, header, padding

FORMS = ("oci", "docker")
LAYOUT = encode({"imageLayoutVersion": "1.0.0"})
Member = tuple[str, bytes | str, int]
"""Name in the tar, its bytes or the digest of a blob, size."""


@dataclass(frozen=True)
class Archive:
    """A tar before it is written: what is in it, in order."""

    images: ImageStore
    repo: str
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Of the whole tar, in bytes."""
        return sum(len(header(name, size)) + size + len(padding(size)) for name, _, size in self.members) + len(END)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The tar."""
        for name, content, size in self.members:
            yield header(name, size)
            if isinstance(content, bytes):
                yield content
            else:
                async for chunk in self.images.get_blob(self.repo, content):
                    yield chunk
            yield padding(size)
        yield END


def archive(images: ImageStore, image: Image, manifest: tuple[bytes, str], form: str) -> Archive:
    """The tar of an image. Invalid for an unknown form; ``needs-base`` for an engine's tar of an image without one."""
    if form not in FORMS:
        raise Invalid(f"an image is exported as {' or '.join(FORMS)}, not as '{form[:40]}'", field="format")
    if form == "docker" and image.base is None and image.dockerfile is None:
        raise Invalid(f"{image.id} has no base, so no engine can run it: build it with base (--base "
                      "HOST/REPOSITORY:TAG)", code="needs-base", field="format")
    body, kind = manifest
    parts: list[dict[str, Any]] = [json.loads(body)["config"], *json.loads(body)["layers"]]
    listed = {"mediaType": kind, "digest": digest_of(body), "size": len(body),
              "annotations": {"org.opencontainers.image.ref.name": image.tag}}
    index = encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": [listed]})
    texts: list[tuple[str, bytes]] = [("oci-layout", LAYOUT), ("index.json", index), (_place(digest_of(body)), body)]
    if form == "docker":
        paths = [_place(part["digest"]) for part in parts]
        known = [{"Config": paths[0], "RepoTags": [image.id], "Layers": paths[1:]}]
        texts.insert(0, ("manifest.json", encode(known)))
    blobs = {part["digest"]: (_place(part["digest"]), part["digest"], int(part["size"])) for part in parts}
    return Archive(images, image.repo, (*((name, text, len(text)) for name, text in texts), *blobs.values()))


def _place(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"
