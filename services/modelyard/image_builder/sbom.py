"""The bill of materials of an image: CycloneDX 1.6 JSON, the same for the same image.

Written here instead of by a library: it is one JSON object, and a library would add its clock and its random serial.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from packaging.utils import canonicalize_name

from .bases import Base
from .config import encode
from .model import Image, ModelInput


def sbom(image: Image, digest: str, packages: Sequence[dict[str, str]], base: Base | None = None) -> bytes:
    """``packages``: ``{"name", "version", "license"}`` of every distribution inside. Of a base only its name and digest
    are told."""
    root = f"image:{digest}"
    parts = [*map(_package, packages), *map(_model, image.inputs), *([_base(base)] if base is not None else ())]
    return encode({
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "metadata": {"component": {
            "bom-ref": root, "type": "container", "name": image.name, "version": image.tag,
            "hashes": [_hash(digest)]}},
        "components": parts,
        "dependencies": [{"ref": root, "dependsOn": [p["bom-ref"] for p in parts]}],
    })


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}


def _package(found: dict[str, str]) -> dict[str, Any]:
    purl = f"pkg:pypi/{canonicalize_name(found['name'])}@{found['version']}"
    out: dict[str, Any] = {"bom-ref": purl, "type": "library", "name": found["name"], "version": found["version"],
                           "purl": purl}
    if found.get("license"):
        out["licenses"] = [{"license": {"name": found["license"]}}]
    return out


def _base(base: Base) -> dict[str, Any]:
    return {"bom-ref": f"base:{base.digest}", "type": "container", "name": base.name, "hashes": [_hash(base.digest)]}


def _model(model: ModelInput) -> dict[str, Any]:
    return {"bom-ref": f"model:{model.id}", "type": "machine-learning-model", "name": model.name,
            "version": str(model.version), "hashes": [_hash(model.artifact)]}
