"""What must hold when a seed is over. ``wrong`` gives every way in which it does not."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from modelyard.core.documents import Document
from modelyard.core.errors import Invalid
from modelyard.core.events import Envelope
from modelyard.deployer.model import Deployment
from modelyard.image_builder.model import Image
from modelyard.kernel.dead import DeadLetter, ParkedKey
from modelyard.registry.model import Model, ModelName

from .world import RECORDER, SERVICES, TOPICS, Tally, World


def every(world: World, service: str, type_: type[Any], *, dead: bool = False) -> list[Any]:
    """The documents of a type, tombstones with ``dead``."""
    return [type_.model_validate_json(r.body) for (_, kind, _), r in world.shelves[service].records.items()
            if kind == type_.kind and (dead or not r.deleted)]


def wrong(world: World) -> list[str]:
    """Empty when all is well."""
    looks = (_outboxes, _sequences, _published, _effects, _waiting, _models, _images, _deployments)
    return [*world.faults, *(problem for look in looks for problem in look(world))]


def _outboxes(world: World) -> list[str]:
    return [f"{service}: {key} has unpublished events" for service, shelf in world.shelves.items()
            for key, record in shelf.records.items() if record.outbox]


def _committed(world: World) -> list[Envelope]:
    return [event for shelf in world.shelves.values() for event in shelf.committed]


def _sequences(world: World) -> list[str]:
    found: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for event in _committed(world):
        about = (event.source, event.topic.partition(".")[0] + ("-name" if event.topic == "model.aliased" else ""),
                 event.subject)
        found[about].append(int(event.sequence))
    return [f"sequences of {about}: {numbers}" for about, numbers in found.items()
            if numbers != list(range(1, len(numbers) + 1))]


def _published(world: World) -> list[str]:
    """Each at least once; without repeats, in the order of the commits within each topic and key."""
    ours: dict[tuple[str, str], list[str]] = defaultdict(list)
    for event in _committed(world):
        ours[event.topic, event.partitionkey].append(event.id)
    problems = []
    for lane, ids in ours.items():
        there = []
        for record in world.log.lanes.get(lane, ()):
            try:
                there.append(Envelope.decode(record.raw).id)
            except Invalid:
                continue
        if (once := list(dict.fromkeys(there))) != ids:
            problems.append(f"{lane}: committed {len(ids)} events, published {len(once)}, or in another order")
    return problems


def _effects(world: World) -> list[str]:
    """Every event had its effect at the recorder once, and in order for each topic and subject."""
    wanted: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    for event in _committed(world):
        if event.topic in TOPICS:
            wanted[f"{event.source}/{event.topic}/{event.subject}"].append(
                (event.topic, int(event.sequence), event.id))
    had = {doc.id: doc.effects for doc in every(world, RECORDER.name, Tally)}
    return [f"effects of {id}: {[e[1] for e in had.get(id, [])]} instead of {[e[1] for e in wanted[id]]}"
            for id in sorted({*wanted, *had}) if had.get(id, []) != wanted.get(id, [])]


def _waiting(world: World) -> list[str]:
    """No parked keys, no dead letters but the poison's, no lease that nobody holds."""
    problems = []
    for name, service in SERVICES.items():
        problems += [f"{name}: {doc.id} is parked: {doc.error}" for doc in every(world, name, ParkedKey)]
        planned = world.poisoned if "model.registered" in service.handlers else 0
        letters: list[DeadLetter] = every(world, name, DeadLetter)
        strange = [letter for letter in letters if letter.key != "default/poison"]
        problems += [f"{name}: dead letter {letter.topic} {letter.key}: {letter.message}" for letter in strange]
        if len(letters) - len(strange) != planned:
            problems.append(f"{name}: {len(letters) - len(strange)} dead letters of {planned} poisoned events")
        for key, record in world.shelves[name].records.items():
            doc = Document.model_validate_json(record.body)
            late = doc.due is not None and (world.loop.now() - doc.due).total_seconds() > 30
            if late and not record.deleted:
                problems.append(f"{name}: {key} has been due for long (lease {doc.lease!r})")
    return problems


def _models(world: World) -> list[str]:
    problems: list[str] = []
    models: list[Model] = every(world, "registry", Model, dead=True)
    by: dict[str, list[Model]] = defaultdict(list)
    for doc in models:
        by[doc.name].append(doc)
    tokens = [doc.made_by for doc in models]
    problems += [f"{token} made two models" for token in set(tokens) if tokens.count(token) > 1]
    for name, versions in by.items():
        if sorted(doc.version for doc in versions) != list(range(1, len(versions) + 1)):
            problems.append(f"versions of {name}: {sorted(doc.version for doc in versions)}")
        living = [doc for doc in versions if not doc.deleted]
        latest = [doc.version for doc in living if doc.marks]
        if latest != ([max(doc.version for doc in living)] if living else []):
            problems.append(f"the latest of {name}: {latest} of {sorted(doc.version for doc in living)}")
    return problems + _holds_of_models(world, [doc for doc in models if not doc.deleted])


def _holds_of_models(world: World, living: list[Model]) -> list[str]:
    needed: dict[str, set[str]] = defaultdict(set)
    for image in every(world, "image-builder", Image):
        if image.phase != "failed":
            for ref in image.models:
                needed[ref].add(f"image/{image.id}")
    for names in every(world, "registry", ModelName):
        for alias, version in names.aliases.items():
            needed[f"{names.name}:{version}"].add(f"alias/{alias}")
    here = {doc.id: set(doc.holds) for doc in living}
    return [f"{ref} is held by {sorted(here.get(ref, ()))}, needed by {sorted(needed[ref])}"
            for ref in sorted({*needed, *here}) if here.get(ref, set()) != needed.get(ref, set())]


def _images(world: World) -> list[str]:
    problems, needed = [], defaultdict(set)
    for doc in every(world, "deployer", Deployment):
        for id in doc.holds:
            needed[id].add(f"deployment/{doc.id}")
    images: list[Image] = every(world, "image-builder", Image)
    for doc in images:
        if doc.phase not in ("ready", "failed"):
            problems.append(f"image {doc.id} is {doc.phase}, deleting {doc.deleting}")
        there = (doc.repo, doc.tag) in world.shed.tags
        if (doc.phase == "ready") != there:
            problems.append(f"image {doc.id} is {doc.phase}; its tag is there: {there}")
        if set(doc.holds) != needed.get(doc.id, set()):
            problems.append(f"image {doc.id} is held by {doc.holds}, needed by {sorted(needed.get(doc.id, ()))}")
    known = {(doc.repo, doc.tag) for doc in images}
    problems += [f"an image of nobody: {tag}" for tag in world.shed.tags if tag not in known]
    built = [e.subject for e in world.shelves["image-builder"].committed if e.topic == "image.built"]
    return problems + [f"{id} was built twice" for id in sorted(set(built)) if built.count(id) > 1]


def _deployments(world: World) -> list[str]:
    problems, wanted = [], {}
    for doc in every(world, "deployer", Deployment):
        run = world.ground.runs.get(("default", doc.id))
        wanted["default", doc.id] = doc
        if doc.phase == "healthy":
            if run is None or run.workload.generation != doc.generation or run.workload.image != doc.image:
                problems.append(f"deployment {doc.id} is healthy at {doc.generation} and something else runs")
            if set(doc.holds) != doc.needs() or set(doc.holds.values()) != {"placed"}:
                problems.append(f"deployment {doc.id} holds {doc.holds} and needs {sorted(doc.needs())}")
        elif doc.phase not in ("failed", "degraded"):
            problems.append(f"deployment {doc.id} is {doc.phase}")
    problems += [f"{key} runs and is nobody's" for key in world.ground.runs if key not in wanted]
    ready = [(e.subject, e.data["generation"], e.data["created"])
             for e in world.shelves["deployer"].committed if e.topic == "deployment.ready"]
    return problems + [f"deployment {r} was ready twice" for r in sorted(set(ready)) if ready.count(r) > 1]

