"""What an image says of itself: ``image.json`` inside, the OCI config and the manifest outside.

Nothing here depends on the image's name, version, time or place: equal inputs give equal bytes.

What a container target may rely on, for an image with a base (config as any OCI engine reads it):

- layers: the base's as they were, annotated ``io.modelyard.layer: base: …``, then ours (all below ``/opt``); gzip or
  plain tar, OCI media types, so Docker Engine 20.10 takes them;
- ``Entrypoint``: the base's own interpreter by its full path, ``-I -S /opt/modelyard/launch.py``; ``Cmd``: ``serve``.
  A target appends ``serve --grpc … --http … --admin … --spool …`` in place of ``Cmd``; without, gRPC is on
  0.0.0.0:8081 and REST on 0.0.0.0:8080 (``ExposedPorts``), admin on 127.0.0.1:8082, and nothing is captured;
- ``User``: ``USER``, who owns nothing in the image: the root may be mounted read-only. Whoever wants capture mounts a
  writable folder and names it with ``--spool``; scoring code may want a ``/tmp``;
- ``Env``: the base's (``PATH`` too), ours, the image's own last; the label ``io.modelyard.env`` holds the last as JSON;
- labels say what it holds without our registry (``labels``);
- labels, healthcheck, volumes, stop signal and command of the base are not taken over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.version import __version__
from .bases import PATH, Base
from .model import Image, ModelInput
from .tarring import Layer

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
EPOCH = "1970-01-01T00:00:00Z"
"""On purpose, whatever SOURCE_DATE_EPOCH says: docs/decisions/0019-what-is-in-an-image.md."""
USER = "10001"
ENTRYPOINT = ("python3", "-I", "-S", "/opt/modelyard/launch.py")
ENV = {"ORT_DISABLE_TELEMETRY": "1"}
PORTS = ("8080/tcp", "8081/tcp")
STANDARD, OWN = "org.opencontainers.image.", "io.modelyard."
OWN_ENV = f"{OWN}env"
"""The label that holds an image's own environment, where ``Env`` holds its base's as well."""


def encode(value: Any) -> bytes:
    """JSON with sorted keys and no blanks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def about(python: str, score: bool, models: Sequence[tuple[ModelInput, str, str]],
          signatures: Mapping[str, Mapping[str, Any]], converted: Mapping[str, Mapping[str, Any]]) -> bytes:
    """``image.json``: models as (input, path below ``/opt/modelyard``, framework); signatures by model id, and by that
    what the server must know of a graph that was made of a model. Samples are in it where the models' own flavours
    serve them."""
    return encode({
        "format": 1, "python": python, "score": "score/score.py" if score else None,
        "models": [{
            "name": m.name, "version": m.version, "framework": framework,
            "framework_version": None if m.id in converted else m.framework_version,
            "path": path, "trusted": m.trusted, "properties": m.properties,
            **({"signature": signatures[m.id]} if m.id in signatures else {}),
            **({"sample": m.sample} if m.sample and not score else {}),
            **({"converted_from": {"artifact": m.artifact, "framework": m.framework,
                                   "framework_version": m.framework_version},
                "answers": converted[m.id]} if m.id in converted else {}),
        } for m, path, framework in models],
    })


def labels(image: Image, lock_digest: str, base: Base | None) -> dict[str, str]:
    """What an image says to those who have nothing but it."""
    models = [{"id": m.id, "artifact": m.artifact, "framework": m.framework,
               "framework_version": m.framework_version} for m in image.inputs]
    serves = ", ".join(m.id for m in image.inputs) or "a scoring file"
    said = {
        f"{STANDARD}title": serves,
        f"{STANDARD}description": f"Scores {serves}: Open Inference Protocol v2 by gRPC on 8081 and by REST on 8080",
        f"{STANDARD}base.name": base.name if base is not None else "",
        f"{STANDARD}base.digest": base.digest if base is not None else "",
        f"{OWN}version": __version__, f"{OWN}python": image.python_version, f"{OWN}lock": lock_digest,
        f"{OWN}score": image.score or "",
        f"{OWN}models": encode([{k: v for k, v in m.items() if v} for m in models]).decode(),
        f"{OWN}sbom": "among the OCI referrers of this image (application/vnd.cyclonedx+json), listed by the index "
                      "that the tag sha256-<digest of its manifest> names; its provenance is there as well"}
    return {name: text for name, text in said.items() if text}


def oci_config(platform: str, env: Mapping[str, str], layers: Sequence[Layer], base: Base | None,
               said: Mapping[str, str]) -> bytes:
    """The image config: runs as nobody in particular, starts the scoring server. ``layers`` are all, the base's
    first; ``said`` are its labels."""
    system, _, machine = platform.partition("/")
    own = {**ENV, **env}
    config: dict[str, Any] = {"User": USER, "Env": own, "Entrypoint": list(ENTRYPOINT), "Cmd": ["serve"],
                              "WorkingDir": "/opt/modelyard", "Labels": dict(said)}
    if base is not None:
        config |= {"Env": {"PATH": PATH, **dict(pair.partition("=")[::2] for pair in base.env), **own},
                   "Entrypoint": [base.interpreter, *ENTRYPOINT[1:]], "ExposedPorts": {port: {} for port in PORTS},
                   "Labels": {**said, OWN_ENV: encode(own).decode()}}
    config["Env"] = sorted(f"{k}={v}" for k, v in config["Env"].items())
    return encode({
        "architecture": machine, "os": system, "created": EPOCH, "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": _history(layers, base),
    })


def _history(layers: Sequence[Layer], base: Base | None) -> list[Mapping[str, Any]]:
    """One entry a layer; the base's own entries, where it tells of each of its layers."""
    first: Sequence[Mapping[str, Any]] = base.history if base is not None else ()
    told = sum(not entry.get("empty_layer") for entry in first)
    ours = layers[len(base.layers) if base is not None and told == len(base.layers) else 0:]
    return [*(first if len(ours) < len(layers) else ()),
            *({"created": EPOCH, "created_by": f"modelyard {layer.title}"} for layer in ours)]


def manifest(config: bytes, layers: Sequence[Layer], base: Base | None = None) -> bytes:
    """The OCI manifest of a config and its layers."""
    marks = {"annotations": {"org.opencontainers.image.base.digest": base.digest,
                             "org.opencontainers.image.base.name": base.name}} if base is not None else {}
    return encode({
        "schemaVersion": 2, "mediaType": MANIFEST, **marks,
        "config": {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": [layer.descriptor for layer in layers],
    })
