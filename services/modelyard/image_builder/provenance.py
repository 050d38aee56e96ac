"""Where an image comes from: SLSA v1 provenance as an in-toto statement, signed by the yard's own key.

It is about the image and not in it: the image's digest is the same whoever built it, and when. The packages are not
repeated here: the lock and the bill of materials, which have them with their hashes, are named by digest.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..core.attest import PROVENANCE, STATEMENT
from ..core.version import __version__
from . import sbom
from .config import digest_of, encode
from .model import Image
from .sbom import Contents
from .tarring import PACKER

BUILD_TYPE = "urn:modelyard:image-build:v1"
BUILDER = "urn:modelyard:image-builder"
ASKED = ("models", "score", "requirements", "constraints", "lock", "python", "platform", "base",
         "dockerfile", "env", "onnx")


@dataclass(frozen=True)
class Origin:
    """A build that came to its end: what it was made of, and when. ``bill`` is the bill of materials."""

    digest: str
    holds: Contents
    bill: bytes
    began: datetime
    ended: datetime


def statement(image: Image, made: Origin) -> bytes:
    """The bytes to sign."""
    return encode({
        "_type": STATEMENT, "predicateType": PROVENANCE,
        "subject": [{"name": image.id, "digest": _sha(made.digest)}],
        "predicate": {"buildDefinition": _definition(image, made.holds), "runDetails": {
            "builder": {"id": BUILDER, "version": {"modelyard": __version__}},
            "metadata": {"invocationId": f"{image.workspace}/{image.id}",
                         "startedOn": _time(made.began), "finishedOn": _time(made.ended)},
            "byproducts": [{"name": "sbom", "mediaType": sbom.MEDIA_TYPE, "digest": _sha(digest_of(made.bill))}]}}})


def _definition(image: Image, holds: Contents) -> dict[str, Any]:
    asked = {name: getattr(image, name) for name in ASKED}
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": {"name": image.name, **{k: v for k, v in asked.items() if v}},
        "internalParameters": {
            "python": f"{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}",
            "gzip": "{} {}, level {}, members of {}".format(*PACKER)},
        "resolvedDependencies": _materials(image, holds)}


def _materials(image: Image, holds: Contents) -> list[dict[str, Any]]:
    out = [{"name": "model", "uri": f"urn:modelyard:model:{m.id}", "digest": _sha(m.artifact)} for m in image.inputs]
    if image.score:
        out.append({"name": "score", "digest": _sha(image.score)})
    if image.dockerfile:
        out.append({"name": "dockerfile", "digest": _sha(image.dockerfile)})
    if holds.base is not None:
        out.append({"name": "base", "uri": f"urn:modelyard:base:{holds.base.name}", "digest": _sha(holds.base.digest)})
    out.append({"name": "lock", "mediaType": "text/plain", "digest": _sha(holds.lock_digest)})
    out.append({"name": "scoring-server", "uri": f"urn:modelyard:scoring-server:{__version__}",
                "digest": _sha(holds.server.digest)})
    return out


def _sha(digest: str) -> dict[str, str]:
    return {"sha256": digest.removeprefix("sha256:")}


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
