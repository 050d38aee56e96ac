"""Documents of the image builder, and the pure steps from one state to the next.

    queued ──> building ──> ready
       └──────────┴──────> failed
    DELETE marks an image as ``deleting`` (a build that runs becomes ``cancelled``); the loop lets go of its
    models, takes the image out of the store, and only then makes the document a tombstone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..core.documents import Document, Part
from ..core.events import Fact
from ..core.specs import Condition, ImageSpec

Phase = Literal["queued", "building", "ready", "failed", "cancelled"]
OVER: frozenset[str] = frozenset({"ready", "failed", "cancelled"})
Step = tuple["Image", Sequence[Fact]]


class ModelInput(Part):
    """A model as it was when the image was asked for: what of it decides the image's bytes."""

    name: str
    version: int
    artifact: str
    size: int = 0
    unpack: bool = False
    filename: str | None = None
    framework: str | None = None
    framework_version: str | None = None
    trusted: bool = False
    properties: dict[str, str] = Field(default_factory=dict)
    signature: dict[str, Any] | None = None
    file_signature: dict[str, Any] | None = None
    sample: dict[str, Any] | list[Any] | None = None

    @property
    def id(self) -> str:
        return f"{self.name}:{self.version}"

    @property
    def folder(self) -> str:
        """Its place below ``/opt/modelyard``: ``models/iris/4``."""
        return f"models/{self.name}/{self.version}"


class Image(Document):
    """An image and its build. ``models`` are exact versions; ``inputs`` is what was known of them at the request,
    so that a build repeated after a crash gives the same bytes. ``holds`` are ``kind/id`` of what needs it."""

    kind: ClassVar[str] = "image"
    indexed: ClassVar[frozenset[str]] = frozenset(
        {"name", "version", "phase", "digest", "models", "model_names", "tags", "properties"})
    unpublished: ClassVar[frozenset[str]] = frozenset({"samples"})
    hidden: ClassVar[frozenset[str]] = frozenset({"model_names", "inputs", "holds", "deleting", "began"})

    name: str
    version: int
    models: list[str] = Field(default_factory=list)
    score: str | None = None
    requirements: list[str] = Field(default_factory=list)
    constraints: list[str] = Field(default_factory=list)
    lock: str | None = None
    python: str | None = None
    """The minor version; None until the base was looked into, where the caller left it to that."""
    platform: str
    base: str | None = None
    dockerfile: str | None = None
    env: dict[str, str] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    properties: dict[str, str] = Field(default_factory=dict)
    description: str = ""
    auto_delete: bool = False
    timeout_s: int = 1800
    onnx: bool = False

    phase: Phase = "queued"
    reason: str | None = None
    digest: str | None = None
    size: int | None = None
    lock_digest: str | None = None
    signatures: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Model id → what it takes and gives (``core/signatures.py``), where the models' own flavours serve."""
    samples: dict[str, Any] = Field(default_factory=dict)
    """Model id → an input that it takes, as a body of ``/score``."""
    served_as: dict[str, str] = Field(default_factory=dict)
    """Model id → ``onnx``, where the image holds a graph that was made of the model."""
    observed_generation: int = 0
    conditions: list[Condition] = Field(default_factory=list)

    model_names: list[str] = Field(default_factory=list)
    inputs: list[ModelInput] = Field(default_factory=list)
    holds: list[str] = Field(default_factory=list)
    deleting: bool = False
    began: datetime | None = None
    """Since when it is being built, waits for others included; anew after a builder that died."""

    @property
    def repo(self) -> str:
        """Its repository in the image store: its name; other workspaces' lie below their own."""
        return self.name if self.workspace == "default" else f"{self.workspace}/{self.name}"

    @property
    def tag(self) -> str:
        return str(self.version)

    @property
    def python_version(self) -> str:
        """The minor version, once it is known: a ready image has one, and a build once it has its base."""
        return self.python or ""


def requested(spec: ImageSpec, inputs: Sequence[ModelInput], *, workspace: str, version: int, python: str | None,
              platform: str, now: datetime, made_by: str | None) -> Image:
    """A new image, due for the build loop at once."""
    fields: dict[str, Any] = spec.model_dump(exclude={"models", "python", "platform"})
    return Image(
        **fields, id=f"{spec.name}:{version}", workspace=workspace, version=version, python=python, platform=platform,
        models=[m.id for m in inputs], model_names=[m.name for m in inputs], inputs=list(inputs),
        created=now, updated=now, due=now, made_by=made_by,
        conditions=[_condition("Built", "Unknown", "Queued", "waiting for a builder", now)])


def alike(one: Image, other: Image) -> bool:
    """Whether both were asked for in the same words, of the same models and files: what a build looks up itself (the
    tag of a base, an index) counts as it is written."""
    def asked(doc: Image) -> dict[str, Any]:
        return doc.model_dump(include={*ImageSpec.model_fields, "inputs"})

    return asked(one) == asked(other)


def _condition(type_: str, status: Any, reason: str, message: str, now: datetime) -> Condition:
    return Condition(type=type_, status=status, reason=reason, message=message, time=now)


def _with(doc: Image, condition: Condition) -> list[Condition]:
    return [*(c for c in doc.conditions if c.type != condition.type), condition]


def building(doc: Image, now: datetime) -> Step | None:
    """A build begins, or begins again."""
    if doc.deleting or waits_for(doc):
        return None
    return doc.evolve(phase="building", began=now, updated=now, conditions=_with(
        doc, _condition("Built", "Unknown", "Building", "the log tells how far it is", now))), ()


def waiting(doc: Image, now: datetime, why: str) -> Step | None:
    """The build cannot go on for now and will be tried again."""
    if doc.phase != "building" or doc.deleting or waits_for(doc) == why:
        return None
    return doc.evolve(updated=now, conditions=_with(doc, _condition("Built", "Unknown", "Waiting", why, now))), ()


def waits_for(doc: Image) -> str:
    """Why the last try of a build broke off; "" where it did not."""
    return next((c.message for c in doc.conditions if (c.type, c.reason) == ("Built", "Waiting")), "")


def left_s(doc: Image, now: datetime) -> float:
    """Seconds that a build still has."""
    return doc.timeout_s - (now - (doc.began or now)).total_seconds()


def built(doc: Image, now: datetime, *, digest: str, size: int, lock_digest: str, python: str,
          signatures: Mapping[str, dict[str, Any]], served_as: Mapping[str, str]) -> Step:
    """The image is in the store. Due once more: what is said of it is attached to it then."""
    if doc.deleting:
        return _again(doc, now)
    done = doc.evolve(
        phase="ready", digest=digest, size=size, lock_digest=lock_digest, python=python, reason=None, updated=now,
        signatures=dict(signatures), served_as=dict(served_as),
        samples={} if doc.score else {m.id: m.sample for m in doc.inputs if m.sample},
        observed_generation=doc.generation, due=now,
        conditions=_with(doc, _condition("Built", "True", "Built", f"{digest}, {size} bytes", now)))
    return done, (Fact("image.built"),)


def failed(doc: Image, now: datetime, reason: str) -> Step:
    """The build ended for a reason that its owner must fix."""
    if doc.deleting:
        return _again(doc, now)
    over = doc.evolve(phase="failed", reason=reason, updated=now, observed_generation=doc.generation,
                      conditions=_with(doc, _condition("Built", "False", "BuildFailed", reason, now)))
    return over, (Fact("image.failed", {"reason": reason}),)


def _again(doc: Image, now: datetime) -> Step:
    return doc.evolve(due=now), ()


def removing(doc: Image, now: datetime, dropped: frozenset[str] = frozenset()) -> Step | None:
    """Deletion begins. ``dropped`` are holds whose holders are gone. A builder at work sees the mark within a second,
    and the loop looks again when it has stopped."""
    if doc.deleting:
        return None
    over, why = doc, "it was deleted before it was built"
    if doc.phase not in OVER:
        over = doc.evolve(phase="cancelled", reason=why, conditions=_with(
            doc, _condition("Built", "False", "Cancelled", why, now)))
    return over.evolve(
        deleting=True, holds=[h for h in doc.holds if h not in dropped], updated=now, due=now,
        conditions=_with(over, _condition("Deleting", "True", "Deleted", "its models are being let go of", now))), ()


def removed(doc: Image, now: datetime) -> Step:
    """Everything of it is gone but the number of its version."""
    return doc.evolve(deleted=True, due=None, updated=now), (Fact("image.deleted"),)


def held(doc: Image, holder: str) -> Step | None:
    """``holder`` (``deployment/iris``) needs this image."""
    return None if holder in doc.holds else (doc.evolve(holds=sorted([*doc.holds, holder])), ())


def released(doc: Image, holder: str, now: datetime) -> Step | None:
    """``holder`` needs it no longer; with ``auto_delete`` the last one takes the image along."""
    if holder not in doc.holds:
        return None
    free = doc.evolve(holds=[h for h in doc.holds if h != holder])
    last = doc.auto_delete and not free.holds
    return (removing(free, now) if last else None) or (free, ())


def changed(doc: Image, now: datetime, changes: Mapping[str, Any]) -> Step | None:
    """A caller's change of what may change. None: it is so already."""
    if all(getattr(doc, field) == value for field, value in changes.items()):
        return None
    return doc.evolve(**changes, updated=now, generation=doc.generation + 1), ()
