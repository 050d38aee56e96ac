"""Names of repositories, tags and digests, as the OCI specifications have them, and what a manifest names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..core.errors import Invalid

DIGEST = re.compile(r"^sha256:([0-9a-f]{64})$")
REPO = re.compile(r"^[a-z0-9]+(?:[._\-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._\-]+[a-z0-9]+)*)*$")
TAG = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._\-]{0,127}$")
MANIFESTS = ", ".join((
    "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json"))
"""The media types that manifests and lists of them have."""
OCI_MANIFEST = MANIFESTS.partition(",")[0]
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"


def hex_of(digest: str) -> str:
    """The 64 digits. Raises Invalid for what is not a digest."""
    found = DIGEST.fullmatch(digest)
    if found is None:
        raise Invalid(f"'{digest}' is not a digest; write sha256: and 64 lower-case hexadecimal digits")
    return found[1]


def tag_of(tag: str) -> str:
    """The tag, checked."""
    if not TAG.fullmatch(tag):
        raise Invalid(f"'{tag}' is not a tag; use 1-128 letters, digits, '_', '.', '-'")
    return tag


def repo_of(repo: str) -> str:
    """The repository's name, checked."""
    if len(repo) > 255 or not REPO.fullmatch(repo):
        raise Invalid(f"'{repo}' is not a repository name; use lower-case letters, digits, '.', '_', '-', '/'")
    return repo


def is_manifest(part: dict[str, Any]) -> bool:
    """Whether a descriptor is of a manifest or of a list of them."""
    return any(word in str(part.get("mediaType", "")) for word in (".manifest.", ".index."))


def descriptors(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Config, layers, and the manifests of a list."""
    if "config" in manifest:
        yield manifest["config"]
    yield from manifest.get("layers", ())
    yield from manifest.get("manifests", ())


def parts(manifest: bytes) -> list[dict[str, Any]]:
    """As ``descriptors``, of the bytes; each has a digest and a size. Raises Invalid for what is not a manifest."""
    try:
        found = list(descriptors(json.loads(manifest)))
        for part in found:
            hex_of(part["digest"])
            int(part["size"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Invalid(f"this is not an OCI manifest: {exc}") from exc
    return found
