"""Events: CloudEvents 1.0, one codec for every bus, one table of topics.

An event says what one commit of one document did. ``data`` is the document as GET would have answered at that
commit, plus ``reason`` on ``*.failed`` and ``previous`` (old values of what changed) on ``*.updated``.
Within v1 only optional fields are added; a breaking change is a new version plus one upcaster in ``UPCASTERS``.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .documents import Document, Time, rfc3339
from .errors import Invalid

TOPICS: dict[str, str] = {
    "model.registered": "registry", "model.updated": "registry", "model.deleted": "registry",
    "model.aliased": "registry",
    "image.requested": "image-builder", "image.built": "image-builder", "image.failed": "image-builder",
    "image.deleted": "image-builder",
    "deployment.requested": "deployer", "deployment.ready": "deployer", "deployment.failed": "deployer",
    "deployment.updated": "deployer", "deployment.scaled": "deployer", "deployment.deleted": "deployer",
    "capture.closed": "telemetry", "capture.lost": "telemetry", "telemetry.window": "telemetry",
}
"""Topic → the service that is its only source. Type = topic + ``.v1``."""

PER_DEPLOYMENT = ("capture.", "telemetry.", "alert.", "drift.")
"""Topics keyed by the deployment they tell of instead of by their subject."""

CONTENT_TYPE = "application/cloudevents+json"
UPCASTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Old type (``image.built.v1``) → function from the old event's JSON to the next version's. None needed yet."""


class Envelope(BaseModel):
    """One CloudEvent. ``sequence`` is 20 zero-padded digits; ``partitionkey`` is the Kafka key."""

    model_config = ConfigDict(frozen=True, extra="allow")

    specversion: str = Field(default="1.0", pattern="^1\\.0$")
    id: str = Field(min_length=1)
    source: str = Field(min_length=1)
    type: str = Field(pattern=r"^[a-z]+\.[a-z-]+\.v[1-9][0-9]*$")
    subject: str = Field(min_length=1)
    time: Time
    datacontenttype: str = "application/json"
    workspace: str = "default"
    partitionkey: str
    sequence: str = Field(pattern=r"^[0-9]{20}$")
    traceparent: str | None = None
    data: dict[str, Any]

    @property
    def topic(self) -> str:
        """``model.registered.v1`` → ``model.registered``."""
        return self.type.rpartition(".")[0]

    def encode(self) -> bytes:
        """Structured-mode JSON (``application/cloudevents+json``), UTF-8, absent attributes left out."""
        body = self.model_dump(exclude_none=True)
        body["time"] = rfc3339(self.time)
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, raw: bytes) -> Envelope:
        """Strict on the required attributes, lenient on unknown ones. Raises Invalid, saying what is wrong."""
        try:
            body = json.loads(raw)
        except ValueError as exc:
            raise Invalid(f"not an event: not JSON ({exc})") from exc
        if not isinstance(body, dict):
            raise Invalid("not an event: a JSON object is needed")
        while (upcast := UPCASTERS.get(str(body.get("type")))) is not None:
            body = upcast(body)
        try:
            return cls.model_validate(body)
        except ValidationError as exc:
            first = exc.errors()[0]
            raise Invalid(f"not an event: {'.'.join(map(str, first['loc']))}: {first['msg']}") from exc


D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class Fact:
    """What a commit did, in one word: the topic, and what the topic adds to the document's view."""

    topic: str
    extra: Mapping[str, Any] | None = None


_random = random.Random()
os.register_at_fork(after_in_child=_random.seed)


def random_hex(digits: int) -> str:
    """Hexadecimal digits that nobody else will draw. They name things, they keep no secret: asking the kernel for
    each would cost more than the event."""
    return f"{_random.getrandbits(4 * digits):0{digits}x}"


def event_id() -> str:
    """A UUIDv7: unique, and sorts by time (RFC 9562)."""
    n = (time.time_ns() // 1_000_000) << 80 | _random.getrandbits(80)
    n = n & ~(0xF << 76) | 0x7 << 76
    n = n & ~(0x3 << 62) | 0x2 << 62
    text = f"{n:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def announce(doc: D, source: str, *facts: Fact, traceparent: str | None = None,
             now: datetime | None = None) -> tuple[D, tuple[Envelope, ...]]:
    """The document with its sequence moved on, and the events to commit with it, one for each fact."""
    moment = now or datetime.now(UTC)
    view = {name: value for name, value in doc.view().items() if name not in doc.unpublished}
    events = []
    for count, fact in enumerate(facts, start=1):
        about = view.get("deployment", doc.id) if fact.topic.startswith(PER_DEPLOYMENT) else doc.id
        events.append(Envelope(
            id=event_id(), source=f"/modelyard/{source}", type=f"{fact.topic}.v1", subject=doc.id, time=moment,
            workspace=doc.workspace, partitionkey=f"{doc.workspace}/{about}",
            sequence=f"{doc.sequence + count:020d}", traceparent=traceparent, data={**view, **(fact.extra or {})},
        ))
    return doc.evolve(sequence=doc.sequence + len(facts)), tuple(events)
