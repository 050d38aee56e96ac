"""From what a target shows to what the document says: phases, conditions and the events of a deployment. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from ..core.events import Fact
from ..core.specs import Condition
from ..ports.targets import Observed
from .model import Deployment, Found, Past, Phase, Step, with_condition

LOOK_S, QUIET_S, TROUBLE_S = 0.5, 2.0, 5.0
GONE_S = 15.0
"""So long may every replica of a good generation be away (they are being started again) before it has failed."""


@dataclass(frozen=True)
class Seen:
    """What one look found. ``generation`` is the one that the look was made for; ``image`` is given when it was
    asked for; ``trouble`` says why the target refused this generation; ``holds`` are those placed (True) and given
    back (False)."""

    generation: int
    target: Observed
    image: Found | None = None
    trouble: str = ""
    holds: Mapping[str, bool] = field(default_factory=dict)
    grant_until: datetime | None = None
    why: str = "Refused"
    """``trouble`` in one word."""


@dataclass(frozen=True)
class Verdict:
    """``given_up`` means that this generation will not come any further by itself."""

    phase: Phase
    reason: str
    message: str = ""
    given_up: bool = False


def settled(doc: Deployment, seen: Seen, now: datetime) -> Step:
    """The document after a look. When a caller changed it meanwhile, only what is there is noted."""
    doc = _noted(doc, seen)
    if doc.phase == "deleting" or doc.generation != seen.generation:
        return doc.evolve(due=now), ()
    if seen.image is not None and seen.image.digest:
        doc = _with_digest(doc, seen.image.digest)
    verdict = judge(doc, seen, now)
    doc = _with_available(doc, seen.target, now)
    facts = _facts(doc, verdict)
    history = [_remembered(p, doc, seen.target, verdict) for p in doc.history]
    told = {f"{fact.topic.partition('.')[2]}_told": doc.generation for fact in facts}
    quiet = verdict.phase == "healthy"
    return doc.evolve(
        phase=verdict.phase, history=history, conditions=_progressing(doc, verdict, now),
        updated=doc.updated if verdict.phase == doc.phase else now,
        observed_generation=doc.observed_generation if verdict.phase in ("pending", "progressing") else doc.generation,
        due=now + timedelta(seconds=QUIET_S if quiet else TROUBLE_S if seen.trouble else LOOK_S), **told,
    ), facts


def _remembered(past: Past, doc: Deployment, target: Observed, verdict: Verdict) -> Past:
    """A generation's place in the history. One that serves has passed its probes, also when nobody looked then."""
    if past.generation == doc.generation:
        reason = verdict.message if verdict.given_up else ""
        return past.model_copy(update={"healthy": past.healthy or verdict.phase == "healthy", "reason": reason})
    return past.model_copy(update={"healthy": True}) if past.generation == target.serving else past


def judge(doc: Deployment, seen: Seen, now: datetime) -> Verdict:
    """The phase of the newest generation."""
    target, image = seen.target, seen.image
    short: Literal["degraded", "failed"] = "degraded" if target.serving and target.ready else "failed"
    if image is not None and image.phase in ("failed", "cancelled"):
        return Verdict(short, "ImageFailed", f"image {image.id} {image.phase}: {image.reason or 'no reason'}", True)
    if seen.trouble:
        return Verdict(short, seen.why, seen.trouble, True)
    if not doc.image_digest:
        return Verdict("pending", "ImageBuilding", f"image {doc.image} is not ready yet")
    if target.state == "absent" or target.generation != doc.generation:
        return Verdict("progressing", "Starting", "replicas are being started")
    if target.failed:
        return Verdict(short, "GenerationFailed", target.failed, True)
    if target.serving != doc.generation:
        return Verdict("progressing", "Rolling", _why_not_ready(target) or "replicas are being started")
    if target.ready >= doc.replicas:
        return Verdict("healthy", "Complete", f"{target.ready} of {doc.replicas} replicas are ready")
    return _short_of_replicas(doc, target, now)


def _short_of_replicas(doc: Deployment, target: Observed, now: datetime) -> Verdict:
    message = f"{target.ready} of {doc.replicas} replicas are ready; {_why_not_ready(target)}".rstrip("; ")
    if doc.ready_told < doc.generation:
        if now - (doc.requested_at or now) < timedelta(seconds=doc.progress_deadline_s):
            return Verdict("progressing", "Scaling", message)
        return Verdict("degraded" if target.ready else "failed", "ProgressDeadlineExceeded", message, True)
    gone = next((c.time for c in doc.conditions if c.type == "Available" and c.status == "False"), now)
    if target.ready or now - gone < timedelta(seconds=GONE_S):
        return Verdict("degraded", "ReplicasLost", message)
    return Verdict("failed", "NothingServes", message)


def _why_not_ready(target: Observed) -> str:
    """The first replica that has something to say, the newest generation's before the others'."""
    for replica in sorted(target.replicas, key=lambda r: -r.generation):
        if not replica.ready and replica.reason and replica.reason != "draining":
            return f"replica {replica.name}: {replica.reason}"
    return ""


def _facts(doc: Deployment, verdict: Verdict) -> tuple[Fact, ...]:
    if verdict.phase == "healthy":
        return (Fact("deployment.ready"),) if doc.ready_told < doc.generation else ()
    fell = verdict.phase == "failed" and doc.phase != "failed"
    if (verdict.given_up and doc.failed_told < doc.generation) or fell:
        return (Fact("deployment.failed", {"reason": verdict.message}),)
    return ()


def _progressing(doc: Deployment, verdict: Verdict, now: datetime) -> list[Condition]:
    if verdict.reason in ("ReplicasLost", "NothingServes"):  # the roll-out itself is over and was good
        return with_condition(doc, "Progressing", "True", "Complete", verdict.message, now)
    return with_condition(doc, "Progressing", "False" if verdict.given_up else "True", verdict.reason,
                          verdict.message, now)


def _noted(doc: Deployment, seen: Seen) -> Deployment:
    """What is there, whoever asked for it. A hold given back that is needed again must be placed again."""
    target, holds = seen.target, dict(doc.holds)
    for image, placed in seen.holds.items():
        if placed and image in holds:
            holds[image] = "placed"
        elif not placed and image in doc.needs():
            holds[image] = "wanted"
        elif not placed:
            holds.pop(image, None)
    return doc.evolve(
        holds=holds, replicas_ready=target.ready, serving=target.serving,
        serving_image=target.image if target.serving else "", endpoints=dict(target.endpoints) or doc.endpoints,
        ports=dict(target.ports) or doc.ports, grant_until=seen.grant_until or doc.grant_until)


def _with_digest(doc: Deployment, digest: str) -> Deployment:
    history = [p.model_copy(update={"digest": digest}) if p.generation == doc.generation else p for p in doc.history]
    return doc.evolve(image_digest=digest, history=history)


def _with_available(doc: Deployment, target: Observed, now: datetime) -> Deployment:
    if target.ready:
        conditions = with_condition(doc, "Available", "True", "Serving", f"generation {target.serving} serves", now)
    else:
        why = _why_not_ready(target) or "no replica is ready"
        conditions = with_condition(doc, "Available", "False", "NoReplicaReady", why, now)
    return doc.evolve(conditions=conditions)
