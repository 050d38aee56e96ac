"""What is said of an image, attached to it in its image store: OCI 1.1 referrers.

Each document is an artifact manifest whose ``subject`` is the image. Registries with a referrers API list it by that.
For those without, and for layout folders, the standard's fallback is kept: the tag ``sha256-<digest of the image>``
names an index of the attached manifests. Each of them has a tag of its own as well,
``sha256-<digest>.<version>.<what>``, for an ImageStore keeps what has a tag; versions of one name may be the same
image, and each has its own documents.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from ..core.attest import ENVELOPE, PROVENANCE
from ..core.errors import Invalid, Unavailable
from ..ports.images import ImageStore
from . import store
from .config import MANIFEST, digest_of, encode
from .model import Image
from .sbom import MEDIA_TYPE as BILL

INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY, EMPTY_TYPE = b"{}", "application/vnd.oci.empty.v1+json"
OF = "io.modelyard.image"
"""The annotation that tells of which image version an attached manifest speaks."""
NAMES = ("sbom", "provenance")
"""As they are called here, and in the blob store."""
TRIES = 5
_TURNS: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()


@dataclass(frozen=True)
class Attached:
    """A document to attach. ``name`` is one of ``NAMES``."""

    name: str
    media_type: str
    body: bytes
    annotations: Mapping[str, str] = field(default_factory=dict)

    def manifest(self, image: Image, subject: Mapping[str, Any]) -> bytes:
        """The artifact manifest."""
        return encode({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": self.media_type, "subject": subject,
            "config": {**_part(EMPTY_TYPE, EMPTY), "data": "e30="}, "layers": [_part(self.media_type, self.body)],
            "annotations": self.marks(image)})

    def entry(self, image: Image, manifest: bytes) -> dict[str, Any]:
        """Of the index."""
        return {**_part(MANIFEST, manifest), "artifactType": self.media_type, "annotations": self.marks(image)}

    def marks(self, image: Image) -> dict[str, str]:
        return {OF: image.id, "org.opencontainers.image.title": self.name, **self.annotations}


def _part(kind: str, body: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest_of(body), "size": len(body)}


def documents(bill: bytes, provenance: bytes) -> list[Attached]:
    """What is attached to every image."""
    return [Attached("sbom", BILL, bill), Attached("provenance", ENVELOPE, provenance, {"predicateType": PROVENANCE})]


def fallback(digest: str) -> str:
    """The tag of the index of what is attached to a manifest."""
    return digest.replace(":", "-")


async def attach(images: ImageStore, image: Image, manifest: bytes, documents: Sequence[Attached]) -> None:
    """In the store when it returns; again is fine, and replaces what was said of this version before."""
    subject = _part(MANIFEST, manifest)
    tag = fallback(subject["digest"])

    async def one(document: Attached) -> dict[str, Any]:
        await images.put_blob(image.repo, digest_of(document.body), store.Chunks(document.body))
        made = document.manifest(image, subject)
        await images.put_manifest(image.repo, f"{tag}.{image.tag}.{document.name}", made, MANIFEST)
        return document.entry(image, made)

    await images.put_blob(image.repo, digest_of(EMPTY), store.Chunks(EMPTY))
    await _listed(images, image, tag, await store.together([one(document) for document in documents]))


async def detach(images: ImageStore, image: Image) -> None:
    """Takes away what was said of this version. Repeating is fine."""
    found = await images.get_manifest(image.repo, image.tag)
    digests = {image.digest, f"sha256:{hashlib.sha256(found[0]).hexdigest()}" if found else None} - {None}
    for tag in sorted(fallback(str(digest)) for digest in digests):
        await _listed(images, image, tag, [])
        for name in NAMES:
            await images.remove(image.repo, f"{tag}.{image.tag}.{name}")


async def _listed(images: ImageStore, image: Image, tag: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """The index, with exactly ``entries`` for this version. Others may write it, and what it names, at the same moment:
    it is looked at again. Without an entry of any version of ours nothing is left of it."""
    gone: set[str] = set()
    async with _TURNS.setdefault((image.repo, tag), asyncio.Lock()):
        for _ in range(TRIES):
            before = await _index(images, image.repo, tag)
            others = [one for one in before if _of(one) != image.id and one["digest"] not in gone]
            after = [*others, *entries]
            if before == after:
                return
            if not any(_of(one) for one in after):
                return await images.remove(image.repo, tag)
            body = encode({"schemaVersion": 2, "mediaType": INDEX, "manifests": after})
            try:
                await images.put_manifest(image.repo, tag, body, INDEX)
            except Invalid:  # another version's documents are being replaced: its index comes after this one
                gone |= {one["digest"] for one in others if not await images.get_manifest(image.repo, one["digest"])}
    raise Unavailable(f"the index {tag} of {image.repo} changes too often; trying again")


async def _index(images: ImageStore, repo: str, tag: str) -> list[dict[str, Any]]:
    found = await images.get_manifest(repo, tag)
    return list(json.loads(found[0]).get("manifests", ())) if found else []


def _of(entry: Mapping[str, Any]) -> str:
    return str((entry.get("annotations") or {}).get(OF, ""))
