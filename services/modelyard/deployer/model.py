"""The deployment document, and what callers' changes do to it. Pure: no I/O, the moment is given."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.documents import Document, Part, Time, carried
from ..core.errors import Conflict, Invalid, NotFound
from ..core.events import Fact
from ..core.specs import Capture, Condition, DeploymentSpec, Limits, Resources, Secret

Phase = Literal["pending", "progressing", "healthy", "degraded", "failed", "deleting"]
KEPT = 10
SPEC = ("image", "target", "replicas", "resources", "capture", "limits", "env", "secrets", "tags", "description",
        "progress_deadline_s")
"""The caller's fields, as stored: ``traffic`` of one entry has become ``image``."""


class Past(Part):
    """One generation: what was asked for, and how it went."""

    generation: int
    time: Time
    image: str
    models: list[str]
    digest: str | None = None
    healthy: bool = False
    reason: str = ""
    made_by: str | None = None
    spec: dict[str, Any]


class Found(BaseModel):
    """An image as its builder described it: ``reason`` says why it failed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    name: str
    phase: str
    digest: str | None = None
    models: list[str] = Field(default_factory=list)
    base: str | None = None
    dockerfile: str | None = None
    reason: str | None = None


class Deployment(Document):
    """``holds`` maps each image that is or may be held for us to ``wanted`` or ``placed``: written before the hold is
    asked for, taken out after it was given back. ``ready_told`` and ``failed_told`` are the newest generations that
    those events told of. ``serving`` is the generation that answers calls, 0 for none."""

    kind: ClassVar[str] = "deployment"
    indexed: ClassVar[frozenset[str]] = frozenset({
        "image", "image_name", "models", "model_names", "target", "tags", "phase"})
    hidden: ClassVar[frozenset[str]] = frozenset({
        "image_name", "model_names", "ports", "history", "holds", "requested_at", "serving_image", "ready_told",
        "failed_told", "grant_until"})

    name: str
    image: str
    target: str
    replicas: int = 1
    resources: Resources = Field(default_factory=Resources)
    capture: Capture = Field(default_factory=Capture)
    limits: Limits = Field(default_factory=Limits)
    env: dict[str, str] = Field(default_factory=dict)
    secrets: dict[str, Secret] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    description: str = ""
    progress_deadline_s: int = 600

    phase: Phase = "pending"
    conditions: list[Condition] = Field(default_factory=list)
    observed_generation: int = 0
    endpoints: dict[str, str] = Field(default_factory=dict)
    replicas_ready: int = 0
    serving: int = 0
    models: list[str] = Field(default_factory=list)
    image_digest: str | None = None

    image_name: str = ""
    model_names: list[str] = Field(default_factory=list)
    ports: dict[str, int] = Field(default_factory=dict)
    history: list[Past] = Field(default_factory=list)
    holds: dict[str, str] = Field(default_factory=dict)
    requested_at: Time | None = None
    serving_image: str = ""
    ready_told: int = 0
    failed_told: int = 0
    grant_until: Time | None = None

    def needs(self) -> set[str]:
        """Images that must not go away: the wanted one, the one that serves, the last healthy generation's."""
        last = next((past.image for past in reversed(self.history) if past.healthy), "")
        return {self.image, self.serving_image, last} - {""}

    @property
    def settled(self) -> bool:
        """Whether the newest generation came to its end, good or bad."""
        if self.phase == "deleting" or self.observed_generation < self.generation:
            return False
        return self.phase in ("healthy", "failed", "degraded")


Step = tuple[Deployment, Sequence[Fact]]


def with_condition(doc: Deployment, type_: str, status: Literal["True", "False", "Unknown"], reason: str,
                   message: str, now: datetime) -> list[Condition]:
    """The conditions with this one said; its time moves only when its status does."""
    old = next((c for c in doc.conditions if c.type == type_), None)
    time = old.time if old is not None and old.status == status else now
    return [*(c for c in doc.conditions if c.type != type_),
            Condition(type=type_, status=status, reason=reason, message=message, time=time)]


def values_of(spec: DeploymentSpec) -> dict[str, Any]:
    """The fields to store. Invalid, every problem at once, for what this release does not do."""
    errors = []
    if len(spec.traffic) > 1:
        errors.append({"field": "traffic", "message": "this release sends all traffic to one image; give image"})
    if spec.autoscale is not None:
        errors.append({"field": "autoscale", "message": "this release does not scale by itself; give replicas"})
    if errors:
        raise Invalid("; ".join(f"{e['field']}: {e['message']}" for e in errors), errors=errors)
    values = {field: getattr(spec, field) for field in SPEC}
    values["image"] = spec.image or spec.traffic[0].image
    values["replicas"] = spec.replicas or 1
    return values


def requested(values: dict[str, Any], name: str, image: Found, *, workspace: str, now: datetime,
              made_by: str | None, before: Deployment | None) -> Step:
    """A new deployment, due at once. Over a tombstone (``before``) its events are counted on."""
    doc = Deployment(id=name, name=name, workspace=workspace, created=now, updated=now, made_by=made_by, due=now,
                     revision=before.revision if before else 0, sequence=before.sequence if before else 0, **values)
    return _turned(doc, image, now, made_by), (Fact("deployment.requested"),)


def revised(doc: Deployment, values: dict[str, Any], image: Found, now: datetime, *, always: bool = False,
            made_by: str | None = None) -> Step | None:
    """The next generation; None when nothing differs (unless ``always``). Conflict while it is being deleted."""
    if doc.phase == "deleting":
        raise Conflict(f"deployment '{doc.id}' is being deleted", code="deleting")
    if values["target"] != doc.target:
        raise Invalid(f"deployment '{doc.id}' runs on '{doc.target}' and stays there; delete it and create it anew",
                      errors=[{"field": "target", "message": "cannot be changed"}])
    values = {**values, "image": image.id}
    if not always:  # a copy of an earlier generation is what that one was
        values = {field: carried(getattr(doc, field), value) for field, value in values.items()}
    changed = [field for field in SPEC if getattr(doc, field) != values[field]]
    if not changed and not always:
        return None
    view = doc.view()
    previous = {field: view[field] for field in changed}
    new = doc.evolve(**values, generation=doc.generation + 1, updated=now, due=now)
    return _turned(new, image, now, made_by), (Fact("deployment.updated", {"previous": previous}),)


def _turned(doc: Deployment, image: Found, now: datetime, made_by: str | None) -> Deployment:
    """At the start of a generation: what the image is, its place in the history, the hold that it will need."""
    doc = doc.evolve(
        image=image.id, image_name=image.name, image_digest=image.digest, models=image.models,
        model_names=sorted({model.partition(":")[0] for model in image.models}), requested_at=now,
        phase="progressing" if image.phase == "ready" else "pending",
        holds={image.id: "wanted"} | doc.holds,
        conditions=with_condition(doc, "Progressing", "True", "Requested", f"{image.id} is asked for", now),
    )
    known = doc.history[-1].spec if doc.history else {}
    spec = doc.model_dump(mode="json", include={*SPEC, *(known.keys() & (doc.model_extra or {}).keys())})
    past = Past(generation=doc.generation, time=now, image=image.id, models=image.models, digest=image.digest,
                made_by=made_by, spec=spec)
    return doc.evolve(history=[*doc.history, past][-KEPT:])


def deleting(doc: Deployment, now: datetime) -> Step | None:
    """From now on it only goes away."""
    if doc.phase == "deleting":
        return None
    conditions = with_condition(doc, "Progressing", "True", "Deleting", "replicas drain and end", now)
    return doc.evolve(phase="deleting", updated=now, due=now, conditions=conditions), ()


def rollback_to(doc: Deployment, generation: int | None) -> Past:
    """The generation to copy: the named one, else the last healthy one that is not what is asked for now.

    NotFound when it is not kept, Conflict when there is none to go back to.
    """
    if generation is not None:
        past = next((p for p in doc.history if p.generation == generation), None)
        if past is None:
            kept = ", ".join(str(p.generation) for p in doc.history)
            raise NotFound(f"generation {generation} of '{doc.id}' is not kept; these are: {kept}",
                           code="no-such-generation")
        return past
    past = next((p for p in reversed(doc.history) if p.healthy and p.generation != doc.generation), None)
    if past is None:
        raise Conflict(f"'{doc.id}' has no earlier healthy generation to go back to", code="nothing-to-roll-back-to")
    return past


def look_again(doc: Deployment, now: datetime) -> Step:
    """Somebody knows of news: the loop looks now."""
    return doc.evolve(due=now), ()


def waiting_for(doc: Deployment, now: datetime, why: str, seconds: float) -> Step:
    """Nothing can be done now; the reason is shown and the loop looks again."""
    return doc.evolve(due=now + timedelta(seconds=seconds),
                      conditions=with_condition(doc, "Progressing", "Unknown", "Waiting", why, now)), ()


class Sweep(Document):
    """Makes the loop look for what runs and belongs to no deployment; there is one, with the id ``sweep``."""

    kind: ClassVar[str] = "sweep"
