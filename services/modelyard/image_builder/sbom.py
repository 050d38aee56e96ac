"""The bill of materials of an image: CycloneDX 1.6 JSON, the same for the same image.

Written here instead of by a library: it is one JSON object, and a library would add its clock and its random serial.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from packaging.utils import canonicalize_name

from ..core.version import __version__
from .bases import Base
from .config import encode
from .model import Image, ModelInput
from .tarring import Layer

MEDIA_TYPE = "application/vnd.cyclonedx+json"


@dataclass(frozen=True)
class Contents:
    """What an image holds. ``packages``: ``{"name", "version"}`` of every distribution inside, ``sha256`` of its wheel,
    and ``expression`` (SPDX) or ``license`` (as its metadata has it) where they are known. ``server`` is the layer of
    our own code. Of a base only its name and digest are told."""

    packages: Sequence[Mapping[str, str]]
    server: Layer
    lock_digest: str
    base: Base | None = None
    graphs: Mapping[str, str] = field(default_factory=dict)
    """Model id → digest of the ONNX graph that stands in the image for it."""


def sbom(image: Image, digest: str, holds: Contents) -> bytes:
    """The document."""
    root = f"image:{digest}"
    parts = [*map(_package, holds.packages), _server(holds.server),
             *(_model(m, holds.graphs.get(m.id)) for m in image.inputs),
             *([_score(image.score)] if image.score else ()), *([_base(holds.base)] if holds.base is not None else ())]
    said = {"lock": holds.lock_digest, "platform": image.platform, "python": image.python_version}
    return encode({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "modelyard", "version": __version__}]},
            "component": {"bom-ref": root, "type": "container", "name": image.name, "version": image.tag,
                          "hashes": [_hash(digest)], "properties": _properties(said)}},
        "components": parts,
        "dependencies": [{"ref": root, "dependsOn": sorted(p["bom-ref"] for p in parts)}],
    })


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}


def _properties(said: Mapping[str, str | None]) -> list[dict[str, str]]:
    return [{"name": f"modelyard:{name}", "value": value} for name, value in sorted(said.items()) if value]


def _package(found: Mapping[str, str]) -> dict[str, Any]:
    name = canonicalize_name(found["name"])
    out: dict[str, Any] = {"bom-ref": name, "type": "library", "name": found["name"], "version": found["version"],
                           "purl": f"pkg:pypi/{name}@{found['version'].replace('+', '%2B')}"}
    if found.get("sha256"):
        out["hashes"] = [_hash(found["sha256"])]
    if found.get("expression"):
        out["licenses"] = [{"expression": found["expression"]}]
    elif found.get("license"):
        out["licenses"] = [{"license": {"name": found["license"]}}]
    return out


def _server(layer: Layer) -> dict[str, Any]:
    """The layer that it is, so that it can be found in the image."""
    return {"bom-ref": "scoring-server:", "type": "application", "name": "modelyard-scoring-server",
            "version": __version__, "hashes": [_hash(layer.digest)]}


def _score(digest: str) -> dict[str, Any]:
    return {"bom-ref": "score:", "type": "application", "name": "scoring file", "hashes": [_hash(digest)]}


def _base(base: Base) -> dict[str, Any]:
    return {"bom-ref": f"base:{base.digest}", "type": "container", "name": base.name, "hashes": [_hash(base.digest)]}


def _model(model: ModelInput, graph: str | None) -> dict[str, Any]:
    """As it was registered; a graph that was made of it has it as its ancestor."""
    said = _properties({"framework": model.framework, "framework_version": model.framework_version})
    own = {"type": "machine-learning-model", "name": model.name, "version": str(model.version),
           "hashes": [_hash(model.artifact)], **({"properties": said} if said else {})}
    if graph is None:
        return {"bom-ref": f"model:{model.id}", **own}
    return {"bom-ref": f"model:{model.id}", **own, "hashes": [_hash(graph)],
            "properties": _properties({"framework": "onnx", "converted_from": f"{model.framework} {model.artifact}"}),
            "pedigree": {"ancestors": [own]}}
