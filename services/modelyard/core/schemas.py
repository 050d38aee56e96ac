"""JSON Schemas of the events, from the same classes that the code uses; exported to ``proto/events``.

A consumer may rely on what is required here for as long as the type's version stays: within one version only
optional fields are added, so every schema allows more fields than it names.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .events import TOPICS, Envelope
from .specs import DeploymentSpec, ImageSpec, ModelSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TEXT: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
MOMENT: dict[str, Any] = {"type": "string", "format": "date-time"}
DOCUMENT: dict[str, Any] = {
    "id": TEXT, "workspace": TEXT, "generation": {"type": "integer", "minimum": 1},
    "created": MOMENT, "updated": MOMENT,
}
IMAGE_PHASES = ["queued", "building", "ready", "failed", "cancelled"]
DEPLOYMENT_PHASES = ["pending", "progressing", "healthy", "degraded", "failed", "deleting"]

KINDS: dict[str, tuple[type[BaseModel] | None, dict[str, Any]]] = {
    "model": (ModelSpec, {"version": {"type": "integer", "minimum": 1}}),
    "image": (ImageSpec, {"version": {"type": "integer", "minimum": 1}, "phase": {"enum": IMAGE_PHASES}}),
    "deployment": (DeploymentSpec, {"phase": {"enum": DEPLOYMENT_PHASES}}),
    "capture": (None, {"deployment": TEXT, "replica": TEXT, "image": TEXT}),
    "telemetry": (None, {"deployment": TEXT, "image": TEXT, "model": TEXT, "start": MOMENT, "end": MOMENT,
                         "requests": COUNT}),
}
"""First word of a topic → (the caller's fields, what the service adds and always sends)."""
ALIASED: dict[str, Any] = {"name": TEXT, "aliases": {"type": "object", "additionalProperties": {"type": "integer"}}}

CELLS: dict[str, Any] = {"cells": {"type": "array", "items": {
    "type": "array", "prefixItems": [COUNT, TEXT, TEXT, {"type": "object", "additionalProperties": COUNT}],
    "minItems": 4, "maxItems": 4}}}
"""What a segment adds to windows: start of ten seconds, model, status, calls by latency bucket. Not there in events of
0.1.0."""


def _open(schema: Any) -> Any:
    """The same schema without ``additionalProperties: false`` and titles, at every depth."""
    if isinstance(schema, dict):
        return {k: _open(v) for k, v in schema.items()
                if not (k == "additionalProperties" and v is False) and not (k == "title" and isinstance(v, str))}
    return [_open(v) for v in schema] if isinstance(schema, list) else schema


def data_schema(topic: str) -> dict[str, Any]:
    """What ``data`` holds on a topic: the document as GET answers it, with what the topic adds."""
    spec, added = KINDS[topic.partition(".")[0]]
    if topic == "model.aliased":
        spec, added = None, ALIASED
    schema: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
    if spec is not None:
        schema = {**schema, **_open(spec.model_json_schema(mode="serialization"))}
        schema.pop("description", None)
        schema["properties"].pop("sample", None)  # of a model: GET answers it, events carry nobody's data
    extra: dict[str, Any] = {}
    if topic.endswith(".failed"):
        extra = {"reason": TEXT}
    elif topic.endswith(".updated"):
        extra = {"previous": {"type": "object"}}
    optional = CELLS if topic == "capture.closed" else {}
    schema["properties"] = {**schema["properties"], **DOCUMENT, **added, **extra, **optional}
    always = {"name"} if spec is not None else set()
    schema["required"] = sorted(always | set(DOCUMENT) | set(added) | set(extra))
    return schema


def event_schema(topic: str) -> dict[str, Any]:
    """The whole CloudEvent of a topic's current version."""
    envelope = _open(Envelope.model_json_schema(mode="serialization"))
    data = data_schema(topic)
    defs = data.pop("$defs", {})
    envelope["properties"] |= {"type": {"const": f"{topic}.v1"}, "source": {"const": f"/modelyard/{TOPICS[topic]}"},
                               "time": MOMENT, "traceparent": TEXT, "data": data}
    always = {*envelope["required"], "specversion", "datacontenttype", "workspace"}
    envelope["required"] = sorted(always - {"traceparent"})
    return {"$schema": DIALECT, "title": f"{topic}.v1", **envelope, **({"$defs": defs} if defs else {})}
